"""UNet2DConditionModel: the one denoiser, which knows nothing of any paper.

Everything that a method changes enters through the ``controls`` argument. `sites`, `norm_sites` and `join_sites` list
what a control can reach, without parameters or a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from jaxmix.control import KV, Control, Site, apply_join, apply_kv, apply_told
from jaxmix.models.attention import Attention, Context, Transformer2DModel
from jaxmix.models.config import UNetConfig
from jaxmix.models.layers import Conv, GroupNorm, Linear, timestep_embedding, upsample_nearest
from jaxmix.types import AnyArray, Array, InputError, Params


class AddedCond(NamedTuple):
    """SDXL's conditioning besides the prompt's tokens (arXiv 2307.01952, sections 2.2 and 2.3).

    ``text_embeds`` (b, p) is the projected state of the second text encoder. ``time_ids`` (b, 6) are in pixels: the
    original height and width, the top and left of the crop, the target height and width.
    """

    text_embeds: Float[AnyArray, "b p"]
    time_ids: Num[AnyArray, "b n"]


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions around a projected timestep embedding, with a (projected) residual."""

    features: int
    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], emb: Float[Array, "b e"] | None = None, controls: Sequence[Control] = ()
    ) -> Float[Array, "b h w o"]:
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x, controls))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        if emb is not None:
            y = y + Linear(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))[:, None, None, :]
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(y, controls))
        y = Conv(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Linear(self.features, conv=True, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class Downsample2D(nn.Module):
    """Halve each side by a strided convolution."""

    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1))
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], 2, self.padding, self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbour to a given size, then convolve."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], hw: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(upsample_nearest(x, hw))


class _Block(nn.Module):
    """What the three kinds of block share: ``features``, attention of ``depth`` (0: none), norm settings."""

    features: int
    layers: int
    heads: int
    depth: int
    groups: int
    eps: float
    linear: bool
    last: bool = False
    dtype: Any = jnp.float32

    def resnet(self, i: int) -> ResnetBlock2D:
        return ResnetBlock2D(self.features, self.groups, self.eps, self.dtype, name=f"resnets.{i}")

    def attention(self, i: int) -> Transformer2DModel:
        return Transformer2DModel(self.heads, self.depth, self.groups, self.linear, self.dtype, name=f"attentions.{i}")


class DownBlock(_Block):
    """Resnets, each followed by attention if there is any, then a downsampling unless it is the last block."""

    @nn.compact
    def __call__(
        self, x: Array, emb: Array, context: Context, controls: Sequence[Control]
    ) -> tuple[Array, tuple[Array, ...]]:
        skips = []
        for i in range(self.layers):
            x = self.resnet(i)(x, emb, controls)
            if self.depth:
                x = self.attention(i)(x, context, controls)
            skips.append(x)
        if not self.last:
            x = Downsample2D(dtype=self.dtype, name="downsamplers.0")(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock(_Block):
    """Resnet, attention, resnet at the smallest resolution."""

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Context, controls: Sequence[Control]) -> Array:
        x = self.resnet(0)(x, emb, controls)
        x = self.attention(0)(x, context, controls)
        return self.resnet(1)(x, emb, controls)


class UpBlock(_Block):
    """Resnets on the features joined with the skips, then an upsampling to the next skip's size."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        skips: tuple[Array, ...],
        emb: Array,
        context: Context,
        controls: Sequence[Control],
        next_hw: Any,
    ) -> Array:
        for i in range(self.layers):
            site = Site(".".join((*self.path, f"resnets.{i}")), 0, (x.shape[1], x.shape[2]))
            x, skip = apply_join(site, x, skips[-1 - i], controls)
            x = self.resnet(i)(jnp.concatenate([x, skip], -1), emb, controls)
            if self.depth:
                x = self.attention(i)(x, context, controls)
        if not self.last:
            x = Upsample2D(self.dtype, name="upsamplers.0")(x, next_hw)
        return x


class TimestepEmbedding(nn.Module):
    """Two dense layers with SiLU between, on the sinusoidal embedding."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b f"]:
        x = Linear(self.features, dtype=self.dtype, name="linear_1")(x)
        return Linear(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


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
    ) -> Float[Array, "b h w o"]:
        """Predict (noise, or v) for latents (b, h, w, c) at timesteps ``t`` (scalar or (b,), 0-999).

        ``context`` is (b, s, d) text states, or the result of `precompute`. ``added`` is SDXL's added conditioning, or
        the result of `embed_added`. Returns float32 (b, h, w, o) of ``out_channels``. Raises `InputError` if ``added``
        is missing, not expected, or of a wrong width.
        """
        cfg = self.config
        controls = tuple(controls)
        channels, n = cfg.block_out_channels, len(cfg.block_out_channels)

        def block(kind: type[_Block], i: int, name: str, layers: int, attention: bool, last: bool = False) -> Any:
            # hw of an UpBlock is a Python value that shapes the program: static under remat.
            static_argnums = (6,) if kind is UpBlock else ()
            made = nn.remat(kind, static_argnums=static_argnums) if self.remat else kind
            return made(
                channels[i],
                layers,
                cfg.heads[i],
                cfg.depths[i] if attention else 0,
                cfg.norm_num_groups,
                cfg.norm_eps,
                cfg.use_linear_projection,
                last,
                self.dtype,
                name=name,
            )

        t = jnp.broadcast_to(jnp.asarray(t), (latents.shape[0],))
        emb = timestep_embedding(t, channels[0], flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        emb = TimestepEmbedding(4 * channels[0], self.dtype, name="time_embedding")(emb.astype(self.dtype))
        if (added is None) != (cfg.addition_embed_type is None):
            found, expected = ("none", "AddedCond") if added is None else (type(added).__name__, "none")
            raise InputError(
                f"unet: added conditioning: found {found}, expected {expected} with "
                f"addition_embed_type={cfg.addition_embed_type!r}"
            )
        if isinstance(added, AddedCond):
            features = _added_features(cfg, added).astype(self.dtype)
            added = TimestepEmbedding(4 * channels[0], self.dtype, name="add_embedding")(features)
        if added is not None:
            emb = emb + added.astype(self.dtype)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(latents)
        skips: list[Array] = [x]
        for i, kind in enumerate(cfg.down_block_types):
            down = block(DownBlock, i, f"down_blocks.{i}", cfg.layers_per_block, kind.startswith("Cross"), i == n - 1)
            x, new = down(x, emb, context, controls)
            skips += new
        x = block(MidBlock, n - 1, "mid_block", 1, True)(x, emb, context, controls)
        for i, kind in enumerate(cfg.up_block_types):
            layers = cfg.layers_per_block + 1
            up = block(UpBlock, n - 1 - i, f"up_blocks.{i}", layers, kind.startswith("Cross"), i == n - 1)
            mine, skips = tuple(skips[-layers:]), skips[:-layers]
            next_hw = None if i == n - 1 else skips[-1].shape[1:3]
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
        out = {}
        for site in sites(self.config, latent_hw):
            if site.name.endswith(".attn2"):
                p = subtree(params, site.name)
                layer = Attention(site.heads, p["to_k"]["kernel"].shape[-1], self.dtype, parent=None)
                kv = layer.apply({"params": p}, apply_told(site, context, controls), method="kv")
                out[site.name] = apply_kv(site, kv, controls)
        return out

    @nn.nowrap
    def embed_added(self, params: Params, added: AddedCond) -> Float[Array, "b e"]:
        """Embed the added conditioning of SDXL.

        Like `precompute`, this does not depend on the timestep: `__call__` takes the result in place of ``added``.
        Raises `InputError` if this model takes no added conditioning, or one of another width.
        """
        features = _added_features(self.config, added).astype(self.dtype)
        layer = TimestepEmbedding(4 * self.config.block_out_channels[0], self.dtype, parent=None)
        return layer.apply({"params": params["add_embedding"]}, features)

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters."""
        size = self.config.sample_size
        h, w = size if isinstance(size, tuple) else (size, size)
        cfg = self.config

        def init(key: Array) -> Params:
            latents = jnp.zeros((1, h, w, cfg.in_channels))
            context = jnp.zeros((1, 1, cfg.cross_attention_dim))
            added = None
            if cfg.addition_embed_type is not None:
                # The config does not say how the width is split between text and numbers, which does not matter here.
                added = AddedCond(jnp.zeros((1, cfg.projection_class_embeddings_input_dim)), jnp.zeros((1, 0)))
            return self.clone(remat=False).init(key, latents, 0, context, (), added)["params"]

        return jax.jit(init)(key)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))


def _added_features(cfg: UNetConfig, added: AddedCond) -> Float[Array, "b f"]:
    """Join the text embedding with the sinusoids of the numbers, float32."""
    if cfg.addition_embed_type is None or cfg.addition_time_embed_dim is None:
        raise InputError(f"unet: added conditioning: found {type(added).__name__}, expected none for this model")
    b, n = added.time_ids.shape
    sinusoids = timestep_embedding(
        jnp.ravel(added.time_ids),
        cfg.addition_time_embed_dim,
        flip_sin_to_cos=cfg.flip_sin_to_cos,
        freq_shift=cfg.freq_shift,
    )
    out = jnp.concatenate([added.text_embeds, sinusoids.reshape(b, n * cfg.addition_time_embed_dim)], -1)
    if out.shape[-1] != cfg.projection_class_embeddings_input_dim:
        raise InputError(
            f"unet: added conditioning: found {added.text_embeds.shape[-1]} text features and {n} numbers of "
            f"{cfg.addition_time_embed_dim}, expected {cfg.projection_class_embeddings_input_dim} in total"
        )
    return out


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


def _blocks(cfg: UNetConfig, hw: tuple[int, int]) -> Iterator[tuple[str, int, int, tuple[int, int], bool]]:
    """Yield (name, index into the per-block settings, layers, hw, has attention) of each block as it is run."""
    grid = [hw]
    for _ in cfg.block_out_channels[1:]:
        grid.append(_halve(grid[-1]))
    n = len(grid)
    for i, kind in enumerate(cfg.down_block_types):
        yield f"down_blocks.{i}", i, cfg.layers_per_block, grid[i], kind.startswith("Cross")
    yield "mid_block", n - 1, 1, grid[-1], True
    for i, kind in enumerate(cfg.up_block_types):
        yield f"up_blocks.{i}", n - 1 - i, cfg.layers_per_block + 1, grid[n - 1 - i], kind.startswith("Cross")


def sites(cfg: UNetConfig, latent_hw: tuple[int, int]) -> tuple[Site, ...]:
    """List the attention sites of a UNet, in the order in which they run, for latents of size ``latent_hw``."""
    return tuple(
        Site(f"{name}.attentions.{j}.transformer_blocks.{k}.{kind}", cfg.heads[i], hw)
        for name, i, layers, hw, attention in _blocks(cfg, latent_hw)
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
