"""Methods in one run: which pairs work, which exclude each other, and what strength 0 leaves.

All that go together are drawn by one program, a pair being two strengths of it that are not 0: compiling a program for
each pair would cost minutes and say less.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import (
    ComposableDiffusion,
    DenseDiffusion,
    InputError,
    InstantStylePlus,
    MagicFusion,
    PaintWithWords,
    Segment,
    StructuredDiffusion,
    StyleAligned,
    StyleID,
)
from jaxmix.controls import ip_adapter
from jaxmix.methods.ip_adapter import Embeddings
from jaxmix.methods.style_id import style_id_sites
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel, ControlNetConfig, ControlNetModel
from jaxmix.models.unet import subtree
from jaxmix.pipeline.blocks import attn2_names
from jaxmix.pipeline.job import denoise
from jaxmix.testing import moved, random_params
from jaxmix.tuning import lora
from tests.methods.test_ip_adapter import VISION as PROJECTING
from tests.methods.test_ip_adapter import random_adapter
from tests.methods.test_style_adapter import VISION

README = Path(__file__).parents[2] / "jaxmix" / "README.md"
PROMPTS, SEEDS, STEPS = ["a red car on the snow", "a dog"], [1, 2], 2
NAMES = [
    "VMix",
    "IPAdapter",
    "StyleAdapter",
    "DEADiff",
    "ControlNet",
    "LoRA",
    "DenseDiffusion",
    "PaintWithWords",
    "StructuredDiffusion",
    "StyleAligned",
    "StyleID",
    "MagicFusion",
    "ComposableDiffusion",
    "InstantStylePlus",
]
EXCLUDED = {
    ("DenseDiffusion", "PaintWithWords"): "places of the keys",  # two layouts of the same words
    ("DenseDiffusion", "StyleID"): "places of the keys",  # masks say where the own pixels are, not the style's
    ("StyleAligned", "StyleID"): "keys",
}
PAIRS = list(itertools.combinations(NAMES, 2))


def groups():
    """List the largest sets of methods of which no two exclude each other."""
    sets = (c for k in range(len(NAMES), 1, -1) for c in itertools.combinations(NAMES, k))
    found = []
    for names in sets:
        whole = not any(pair in EXCLUDED for pair in itertools.combinations(names, 2))
        if whole and not any(set(names) <= set(g) for g in found):
            found.append(names)
    return found


GROUPS = groups()


def random_deadiff(pipe, encoder, words=3, tokens=4):
    """Return DEADiff with readers of one layer and random numbers."""
    width, seen = pipe.unet.config.cross_attention_dim, encoder.model.config.hidden_size
    keys = iter(jax.random.split(jax.random.key(7), 200))

    def linear(i, o):
        return {"kernel": jax.random.normal(next(keys), (i, o)) * i**-0.5, "bias": jnp.zeros(o)}

    def norm(n):
        return {"scale": jnp.ones(n), "bias": jnp.zeros(n)}

    def reader():
        made = {"query_tokens": jax.random.normal(next(keys), (1, tokens, width)), "embeddings.LayerNorm": norm(width)}
        made["words"] = jax.random.normal(next(keys), (words, width))
        for kind, source in (("attention", width), ("crossattention", seen)):
            name = f"encoder.layer.0.{kind}"
            made |= {
                f"{name}.self.{x}": linear(width if x == "query" else source, width) for x in ("query", "key", "value")
            }
            made |= {f"{name}.output.dense": linear(width, width), f"{name}.output.LayerNorm": norm(width)}
        for which in ("", "_query"):
            name = "encoder.layer.0."
            made |= {
                f"{name}intermediate{which}.dense": linear(width, 32),
                f"{name}output{which}.dense": linear(32, width),
            }
            made[f"{name}output{which}.LayerNorm"] = norm(width)
        proj = {"dense1": linear(width, 32), "dense2": linear(32, width), "LayerNorm": norm(width)}
        return {"ln_vision": norm(seen), "qformer": made, "proj": proj}

    base = {name: subtree(pipe.params["unet"], name) for name in attn2_names(pipe)}
    layers = {name: {x: {"kernel": 2 * base[name][x]["kernel"]} for x in ("to_k", "to_v")} for name in base}
    slots = {name: "content" if "mid_block" in name else "style" for name in base}
    return jaxmix.DEADiff(
        {s: reader() for s in ("style", "content")}, layers, dict.fromkeys(("style", "content"), encoder), slots
    )


@pytest.fixture(scope="module")
def pieces(one_level):
    """For each method: strength -> method, and the noise from which all of them start."""
    pipe = one_level
    fresh = jaxmix.VMix.init(jax.random.key(0), pipe, {"color": ("vivid colors", "[V]")})
    mixer = jaxmix.VMix(
        fresh.config, {**moved(fresh.params, jax.random.key(1), 0.5), "aes_emb": fresh.params["aes_emb"]}
    )
    factors = lora.init(jax.random.key(2), pipe.params["unet"], r"attn1\.to_q$|conv1$", 2, 2.0)
    factors = lora.with_alpha(moved(lora.without_alpha(factors), jax.random.key(3), 0.3), 2.0)
    learnt = jaxmix.LoRA({"unet": factors})
    width = pipe.unet.config.cross_attention_dim
    kernels = {name: subtree(pipe.params["unet"], name) for name in attn2_names(pipe)}
    layers = {name: {x: {"kernel": kernels[name][x]["kernel"]} for x in ("to_k", "to_v")} for name in kernels}
    seer = jaxmix.IPAdapter("base", ip_adapter.init_projection(jax.random.key(5), "base", 6, width), layers)
    seen = [Embeddings(np.full((1, 6), x, "f4"), np.zeros(6, "f4")) for x in (0.7, -0.4)]
    left = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))
    layout = [[Segment("a red car", left), Segment("the snow", ~left)], [Segment("a dog", left)]]
    pictures = np.random.default_rng(4).integers(0, 255, (2, 16, 16, 3), np.uint8)
    found = pipe.invert(pictures, steps=STEPS, record=style_id_sites(pipe, "diffusers"))
    looker = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    encoder = jaxmix.ImageEncoder(looker, random_params(looker.abstract_params(), 0))
    styled = jaxmix.StyleAdapter.init(jax.random.key(6), pipe, encoder, blocks=1)
    strong = {name: {**layer, "strength": jnp.asarray(2.0)} for name, layer in styled.layers.items()}
    styled = dataclasses.replace(styled, layers=strong)
    split = random_deadiff(pipe, encoder)
    beside = ControlNetModel(ControlNetConfig.of_unet(pipe.unet.config, (16, 32)))
    net = jaxmix.ControlNet(beside.config, random_params(beside, 8))
    seeing = CLIPVisionModel(CLIPVisionConfig.from_dict(PROJECTING))
    adapter = random_adapter(pipe, jaxmix.ImageEncoder(seeing, random_params(seeing.abstract_params(), 0)))
    plus = {"style_adapter": adapter, "tile": net, "style_blocks": "up_blocks.0", "renoise": None}
    style = {"found": found, "pairs": [(0, 1), (1, 0)], "pairing": "diffusers", "adain": False, "guided": True}
    return found.noise, {
        "VMix": lambda s: mixer.on("all", s),
        "IPAdapter": lambda s: seer.on(seen, s),
        "StyleAdapter": lambda s: styled.on([[pictures[0], pictures[1]], [pictures[1]]], s),
        "DEADiff": lambda s: split.on([pictures[0], None], [None, pictures[1]], s),
        "ControlNet": lambda s: net.on(list(pictures), 0.3 * s),
        "LoRA": lambda s: learnt.on(s),
        "DenseDiffusion": lambda s: DenseDiffusion(layout, cross=s, self_=0.3 * s, splice=False),
        "PaintWithWords": lambda s: PaintWithWords(layout, weight=0.4 * s),
        "StructuredDiffusion": lambda s: StructuredDiffusion([["a red car", "the snow"], ["dog"]], strength=s),
        "StyleAligned": lambda s: StyleAligned([2], strength=s),
        "StyleID": lambda s: StyleID(**style, strength=s),
        "MagicFusion": lambda s: MagicFusion(["a fish", "a boat"], strength=s, switch=0),
        "ComposableDiffusion": lambda s: ComposableDiffusion([["by the sea", "fog"], ["a boat"]], [[1, s, -s], [1, s]]),
        "InstantStylePlus": lambda s: InstantStylePlus(
            list(pictures), list(pictures[::-1]), style_scale=s, tile_scale=0.3 * s, **plus
        ),
    }


@pytest.fixture(scope="module")
def draw(one_level, pieces):
    """(name=strength, ...) -> latents; kept, since several tests compare with the same."""
    kept = {}
    noise, methods = pieces

    def run(**strengths):
        key = tuple(sorted(strengths.items()))
        if key not in kept:
            chosen = [methods[name](strength) for name, strength in strengths.items()]
            start = {} if "StyleID" in strengths else {"latents": noise}  # it starts there by itself
            kept[key] = one_level.generate(PROMPTS, SEEDS, STEPS, 3.0, methods=chosen, output="latent", **start)
        return kept[key]

    return run


def among(group, *names):
    """Return the strengths of a group of methods: 1 for those that are named, 0 for the others.

    `ComposableDiffusion` is left out where it is not named: all of its weights being 0, it adds nothing to a program.
    """
    return {name: float(name in names) for name in group if name in names or name != "ComposableDiffusion"}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: "without " + ", ".join(n for n in NAMES if n not in g))
def test_methods_that_go_together_are_one_program_in_which_strength_zero_is_absence_bit_for_bit(draw, group):
    draw(**among(group))
    programs = denoise._cache_size()
    drawn = {name: draw(**among(group, name)) for name in group}
    assert denoise._cache_size() <= programs + 1, "one trace for any strengths, and one more with composed prompts"
    for name in group:
        np.testing.assert_array_equal(drawn[name], draw(**{name: 1.0}), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in PAIRS if p not in EXCLUDED], ids=" + ".join)
def test_each_of_a_pair_changes_what_the_other_draws(draw, pair):
    group = next(g for g in GROUPS if set(pair) <= set(g))
    both = draw(**among(group, *pair))
    assert np.isfinite(both).all()
    assert min(np.abs(both - draw(**{name: 1.0})).max() for name in pair) > 1e-4


@pytest.mark.parametrize("pair", EXCLUDED, ids=" + ".join)
def test_a_pair_that_makes_no_sense_is_refused_before_anything_compiles(draw, pair):
    before = denoise._cache_size()
    with pytest.raises(InputError, match=f"exclude each other at .*attn[12]: both set its {EXCLUDED[pair]}"):
        draw(**dict.fromkeys(pair, 1.0))
    assert denoise._cache_size() == before


def table():
    """Return the table of pairs as the README has it."""
    lines = ["| | " + " | ".join(NAMES[1:]) + " |", "|---" * len(NAMES) + "|"]
    for i, row in enumerate(NAMES[:-1]):
        cells = []
        for j, column in enumerate(NAMES[1:], 1):
            cells.append("" if j <= i else "excluded" if (row, column) in EXCLUDED else "works")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_readme_has_the_table():
    assert table() in README.read_text(encoding="utf-8")
