"""MagicFusion: Boosting Text-to-Image Generation Performance by Fusing Diffusion Models (arXiv 2303.13126).

Saliency-aware noise blending of a general model g and an expert e, which may be one model with two prompts. At each
step and pixel the noise is that of the model whose saliency there is a larger share of its total::

    G_g = |s (c_g - u_g)|,  G_e = |s (c_e - u_g)|,  S_x = mean over channels of blur(G_x)
    eps = eps_e where softmax(k_e S_e) > softmax(k_g S_g), else eps_g        (softmax over the pixels)

As in the authors' code the expert's saliency is taken against the *general* model's unconditional prediction (the
paper's uses its own: ``own_uncond``), s is inside the saliency, and k is an inverse temperature: a larger k shrinks its
own model's share of the picture. Logarithms are compared, so that nothing underflows; ``underflow`` is the code's
softmax, in which pixels far below the peak tie at zero and go to the general model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxmix.rows import dataclass, per_row, static
from jaxmix.samplers.composable import Composed
from jaxmix.samplers.guidance import Branches, ClassifierFree, Guidance, guide
from jaxmix.samplers.loop import Solver, level
from jaxmix.types import Array, ModelFn

_WINDOW = 4  # of the average; it is even, so the map loses a row and a column and is resized back


def saliency(difference: Float[Array, "n h w c"]) -> Float[Array, "n h w"]:
    """Return the blurred magnitude of guidance, averaged over channels.

    It is blurred by a 4 x 4 average that counts zeros around the image, to (h - 1, w - 1), and resized bilinearly.
    """
    n, h, w, c = difference.shape
    window = (1, _WINDOW, _WINDOW, 1)
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    total = jax.lax.reduce_window(jnp.abs(difference), 0.0, jax.lax.add, window, (1, 1, 1, 1), pads)
    return jax.image.resize(total / _WINDOW**2, (n, h, w, c), "bilinear").mean(-1)


def expert_mask(
    general: Float[Array, "n h w"],
    expert: Float[Array, "n h w"],
    k_general: Float[Array, " n"],
    k_expert: Float[Array, " n"],
    underflow: bool = False,
) -> Bool[Array, "n h w"]:
    """Return where the expert's share of its saliency exceeds the general model's, which wins ties."""

    def share(s: Array, k: Array) -> Array:
        flat = (k[:, None, None] * s).reshape(s.shape[0], -1)
        return (jax.nn.softmax if underflow else jax.nn.log_softmax)(flat, axis=-1).reshape(s.shape)

    return share(expert, k_expert) > share(general, k_general)


def blend(
    general: Float[Array, "n 2 h w c"],
    expert: Float[Array, "n 2 h w c"],
    scale: Float[Array, " n"],
    k_general: Float[Array, " n"],
    k_expert: Float[Array, " n"],
    strength: Float[Array, " n"],
    *,
    per_eps: Array | float = 1.0,
    own_uncond: bool = False,
    underflow: bool = False,
) -> Float[Array, "n h w c"]:
    """Blend the (unconditional, conditional) predictions of two models, float32.

    ``per_eps`` times a difference of predictions is one of eps: 1, or sqrt(abar) for v. ``strength`` 0 is the general
    model's own guided prediction, bit for bit; anything above lets the expert in where it wins. A scale of at most 1 is
    1 (`jaxmix.samplers.guidance.guide`).
    """
    scale_ = jnp.maximum(scale, 1.0)[:, None, None, None]
    (u_g, c_g), (u_e, c_e) = ((x[:, 0], x[:, 1]) for x in (general, expert))
    g, e = guide(u_g, c_g, scale), guide(u_e, c_e, scale)
    s_g = saliency(scale_ * per_eps * (c_g - u_g))
    s_e = saliency(scale_ * per_eps * (c_e - (u_e if own_uncond else u_g)))
    mask = expert_mask(s_g, s_e, k_general, k_expert, underflow) & (strength > 0)[:, None, None]
    return jnp.where(mask[..., None], e, g)


@dataclass
class SaliencyBlend(Guidance):
    """MagicFusion's rule for a batch; outside its window the general model draws alone, by ``base``.

    ``expert`` is the second denoiser, or None for another prompt of the same one, in branch ``branch``. ``k_general``,
    ``k_expert`` and ``strength`` (n,) are as in `blend`; if no image is to be blended, the step runs ``base``.
    """

    k_general: Float[Array, " n"] = per_row()
    k_expert: Float[Array, " n"] = per_row()
    strength: Float[Array, " n"] = per_row()
    expert: Any = None
    base: ClassifierFree | Composed | None = None
    branch: int = static(default=2)
    own_uncond: bool = static(default=False)
    underflow: bool = static(default=False)

    over: ClassVar[frozenset[str]] = frozenset({"ClassifierFree", "Composed"})

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the blended prediction, or exactly the general model's if no image is to be blended."""
        assert self.base is not None, "stack() the guidances first"
        scale, guided = self.base.scale, self.base(model, solver, hw)
        model = self.base.see(model)
        if self.expert is None:
            three = model.branches((0, 1, self.branch), hw)
        else:
            first, second = model.branches((0, 1), hw), self.expert.branches((0, 1), hw)

        def pairs(x: Array, t: Array, step: Array) -> tuple[Array, Array]:
            if self.expert is not None:
                return first(x, t, step), second(x, t, step)
            rows = three(x, t, step)
            return rows[:, :2], rows[:, jnp.asarray([0, 2])]

        def predict(x: Array, t: Array, step: Array) -> Array:
            signal, sigma = level(solver, step, t)
            per_eps = {"epsilon": jnp.ones(()), "v_prediction": signal, "sample": signal / sigma}
            return blend(
                *pairs(x, t, step),
                scale,
                self.k_general,
                self.k_expert,
                self.strength,
                per_eps=per_eps[solver.prediction_type],
                own_uncond=self.own_uncond,
                underflow=self.underflow,
            )

        return lambda x, t, step: jax.lax.cond(jnp.any(self.strength > 0), predict, guided, x, t, step)
