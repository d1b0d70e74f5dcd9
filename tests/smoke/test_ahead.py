"""What the host does beside the device: pictures written by threads, and how long the device waited."""

import threading
import time

import jax
import pytest

from infer.ahead import DeviceClock, Writers
from jaxmix.pipeline.drawing import GIVEN


def test_what_a_writer_raises_is_raised_and_the_others_are_written_all_the_same():
    written, writers = [], Writers(most=2)

    def fail():
        raise OSError(28, "No space left on device")

    for write in (fail, lambda: written.append(1), lambda: written.append(2), lambda: written.append(3)):
        writers.hand(write)
    writers.close()
    with pytest.raises(OSError, match="No space"):
        writers.check()
    assert sorted(written) == [1, 2, 3]


def test_no_more_pictures_wait_for_a_slow_disk_than_there_is_room_for():
    slow, held, most = threading.Event(), [], 3

    def write():
        slow.wait(10)

    writers = Writers(most)

    def hand():
        for _ in range(most + 1):
            writers.hand(write)
            held.append(1)

    thread = threading.Thread(target=hand)
    thread.start()
    while len(held) < most:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(held) == most, "one more was taken while nothing was written"
    slow.set()
    thread.join()
    writers.close()
    writers.check()


class Result:
    """A batch whose end is said by an event."""

    def __init__(self):
        self.ended, self.seen = threading.Event(), threading.Event()

    def block_until_ready(self):
        self.ended.wait(10)
        self.seen.set()


def test_a_device_waits_from_the_end_of_a_batch_until_it_is_given_the_next_and_not_while_that_compiles():
    compiled, first, second, third = [0.0], Result(), Result(), Result()
    with DeviceClock(lambda: compiled[0]) as clock:
        jax.monitoring.record_event(GIVEN)
        clock.started(first)
        jax.monitoring.record_event(GIVEN)  # before the first has ended
        clock.started(second)
        first.ended.set()
        first.seen.wait(10)
        before = time.monotonic()
        second.ended.set()
        second.seen.wait(10)
        time.sleep(0.3)
        compiled[0] += 0.2
        jax.monitoring.record_event(GIVEN)
        most = time.monotonic() - before - 0.2
        busy = clock.busy
        time.sleep(0.3)
        compiled[0] += 0.3  # of the third, after it was given
        third.ended.set()
        clock.started(third)
        third.seen.wait(10)
    assert 0 < clock.waited <= most
    assert clock.busy - busy < 0.25, "compiling counted as work of the device"
    assert 0 < clock.share < 1
