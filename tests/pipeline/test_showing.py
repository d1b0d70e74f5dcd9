"""What is shown while images are drawn: steps, previews, bars; and several images of a prompt."""

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix import InputError, Preview, StyleAligned
from jaxmix.pipeline import previews, showing
from jaxmix.pipeline.job import denoise

PROMPTS, SEEDS, STEPS = ["a cat", "a dog", "a car"], [5, 6, 7], 3


def draw(pipe, **options):
    return pipe.generate(PROMPTS, SEEDS, STEPS, 3.0, **{"output": "latent", **options})


@pytest.fixture(scope="module")
def plain(tiny_pipeline):
    return draw(tiny_pipeline)


def test_a_callback_sees_the_latents_of_every_step_and_changes_nothing(tiny_pipeline, plain):
    seen = []
    watched = draw(tiny_pipeline, callback=lambda step, x: seen.append((step, x)))
    np.testing.assert_array_equal(watched, plain)
    assert [step for step, _ in seen] == [0, 1, 2] and all(step.steps == STEPS for step, _ in seen)
    np.testing.assert_array_equal(seen[-1][1], plain)
    for step, latents in seen[:-1]:
        part = tiny_pipeline.draw(
            jaxmix.Request(prompts=PROMPTS, seeds=SEEDS, steps=STEPS, guidance_scale=3.0, span=(0, step + 1)),
            output="latent",
        )
        np.testing.assert_allclose(latents, part, atol=1e-5)


def test_nobody_is_told_twice_and_another_callback_is_the_same_program(tiny_pipeline):
    counts = [0, 0]

    def count(k):
        def told(step, x):
            counts[k] += 1

        return told

    draw(tiny_pipeline, callback=count(0))
    programs = denoise._cache_size()
    draw(tiny_pipeline, callback=count(1))
    assert counts == [STEPS, STEPS] and denoise._cache_size() == programs and not showing._watchers
    draw(tiny_pipeline)
    assert counts == [STEPS, STEPS]


def test_batches_and_devices_tell_of_their_images_in_order(tiny_pipeline, plain):
    seen = {}
    told = lambda step, x: seen.setdefault(int(step), []).append((list(step.images), x))  # noqa: E731
    made = draw(tiny_pipeline, callback=told, mesh=jaxmix.data_mesh(2), batch_size=2)
    assert [images for images, _ in seen[2]] == [[0, 1], [2]]
    np.testing.assert_array_equal(np.concatenate([x for _, x in seen[2]]), made)
    np.testing.assert_allclose(made, plain, atol=1e-4)


def test_a_preview_shows_what_the_model_takes_for_the_image(tiny_pipeline, plain):
    seen = []
    preview = Preview(lambda step, images: seen.append((int(step), images)), every=2)
    np.testing.assert_array_equal(draw(tiny_pipeline, callback=preview), plain)
    assert [step for step, _ in seen] == [1, 2]  # every second step, and the last
    assert all(x.dtype == np.uint8 and x.shape == (3, *plain.shape[1:3], 3) for _, x in seen)
    # The last step of DDIM ends next to what the model takes for the image, which is not the noisy state.
    last, end = seen[-1][1].astype(int), tiny_pipeline.preview(plain).astype(int)
    noisy = tiny_pipeline.preview(tiny_pipeline.initial_latents(SEEDS))
    assert np.abs(last - end).mean() < 1 < np.abs(seen[0][1].astype(int) - noisy).mean()


def test_what_a_callback_raises_comes_out_and_leaves_nothing_behind(tiny_pipeline, plain):
    seen = []

    def stop(step, x):
        seen.append(int(step))
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        draw(tiny_pipeline, callback=stop)
    assert seen == [0] and not showing._watchers
    np.testing.assert_array_equal(draw(tiny_pipeline), plain)


def test_maps_are_those_of_known_autoencoders_and_fitted_for_others(tiny_pipeline):
    mini = jaxmix.load("mini")
    assert previews.known_map(mini.vae.config) is not None and previews.known_map(tiny_pipeline.vae.config) is None
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((8, 4, 4, 4)).astype("f4").repeat(4, 1).repeat(4, 2)
    real = mini.decode(drawn).reshape(8, 4, 16, 4, 16, 3).mean((2, 4))
    small = previews.preview(previews.fit_map(mini), drawn)[:, ::4, ::4].astype(float)
    left = np.square(small - real).sum() / np.square(real - real.mean((0, 1, 2))).sum()
    assert left < 0.3, "the fitted map explains most of the colours of what it was not fitted on"
    black = previews.preview(previews.fit_map(mini), np.full((1, 2, 2, 4), np.nan))
    assert black.shape == (1, 2, 2, 3) and not black.any()
    with pytest.raises(InputError, match=r"latents: found shape \(2, 2, 4\), expected \(n, h, w, 4\)"):
        mini.preview(np.zeros((2, 2, 4)))


def test_several_images_of_a_prompt_are_those_of_their_seeds(tiny_pipeline):
    def several(seeds, k, **options):
        return tiny_pipeline.generate(["a cat", "a dog"], seeds, STEPS, num_images=k, output="latent", **options)

    listed = tiny_pipeline.generate(["a cat"] * 2 + ["a dog"] * 2, [9, 10, 3, 4], STEPS, output="latent")
    np.testing.assert_array_equal(several([9, 3], 2), listed)
    counted = tiny_pipeline.generate(["a cat"] * 2 + ["a dog"] * 2, range(4), STEPS, output="latent")
    np.testing.assert_array_equal(several(None, 2), counted)
    np.testing.assert_array_equal(several(0, 2), counted)
    made = tiny_pipeline.generate("a cat", 9, STEPS, num_images=2, output="pil")
    assert [type(x) for x in made] == [Image.Image] * 2
    np.testing.assert_array_equal(np.asarray(made[1]), tiny_pipeline.generate("a cat", 10, STEPS)[0])
    with pytest.raises(InputError, match="num_images: found 2 with StyleAligned, which draws images in groups"):
        several(None, 2, methods=(StyleAligned(),))
    with pytest.raises(InputError, match="seed of row 1: found 18446744073709551616"):
        several([2**64 - 1, 0], 2)


def test_a_bar_is_there_for_those_who_look(tiny_pipeline, capsys, monkeypatch):
    monkeypatch.setattr("jaxmix.command._given", [])  # whatever commands were run in this process before
    told = []
    draw(tiny_pipeline, progress=lambda done, n: told.append((done, n)), batch_size=2)
    assert told == [(2, 3), (3, 3)]
    draw(tiny_pipeline)
    assert not capsys.readouterr().err
    draw(tiny_pipeline, progress=True)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    draw(tiny_pipeline)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setattr("jaxmix.command._given", ["python", "-m", "infer.generate"])
    draw(tiny_pipeline)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"callback": 3}, r"callback: found 3, expected a function \(step, latents\), or Preview"),
        ({"progress": "yes"}, "progress: found 'yes', expected true, false or a function"),
        ({"num_images": 0}, "num_images: found 0, expected a whole number of at least 1"),
        ({"output": "png"}, "output: found 'png', expected one of uint8, float, latent, pil, device"),
    ],
)
def test_a_mistake_is_one_line_before_anything_compiles(tiny_pipeline, options, words):
    before = denoise._cache_size()
    with pytest.raises(InputError, match=words):
        draw(tiny_pipeline, **options)
    with pytest.raises(InputError, match="Preview: every: found 0"):
        Preview(print, every=0)
    assert denoise._cache_size() == before


def test_a_run_that_nobody_watches_has_no_call_of_the_host(tiny_pipeline):
    request = tiny_pipeline.check(jaxmix.Request(prompts=PROMPTS, steps=STEPS))
    solver = jaxmix.samplers.make_solver("ddim", tiny_pipeline.schedule, STEPS)
    job = tiny_pipeline.job(request, solver)
    watch = showing.Watch(1, False)
    said = {w: str(jax.make_jaxpr(lambda job, w=w: denoise(job, solver, 0, None, None, w))(job)) for w in (None, watch)}
    assert "callback" not in said[None] and "io_callback" in said[watch]
