"""UNet2DConditionModel: the one denoiser, which knows nothing of any paper.

Everything that a method changes enters through the ``controls`` argument. `sites`, `norm_sites` and `join_sites` list
what a control can reach, without parameters or a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxmix.control import KV, Control, Site, apply_kv, apply_told
from jaxmix.models.attention import Attention, Context
from jaxmix.models.blocks import AddedCond, TimestepEmbedding, UpBlock, added_features, block, go_down
from jaxmix.models.config import DownConfig, UNetConfig
from jaxmix.models.layers import Conv, GroupNorm
from jaxmix.types import AnyArray, Array, InputError, Params


class UNet2DConditionModel(nn.Module):
    """The denoising UNet of Stable Diffusion (arXiv 2112.10752), NHWC, parameters under diffusers' names.

    ``dtype`` is the type of computation; norm statistics, softmax and the timestep embedding stay float32.
    ``remat`` recomputes each block in the backward pass instead of keeping its activations.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Float[AnyArray, "b h w c"],
        t: ArrayLike,
        context: Context,
        controls: Sequence[Control] = (),
        added: AddedCond | Float[AnyArray, "b e"] | None = None,
        timestep_cond: Float[AnyArray, "b g"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Predict (noise, or v) for latents (b, h, w, c) at timesteps ``t`` (scalar or (b,), 0-999).

        ``context`` is (b, s, d) text states, or the result of `precompute`. ``added`` is SDXL's added conditioning, or
        the result of `embed_added`. ``timestep_cond`` is the guidance that a latent consistency model takes
        (`guidance_embedding`), zeros if None. Returns float32 (b, h, w, o) of ``out_channels``. Raises `InputError` if
        ``added`` or ``timestep_cond`` are missing, not expected, or of a wrong width.
        """
        cfg, controls = self.config, tuple(controls)
        n = len(cfg.block_out_channels)
        how: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat}
        width, found = cfg.time_cond_proj_dim, None if timestep_cond is None else timestep_cond.shape[-1]
        if found not in (None, width):
            raise InputError(f"unet: timestep_cond: found {found} channels, expected {width or 'none'} with this model")
        if width is not None and timestep_cond is None:
            timestep_cond = jnp.zeros((latents.shape[0], width))
        cond = None if timestep_cond is None else jnp.asarray(timestep_cond)
        emb, x, skips = go_down(cfg, latents, t, context, controls, added, timestep_cond=cond, **how)
        for i, kind in enumerate(cfg.up_block_types):
            layers = cfg.layers_per_block + 1
            attention, last = kind.startswith("Cross"), i == n - 1
            up = block(cfg, UpBlock, n - 1 - i, f"up_blocks.{i}", layers, attention, last, **how)
            mine, skips = skips[-layers:], skips[:-layers]
            next_hw = None if last else skips[-1].shape[1:3]
            x = up(x, mine, emb, context, controls, next_hw)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.dtype, name="conv_norm_out")(x, controls))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    @nn.nowrap
    def precompute(
        self,
        params: Params,
        context: Float[AnyArray, "b s d"],
        latent_hw: tuple[int, int],
        controls: Sequence[Control] = (),
    ) -> dict[str, KV]:
        """Project a context to the keys and values of every attn2, with the told and kv stages of the controls applied.

        Neither depends on the timestep, so the sampler calls this once outside its loop and passes the result to
        `__call__` in place of the context.
        """
        return keys_and_values(sites(self.config, latent_hw), params, context, self.dtype, controls)

    @nn.nowrap
    def embed_added(self, params: Params, added: AddedCond) -> Float[Array, "b e"]:
        """Embed the added conditioning of SDXL.

        Like `precompute`, this does not depend on the timestep: `__call__` takes the result in place of ``added``.
        Raises `InputError` if this model takes no added conditioning, or one of another width.
        """
        return embed_added(self.config, params, added, self.dtype)

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters."""
        size = self.config.sample_size
        hw = size if isinstance(size, tuple) else (size, size)

        def init(key: Array) -> Params:
            latents, t, context, added = blank_inputs(self.config, hw)
            return self.clone(remat=False).init(key, latents, t, context, (), added)["params"]

        return jax.jit(init)(key)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))


def keys_and_values(
    sites: Iterable[Site],
    params: Params,
    context: Float[AnyArray, "b s d"],
    dtype: Any,
    controls: Sequence[Control] = (),
) -> dict[str, KV]:
    """Return the keys and values of a context at every attn2 among ``sites``; see `UNet2DConditionModel.precompute`."""
    out = {}
    for site in sites:
        if site.name.endswith(".attn2"):
            p = subtree(params, site.name)
            layer = Attention(site.heads, p["to_k"]["kernel"].shape[-1], dtype, parent=None)
            kv = layer.apply({"params": p}, apply_told(site, context, controls), method="kv")
            out[site.name] = apply_kv(site, kv, controls)
    return out


def embed_added(cfg: DownConfig, params: Params, added: AddedCond, dtype: Any) -> Float[Array, "b e"]:
    """Return what ``add_embedding`` makes of added conditioning; see `UNet2DConditionModel.embed_added`."""
    features = added_features(cfg, added).astype(dtype)
    layer = TimestepEmbedding(4 * cfg.block_out_channels[0], dtype, parent=None)
    return layer.apply({"params": params["add_embedding"]}, features)


def guidance_embedding(cfg: UNetConfig, scale: Float[AnyArray, " b"]) -> Float[Array, "b g"]:
    """Return what a latent consistency model is told of guidance scales: sinusoids of w = scale - 1 (arXiv 2310.04378).

    The paper's scale is w, that of classifier-free guidance w + 1. A model without it raises `InputError`.
    """
    if cfg.time_cond_proj_dim is None:
        raise InputError("unet: guidance: found a scale to embed, expected none: time_cond_proj_dim is None")
    half = cfg.time_cond_proj_dim // 2
    # Angles of thousands of radians: the last bit of a frequency shows, so they are rounded where diffusers does.
    rate = np.log(np.float32(10000)) / np.float32(max(half - 1, 1))
    freqs = np.exp((np.arange(half, dtype=np.float32) * -rate).astype(np.float64)).astype(np.float32)
    angles = 1000.0 * (jnp.asarray(scale, jnp.float32) - 1)[:, None] * freqs
    out = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(out, ((0, 0), (0, cfg.time_cond_proj_dim % 2)))


def blank_inputs(cfg: DownConfig, hw: tuple[int, int]) -> tuple[Any, ...]:
    """Return zeros to initialise a model with: latents of size ``hw``, a timestep, a context, added conditioning."""
    added = None
    if cfg.addition_embed_type is not None:
        # The config does not say how the width is split between text and numbers, which does not matter here.
        added = AddedCond(jnp.zeros((1, cfg.projection_class_embeddings_input_dim)), jnp.zeros((1, 0)))
    return jnp.zeros((1, *hw, cfg.in_channels)), 0, jnp.zeros((1, 1, cfg.cross_attention_dim)), added


def subtree(params: Params, name: str) -> Params:
    """Return the parameters of the module with a dotted diffusers name.

    Raises KeyError if there is none. Names of modules may contain dots themselves ("down_blocks.0"), so the longest
    matching key is taken at each level.
    """
    node, rest = params, name
    while rest:
        key = max((k for k in node if rest == k or rest.startswith(k + ".")), key=len, default=None)
        if key is None:
            raise KeyError(f"no module {name!r} in the parameters")
        node, rest = node[key], rest[len(key) + 1 :]
    return node


def _halve(hw: tuple[int, int]) -> tuple[int, int]:
    return ((hw[0] + 1) // 2, (hw[1] + 1) // 2)


_Run = tuple[str, int, int, tuple[int, int], bool]
"""A block as it is run: its name, its index into the per-block settings, its layers, its grid, has it attention."""


def _grids(cfg: DownConfig, hw: tuple[int, int]) -> list[tuple[int, int]]:
    grid = [hw]
    for _ in cfg.block_out_channels[1:]:
        grid.append(_halve(grid[-1]))
    return grid


def _down(cfg: DownConfig, hw: tuple[int, int]) -> Iterator[_Run]:
    grid = _grids(cfg, hw)
    for i, kind in enumerate(cfg.down_block_types):
        yield f"down_blocks.{i}", i, cfg.layers_per_block, grid[i], kind.startswith("Cross")
    yield "mid_block", len(grid) - 1, 1, grid[-1], cfg.mid_attention


def _blocks(cfg: UNetConfig, hw: tuple[int, int]) -> Iterator[_Run]:
    yield from _down(cfg, hw)
    grid = _grids(cfg, hw)
    for i, kind in enumerate(cfg.up_block_types):
        yield f"up_blocks.{i}", len(grid) - 1 - i, cfg.layers_per_block + 1, grid[-1 - i], kind.startswith("Cross")


def sites(cfg: UNetConfig, latent_hw: tuple[int, int]) -> tuple[Site, ...]:
    """List the attention sites of a UNet, in the order in which they run, for latents of size ``latent_hw``."""
    return _attention(cfg, _blocks(cfg, latent_hw))


def down_sites(cfg: DownConfig, latent_hw: tuple[int, int]) -> tuple[Site, ...]:
    """List the attention sites of the way down alone, as `sites` does."""
    return _attention(cfg, _down(cfg, latent_hw))


def _attention(cfg: DownConfig, blocks: Iterable[_Run]) -> tuple[Site, ...]:
    return tuple(
        Site(f"{name}.attentions.{j}.transformer_blocks.{k}.{kind}", cfg.heads[i], hw)
        for name, i, layers, hw, attention in blocks
        if attention
        for j in range(layers)
        for k in range(cfg.depths[i])
        for kind in ("attn1", "attn2")
    )


def norm_sites(cfg: UNetConfig, latent_hw: tuple[int, int]) -> tuple[Site, ...]:
    """List the GroupNorm sites of a UNet, block by block."""
    out = []
    for name, _, layers, hw, attention in _blocks(cfg, latent_hw):
        resnets = 2 if name == "mid_block" else layers
        out += [Site(f"{name}.resnets.{j}.norm{k}", 0, hw) for j in range(resnets) for k in (1, 2)]
        out += [Site(f"{name}.attentions.{j}.norm", 0, hw) for j in range(layers) if attention]
    return (*out, Site("conv_norm_out", 0, latent_hw))


def join_sites(cfg: UNetConfig, latent_hw: tuple[int, int]) -> tuple[Site, ...]:
    """List the resnets of the up blocks, in the order in which they run: where features and skips are joined."""
    return tuple(
        Site(f"{name}.resnets.{j}", 0, hw)
        for name, _, layers, hw, _ in _blocks(cfg, latent_hw)
        if name.startswith("up_blocks.")
        for j in range(layers)
    )


def up_blocks(names: Sequence[str]) -> list[str]:
    """Return the up blocks that hold the named sites, in the order in which they run."""
    return sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("up_blocks.")})
