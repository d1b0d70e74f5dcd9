import numpy as np
import pytest

from jaxmix.types import InputError
from tests.data.made import picture
from train.data.buckets import PictureConfig, bucket_sizes, choose_bucket, crop_to_bucket

SDXL = PictureConfig(resolution=1024, enable_bucket=True, min_bucket_reso=512)


def test_sdxl_buckets_are_whole_steps_of_at_most_the_area():
    sizes = bucket_sizes(SDXL)
    assert {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (640, 1600), (512, 2048)} <= set(sizes)
    assert len(sizes) == len(set(sizes)) == 17
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024**2
        assert 512 <= min(height, width) <= max(height, width) <= 2048
        assert (width, height) in sizes


def test_without_buckets_there_is_one_square():
    assert bucket_sizes(PictureConfig(resolution=40)) == [(40, 40)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((3000, 3000), (1024, 1024)),
        ((1000, 1500), (832, 1216)),  # 2:3
        ((1920, 1080), (1344, 768)),  # 16:9
        ((100, 900), (512, 2048)),
        ((30, 30), (1024, 1024)),
    ],
)
def test_a_picture_gets_the_nearest_aspect_ratio(size, bucket):
    assert choose_bucket(size, bucket_sizes(SDXL), SDXL) == bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((3000, 3000), (1024, 1024)),
        ((700, 500), (640, 448)),  # its own size, in whole steps
        ((1000, 1030), (960, 1024)),  # the square would be larger than it in one direction
        ((30, 700), (64, 640)),  # enlarged to a step
    ],
)
def test_without_upscaling_a_small_picture_keeps_its_size(size, bucket):
    cfg = PictureConfig(resolution=1024, enable_bucket=True, min_bucket_reso=512, bucket_no_upscale=True)
    assert choose_bucket(size, bucket_sizes(cfg), cfg) == bucket


def test_fitting_keeps_the_shape_and_tells_sizes_and_crop():
    image, time_ids = crop_to_bucket(picture(0, (30, 60)), (20, 20), (0.5, 0.5), False)
    assert image.shape == (20, 20, 3)
    assert image.dtype == np.uint8
    assert time_ids.tolist() == [30, 60, 0, 10, 20, 20]  # scaled to 20 x 40
    assert time_ids.dtype == np.float32
    for at, left in [(0.0, 0), (1.0, 20), (0.999, 20)]:
        assert crop_to_bucket(picture(0, (30, 60)), (20, 20), (at, at), False)[1].tolist() == [30, 60, 0, left, 20, 20]


def test_a_picture_of_the_buckets_size_is_not_touched():
    image, time_ids = crop_to_bucket(picture(3, (16, 24)), (16, 24), (0.3, 0.9), False)
    np.testing.assert_array_equal(image, picture(3, (16, 24)))
    assert time_ids.tolist() == [16, 24, 0, 0, 16, 24]


def test_a_mirrored_picture_is_cut_where_the_crop_says():
    source = picture(0, (10, 30))
    image, time_ids = crop_to_bucket(source, (10, 10), (0.0, 0.0), True)
    np.testing.assert_array_equal(image, source[:, :-11:-1])
    assert time_ids.tolist() == [10, 30, 0, 0, 10, 10]


@pytest.mark.parametrize("size", [(7, 1000), (33, 17), (1, 1)])
def test_any_picture_fits_any_bucket(size):
    for bucket in [(16, 16), (24, 8)]:
        for at in [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]:
            assert crop_to_bucket(picture(0, size), bucket, at, False)[0].shape == (*bucket, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 0}, "resolution: found 0, expected 1 or more"),
        ({"max_bad_rows": -1}, "max_bad_rows: found -1"),
        ({"enable_bucket": True, "min_bucket_reso": 100}, "min_bucket_reso: found 100, expected a multiple of"),
        ({"enable_bucket": True, "resolution": 128}, "resolution: found 128, expected min_bucket_reso to"),
    ],
)
def test_sizes_that_no_bucket_can_have_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        PictureConfig(**changes)
