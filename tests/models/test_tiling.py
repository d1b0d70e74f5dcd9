"""Tiled decoding: equal to plain decoding where a decoder is local, without seams, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxmix
from jaxmix import InputError
from jaxmix.models import AutoencoderKL, VAEConfig, decode_tiled
from jaxmix.models.layers import upsample_nearest

FACTOR = 2


def local_decode(z):
    """Decode one cell at a time."""
    return upsample_nearest(jnp.sin(3 * z[..., :3]), (FACTOR * z.shape[1], FACTOR * z.shape[2]))


def convolving_decode(z):
    """Decode with one pixel of context on each side, and zeros beyond the border, as convolutions do."""
    x = local_decode(z)
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 3, 3)), jnp.float32)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def mean_decode(z):
    """Decode into one statistic of the whole input."""
    return jnp.broadcast_to(
        z.mean((1, 2), keepdims=True)[..., :3], (z.shape[0], FACTOR * z.shape[1], FACTOR * z.shape[2], 3)
    )


def latents(h, w, b=2):
    return jnp.asarray(np.random.default_rng(1).standard_normal((b, h, w, 4)), jnp.float32)


@pytest.mark.parametrize("hw", [(8, 8), (5, 8), (3, 4)])
def test_an_image_of_one_tile_is_decoded_as_it_is(hw):
    z = latents(*hw)
    np.testing.assert_array_equal(decode_tiled(convolving_decode, z, 8, 2), convolving_decode(z))


@pytest.mark.parametrize(("hw", "overlap"), [((8, 21), 0), ((21, 8), 1), ((17, 30), 3), ((9, 9), 2)])
def test_a_decoder_that_sees_one_cell_gives_the_same_image_in_tiles(hw, overlap):
    z = latents(*hw)
    np.testing.assert_allclose(decode_tiled(local_decode, z, 8, overlap), local_decode(z), rtol=0, atol=1e-6)


def test_three_tiles_over_one_pixel_still_add_up_to_one():
    z = latents(8, 13)  # starts 0, 1, ... 5
    np.testing.assert_allclose(decode_tiled(local_decode, z, 8, 7), local_decode(z), rtol=0, atol=1e-6)


def test_a_convolving_decoder_differs_only_at_the_edges_of_tiles():
    z = latents(20, 20)  # tiles start at 0, 6, 12: their edges within the image are at 6, 8, 12, 14
    tiled, plain = decode_tiled(convolving_decode, z, 8, 2), convolving_decode(z)
    at_edge = np.zeros(20 * FACTOR, bool)
    for cell in (6, 8, 12, 14):
        at_edge[cell * FACTOR - 1 : cell * FACTOR + 1] = True
    inside = ~(at_edge[:, None] | at_edge[None, :])
    error = np.abs(np.asarray(tiled - plain)).max((0, 3))
    assert error[inside].max() < 1e-5
    # The pixel at the very edge has a quarter of the weight of a tile's inside over an overlap of four pixels.
    assert 0.1 < error[~inside].max() < 0.5 * float(jnp.abs(plain).max())


def test_a_difference_between_tiles_fades_over_the_overlap():
    z = jnp.concatenate([jnp.zeros((1, 8, 12, 4)), jnp.ones((1, 8, 2, 4))], 2)  # tiles of means 0 and 1/4
    row = np.asarray(decode_tiled(mean_decode, z, 8, 2)[0, 0, :, 0])
    shared = slice(6 * FACTOR, 8 * FACTOR)
    np.testing.assert_allclose(row[shared], (np.arange(4) + 0.5) / 16, atol=1e-6)
    assert np.ptp(row[: shared.start]) == 0 and np.abs(np.diff(row)).max() < 0.25 / 3


def peak(fn, *args):
    """Return bytes of temporaries of the compiled function."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_tiles_need_less_memory():
    config = VAEConfig(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(config)

    def decode(params, z):
        return vae.apply({"params": params}, z, method="decode")

    args = vae.abstract_params(), jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    assert peak(lambda p, z: decode_tiled(lambda z: decode(p, z), z, 16, 4), *args) < 0.25 * peak(decode, *args)


def test_putting_many_tiles_together_takes_a_few_images_of_memory():
    z = jax.ShapeDtypeStruct((1, 256, 256, 4), jnp.float32)  # 25 tiles
    image = 4 * 3 * (256 * FACTOR) ** 2
    assert peak(lambda z: decode_tiled(local_decode, z, 64, 8), z) < 4 * image


def test_rows_on_several_devices_are_decoded_in_tiles():
    mesh = jaxmix.data_mesh(2)
    z = latents(9, 12, b=2)
    run = jax.shard_map(
        lambda z: decode_tiled(convolving_decode, z, 8, 2),
        mesh=mesh,
        in_specs=PartitionSpec(mesh.axis_names[0]),
        out_specs=PartitionSpec(mesh.axis_names[0]),
    )
    np.testing.assert_allclose(jax.jit(run)(z), decode_tiled(convolving_decode, z, 8, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_an_overlap_that_is_no_part_of_a_tile_is_refused(tile, overlap):
    with pytest.raises(InputError, match="expected 0 <= overlap < tile"):
        decode_tiled(local_decode, latents(9, 9), tile, overlap)
