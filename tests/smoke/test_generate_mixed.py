"""infer.generate with several methods in one job and in one row: what is built, what is refused, what is drawn."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.again import row_lines
from infer.batches import batches_of
from infer.drawing import build, request
from infer.flags import Config
from infer.generate import main
from infer.job import collect_rows, complete, draw
from infer.methods.method import BatchRows
from infer.methods.registry import Methods
from infer.png import read_settings
from jaxmix.command import parse
from jaxmix.controls import vmix
from jaxmix.methods import lora
from jaxmix.models.unet import sites, subtree
from jaxmix.testing import random_params
from jaxmix.types import InputError
from tests.jobs import only, unmarked

PROMPT = "a red car on the snow"
SEGMENTS = "a red car @ 0,0,0.5,1"
BUILT = {
    "vmix": {"Mix"},
    "lora": {"Merge"},
    "dense": {"DenseDiffusion"},
    "paint": {"PaintWithWords"},
    "structured": {"StructuredDiffusion"},
    "style_aligned": {"StyleAligned"},
    "style_transfer": {"StyleID"},
    "fuse": {"MagicFusion"},
    "compose": {"ComposableDiffusion"},
}
APART = [("dense", "style_transfer"), ("style_aligned", "style_transfer")]
TOGETHER = [pair for pair in itertools.combinations(BUILT, 2) if pair not in (*APART, ("dense", "paint"))]


@pytest.fixture(scope="module")
def files(tiny_pipeline, tmp_path_factory):
    """Return a folder with an adapter ("vmix.safetensors", without a LoRA), a LoRA and a picture."""
    path = tmp_path_factory.mktemp("mixed")
    cross = [
        (site.name, subtree(tiny_pipeline.params["unet"], site.name)["to_v"]["kernel"].shape[-1])
        for site in sites(tiny_pipeline.unet.config, tiny_pipeline.latent_shape[:2])
        if site.name.endswith("attn2")
    ]
    labels = (("color", "vivid", "[V]"), ("light", "bright", "[S]"))
    config = vmix.VMixConfig(labels=labels, tokens=32, context_dim=16, sites=tuple(cross))
    jaxmix.VMix(config, random_params(vmix.abstract_params(config), 5)).save(path / "vmix.safetensors")
    rng = np.random.default_rng(0)
    name = cross[0][0].replace("attn2", "attn1") + ".to_q"
    kernel = subtree(tiny_pipeline.params["unet"], name)["kernel"]
    down, up = rng.standard_normal((kernel.shape[0], 2)), rng.standard_normal((2, kernel.shape[1]))
    factors = {"down": np.float32(down), "up": np.float32(up), "alpha": np.float32(2)}
    jaxmix.LoRA({"unet": {name: factors}}).save(path / "lora.safetensors")
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path / "a.png")
    return path


def fields(files):
    """Return the fields that switch on each method in a row of PROMPT."""
    picture = str(files / "a.png")
    return {
        "vmix": {"vmix": str(files / "vmix.safetensors"), "labels": "color", "vmix_scale": 0.5},
        "lora": {"lora": f"{files / 'lora.safetensors'}:0.5"},
        "dense": {"segments": SEGMENTS},
        "paint": {"segments": SEGMENTS, "layout": "paint", "paint": 0.5},
        "structured": {"phrases": "a red car; the snow"},
        "style_aligned": {"group": "g"},
        "style_transfer": {"content": picture, "style": picture},
        "fuse": {"expert_prompt": "an ink drawing of a cat"},
        "compose": {"prompt": f"{PROMPT} AND fog :0.5"},
    }


def read(tmp_path, rows, wanted="", **flags):
    """Return the config, the methods, and the good and bad rows of a job."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": PROMPT, **row}) + "\n" for row in rows))
    config = Config(prompts=str(path), out=str(tmp_path / "out"), **{"steps": 2, "devices": 1, **flags})
    methods = Methods(config, wanted)
    return config, methods, *collect_rows(config, methods)


def planned(tmp_path, pipe, rows, **flags):
    """Return the buckets of a job, and the reasons of its bad rows."""
    _, methods, good, bad = read(tmp_path, rows, **flags)
    good, unfit = complete(good, pipe, methods)
    return list(methods.buckets(good)), [str(row) for row in (*bad, *unfit)]


def kinds(pipe, bucket):
    """Return the names of the classes that are built for a bucket, as a check of them builds them."""
    names = frozenset(method.name for method in bucket.methods)
    batch = BatchRows(bucket.rows, bucket.groups or (), names, bucket.weights, draft=True)
    made = [one for method in bucket.methods for one in method.build(pipe, batch)]
    pipe.check(request(bucket.rows), made)
    return {type(one).__name__ for one in made}


@pytest.mark.parametrize("pair", TOGETHER, ids="+".join)
def test_a_row_may_have_two_methods(files, tiny_pipeline, tmp_path, pair):
    row = {key: value for name in pair for key, value in fields(files)[name].items()}
    buckets, bad = planned(tmp_path, tiny_pipeline, [row] * (1 + ("style_aligned" in pair)))
    assert not bad and len(buckets) == 1
    assert {method.name for method in buckets[0].methods} == {*pair}
    assert kinds(tiny_pipeline, buckets[0]) == set.union(*(BUILT[name] for name in pair))
    assert (buckets[0].groups is None) == ("style_aligned" not in pair)
    assert bool(buckets[0].weights) == ("lora" in pair)


@pytest.mark.parametrize("pair", APART, ids="+".join)
def test_a_row_of_two_methods_that_exclude_each_other_is_bad_and_says_which(files, tiny_pipeline, tmp_path, pair):
    row = {key: value for name in pair for key, value in fields(files)[name].items()}
    row |= {"expert_prompt": "a cat"}  # which both go with
    buckets, bad = planned(tmp_path, tiny_pipeline, [{}, *[row] * (1 + ("style_aligned" in pair))])
    assert [len(bucket.rows) for bucket in buckets] == [1]
    first = "segments (dense)" if "dense" in pair else "group (style_aligned)"
    expected = f"found {first} and content, style (style_transfer) in one row, which exclude each other: "
    assert all(expected in line and "\n" not in line for line in bad)
    assert [line.split(": ")[0] for line in bad] == ["rows.jsonl:2", "rows.jsonl:3"][: len(bad)]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"cross": 2}, "cross: found 2.0 without 'segments', expected it in the row, too"),
        ({"layout": "dense"}, "layout: found text \"dense\" without 'segments'"),
        ({"layout": "ink", "segments": SEGMENTS}, 'layout: found text "ink", expected one of dense, paint'),
        ({"paint": 1, "segments": SEGMENTS}, "paint: found 1.0 with layout 'dense', expected 'paint'"),
        (
            {"cross": 1, "segments": SEGMENTS, "layout": "paint"},
            "cross: found 1.0 with layout 'paint', expected 'dense'",
        ),
        ({"paint": 1}, "paint: found 1.0 without 'segments', expected it in the row, too"),
        ({"paint": float("nan"), "segments": SEGMENTS, "layout": "paint"}, "paint: found nan, expected a number"),
        (
            {"paint": True, "segments": SEGMENTS, "layout": "paint"},
            "paint: found a truth value true, expected a number",
        ),
        ({"segments": SEGMENTS + ":inf", "layout": "paint"}, "segments[0]: weight: found inf, expected a number"),
        (
            {"segments": [{"phrase": "a red car", "box": [0, 0, 1, 1], "weight": "x"}], "layout": "paint"},
            'segments[0]: weight: found text "x", expected a number',
        ),
        ({"segments": SEGMENTS + ":2"}, "('a red car'): weight: found 2, expected 1: DenseDiffusion weighs none"),
        ({"segments": "a cat @ 0,0,1,1", "layout": "paint"}, "segment 0 ('a cat'): the phrase is not in the prompt"),
        (
            {"segments": "a red car @ PICTURE", "layout": "paint", "height": 32},
            "a.png: found a mask of 16x16 pixels, expected the image's 16x32",
        ),
        ({"phrases": []}, "phrases: found none, expected phrases of the prompt such as"),
        ({"phrases": " ; "}, "phrases: found none, expected phrases of the prompt such as"),
        ({"phrases": 5}, "phrases: found 5, expected phrases of the prompt"),
        ({"phrases": ["a red car", True]}, "phrases[1]: found a truth value true, expected text"),
        ({"phrases": ["a red car", ""]}, "phrases[1]: found no words"),
        (
            {"phrases": "a red car; a cat"},
            "phrase 1 ('a cat'): the phrase is not in the prompt 'a red car on the snow'",
        ),
        ({"transfer": "ink", "content": "PICTURE"}, 'transfer: found text "ink", expected one of style_id'),
        ({"gamma": 0.5}, "gamma: found 0.5 without 'content' and 'style'"),
        ({"content": "PICTURE"}, "no field 'style', expected a picture"),
        ({"style": "PICTURE"}, "no field 'content', expected a picture"),
        ({"k_expert": 2}, "k_expert: found 2.0 without 'expert_prompt'"),
        (
            {"prompt": "a cat AND"},
            "prompt: found no text in part 2 of 2 of 'a cat AND', expected a prompt on each side",
        ),
        ({"prompt": "a cat :nan AND fog"}, "prompt: found the weight nan of 'a cat', expected a finite one; AND is a"),
        ({"prompt": "a cat AND fog :1e99"}, "prompt: found the weight 1e99 of 'fog', expected a finite one"),
        ({"compose": "no"}, 'compose: found text "no", expected on or off'),
        ({"labels": "color"}, "labels: found text \"color\" without 'vmix'"),
        ({"reference": "PICTURE"}, "without 'group'"),
        ({"style_strength": 0.5}, "style_strength: found 0.5 without 'group', or 'content' and 'style'"),
        ({"group": 7}, "group 7: found one image, expected the reference and at least one more"),
        ({"lora": 5}, 'lora: found 5, expected text such as "style.safetensors:0.8", or a list'),
        ({"lora": "gone.safetensors"}, "lora: gone.safetensors: no such file, expected a LoRA"),
        ({"vmix": "gone"}, "vmix: gone: no such file, expected a VMix adapter"),
        ({"lora": "VMIX"}, "vmix.safetensors"),
        ({"expert_prompt": "b", "guidance_rescale": 0.5}, "guidance_rescale: found 0.5 with expert_prompt (fuse)"),
        ({"expert_prompt": "b", "k_expert": -1}, "fusion: k_expert: found [-1.0], expected numbers >= 0"),
        ({"content": "PICTURE", "style": "PICTURE", "sampler": "euler"}, "found euler, expected ddim"),
        (
            {"content": "PICTURE", "style": "PICTURE", "image": "PICTURE"},
            "image: found it with 'content' and 'style'",
        ),
    ],
)
def test_a_row_with_part_of_a_method_is_one_line_and_the_others_stay(files, tiny_pipeline, tmp_path, row, line):
    paths = {"PICTURE": str(files / "a.png"), "VMIX": str(files / "vmix.safetensors")}
    for name, path in paths.items():
        row = {key: value.replace(name, path) if isinstance(value, str) else value for key, value in row.items()}
    buckets, bad = planned(tmp_path, tiny_pipeline, [{}, row, {}])
    assert [len(bucket.rows) for bucket in buckets] == [2]
    assert len(bad) == 1 and bad[0].startswith("rows.jsonl:2: ") and line in bad[0] and "\n" not in bad[0]


def test_of_many_rows_of_one_kind_the_bad_ones_are_found(files, tiny_pipeline, tmp_path):
    rows = [{"segments": SEGMENTS, "lora": str(files / f"{name}.safetensors")} for name in ("lora", "vmix")] * 2
    rows += [{"segments": "a green car @ 0,0,1,1"}, {"segments": SEGMENTS}]
    buckets, bad = planned(tmp_path, tiny_pipeline, rows)
    assert [[row.number for row in bucket.rows] for bucket in buckets] == [[0, 2], [5]]
    assert [line.split(": ")[0][len("rows.jsonl:") :] for line in sorted(bad)] == ["2", "4", "5"]
    assert "image 0, segment 0 ('a green car'): the phrase is not in the prompt" in max(bad)


def test_features_in_rows_stand_alone_and_say_so_before_anything_is_drawn(files, tiny_pipeline, tmp_path):
    names = ("vmix", "fuse", "lora", "compose")
    rows = [{**fields(files)["style_transfer"], **fields(files)[name]} for name in names]
    buckets, bad = planned(tmp_path, tiny_pipeline, rows, features="rows")
    assert [line.split(": ")[0] for line in bad] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert "content, style (style_transfer) and AND in the prompt (compose) in one row, which exclude" in bad[2]
    assert "vmix (vmix) and content, style (style_transfer) in one row" in bad[0]
    assert kinds(tiny_pipeline, buckets[0]) == {"Merge", "StyleID"}


def test_a_flag_is_the_field_of_every_row_that_does_not_name_it(files, tiny_pipeline, tmp_path):
    own = "on the snow @ 0,0,1,1"
    rows = [{}, {"segments": own, "cross": 3}, {"segments": None, "lora": []}]
    lora_file = str(files / "lora.safetensors")
    buckets, bad = planned(tmp_path, tiny_pipeline, rows, segments=SEGMENTS, cross=2.0, lora=lora_file)
    assert not bad
    first, second, third = sorted((row for bucket in buckets for row in bucket.rows), key=lambda row: row.number)
    assert [row["segments"][0].phrase for row in (first, second, third)] == ["a red car", "on the snow", "a red car"]
    assert [row["cross"] for row in (first, second, third)] == [2.0, 3.0, 2.0]
    assert [len(bucket.rows) for bucket in buckets] == [2, 1]
    assert [bool(bucket.weights) for bucket in buckets] == [True, False]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"gamma": 0.5}, "--gamma: found 0.5 without 'content' and 'style' in any row"),
        ({"cross": 2.0}, "--cross: found 2.0 without 'segments' in any row, expected it there or --segments"),
        ({"reference": "PICTURE"}, "without 'group' in any row"),
        ({"layout": "ink", "segments": SEGMENTS}, '--layout: found text "ink", expected one of dense, paint'),
        ({"paint": 0.5, "segments": SEGMENTS}, "--paint: found 0.5 with layout 'dense', expected 'paint'"),
        ({"paint": float("nan")}, "--paint: found nan, expected a number"),
        ({"segments": SEGMENTS + ":nan"}, "--segments[0]: weight: found nan, expected a number"),
        ({"phrases": ";"}, "--phrases: found none, expected phrases of the prompt"),
    ],
)
def test_a_flag_of_a_method_that_no_row_has_is_an_error(files, tmp_path, flags, line):
    flags = {key: str(files / "a.png") if value == "PICTURE" else value for key, value in flags.items()}
    with pytest.raises(InputError, match=re.escape(line)):
        read(tmp_path, [{}], **flags)


def test_buckets_of_one_set_of_weights_follow_each_other(files, tiny_pipeline, tmp_path):
    weights = f"{files / 'lora.safetensors'}"
    rows = [{}, {"lora": weights}, {"steps": 3}, {"lora": weights, "steps": 3}, {"lora": f"{weights}:0"}, {"lora": []}]
    buckets, bad = planned(tmp_path, tiny_pipeline, rows)
    assert not bad
    assert [[row.number for row in bucket.rows] for bucket in buckets] == [[0, 4, 5], [2], [1], [3]]


def test_a_group_may_hold_rows_with_and_without_a_layout_or_an_expert(files, tiny_pipeline, tmp_path):
    rows = [{"group": "g", "vmix_scale": 0.5}, {"group": "g", "segments": SEGMENTS, "expert_prompt": "a cat"}]
    vmix_file = str(files / "vmix.safetensors")
    buckets, bad = planned(tmp_path, tiny_pipeline, rows, vmix=vmix_file, reference=str(files / "a.png"), offset=0)
    (bucket,) = buckets
    assert not bad and bucket.groups == [3]
    assert [row.where for row in bucket.rows] == ["--reference", "rows.jsonl:1", "rows.jsonl:2"]
    assert [row["vmix"] for row in bucket.rows] == [vmix_file] * 3  # the picture is reconstructed by the same model
    batch = BatchRows(bucket.rows, [3], frozenset(method.name for method in bucket.methods), draft=True)
    made = {type(one).__name__: one for method in bucket.methods for one in method.build(tiny_pipeline, batch)}
    dense, fusion = made["DenseDiffusion"], made["MagicFusion"]
    assert [len(layout) for layout in dense.layouts] == [0, 0, 1] and list(dense.cross) == [0, 0, 1.0]
    assert list(dense.self_) == [0, 0, 0.3] and list(fusion.strength) == [0, 0, 1.0]
    assert list(made["StyleAligned"].pictures) == [0]


def test_rows_of_a_group_without_segments_or_phrases_are_left_as_they_are(files, tiny_pipeline, tmp_path):
    rows = [{"phrases": "the snow"}, {"segments": SEGMENTS, "layout": "paint"}, {}]
    (bucket,), bad = planned(tmp_path, tiny_pipeline, [{"group": "g", **row} for row in rows])
    batch = BatchRows(bucket.rows, [3], frozenset(method.name for method in bucket.methods), draft=True)
    made = {type(one).__name__: one for method in bucket.methods for one in method.build(tiny_pipeline, batch)}
    paint = made["PaintWithWords"]
    assert not bad and [len(layout) for layout in paint.layouts] == [0, 1, 0] and list(paint.weight) == [0, 0.4, 0]
    assert [list(some) for some in made["StructuredDiffusion"].phrases] == [["the snow"], [], []]


def test_a_group_of_two_layouts_is_refused(files, tiny_pipeline, tmp_path):
    rows = [{"group": "g", "segments": SEGMENTS, **more} for more in ({}, {"layout": "paint"})]
    buckets, bad = planned(tmp_path, tiny_pipeline, rows)
    assert not buckets and len(bad) == 2
    assert all("group g: found segments (dense) and segments (paint)" in line and "\n" not in line for line in bad)


def test_a_group_of_two_sets_of_weights_is_refused(files, tiny_pipeline, tmp_path):
    rows = [{"group": "g"}, {"group": "g", "lora": str(files / "lora.safetensors")}]
    buckets, bad = planned(tmp_path, tiny_pipeline, rows)
    assert not buckets and len(bad) == 2
    assert all("group g: found different LoRAs, expected the same weights in a group" in line for line in bad)


def test_groups_stay_whole_on_every_device(files, tiny_pipeline, tmp_path):
    rows = [{"group": name} for name in "aabbbcc"]
    (bucket,), _ = planned(tmp_path, tiny_pipeline, rows)
    cut = list(batches_of(bucket, 4, 2))
    assert {len(batch.filled) for batch in cut} == {6}
    assert [row.number for batch in cut for row in batch.rows] == list(range(7))
    assert all(sum(batch.groups) == 6 and min(batch.groups) > 1 for batch in cut)


def test_all_flags_of_all_methods_are_flags_of_every_command():
    found = parse(main, ["--segments", SEGMENTS, "--adain", "false", "--gamma=0.5", "--k-expert", "2", "--lora", "a"])
    assert (found.adain, found.gamma, found.k_expert, found.lora) == (False, 0.5, 2.0, ["a"])
    assert parse(main, ["--adain", "none"]).adain == "none"
    scalar = {key for key in Methods(Config()).fields if key != "group"}
    assert scalar <= {*vars(found)}


def test_a_row_copied_from_the_gallery_is_the_same_row_without_the_flags_of_its_job(files, tiny_pipeline, tmp_path):
    all_of = fields(files)
    rows = [{}, *all_of.values(), {**all_of["style_aligned"], **all_of["dense"]}]
    flags = {"guidance_scale": 2.5, "seed": 9, "cross": 0.7, "score_scale": 1.5}
    _, methods, good, bad = read(tmp_path, rows, lora=[f"{files / 'lora.safetensors'}:0.25"], **flags)
    good, unfit = complete(good, tiny_pipeline, methods)
    lines = row_lines(good, methods)
    assert not bad and not unfit and len(lines) == len(rows)

    def plain(row, methods):
        return {key: x for key, x in methods.settings(row).items() if key not in ("row", "group_mark")}

    seen = []
    for row in good:
        objects = [json.loads(line) for line in lines[row.number].split("\n")]
        _, others, again, bad = read(tmp_path, objects, steps=None)
        again, unfit = complete(again, tiny_pipeline, others)
        assert not bad and not unfit
        assert plain(row, methods) in [plain(one, others) for one in again]
        seen.append(len(again))
    assert seen.count(2) == 2 and sum(seen) == len(rows) + 2  # those of a group come with another


@pytest.mark.slow
def test_rows_of_many_methods_are_drawn_in_one_job(files, tiny_pipeline, tmp_path, monkeypatch, capsys):
    sets = []
    merge = lora.merge
    monkeypatch.setattr(lora, "merge", lambda params, loras: sets.append(loras) or merge(params, loras))
    all_of = fields(files)
    many = {**all_of["vmix"], **all_of["lora"], **all_of["dense"], **all_of["style_aligned"], **all_of["fuse"]}
    rows = [
        {"seed": 7},
        {"seed": 7, **all_of["lora"]},
        {"seed": 1, **many},
        {"seed": 7, "lora": f"{files / 'lora.safetensors'}:0"},
        {"seed": 2, **many, "fuse_strength": 0, "vmix_scale": 0},
        {"prompt": "", "steps": 4, "pairing": "x"},
        {"steps": 4, "lora": str(files / "lora.safetensors"), **all_of["style_transfer"], **all_of["fuse"]},
    ]
    config, methods, good, bad = read(tmp_path, rows, switch=0)
    assert draw(config, good, bad, lambda: tiny_pipeline, None, methods) == 2
    out = tmp_path / "out"
    names = ["0000_seed7", "0001_seed7", "0002_seed1", "0003_seed7", "0004_seed2", "0006_seed6"]
    got = {name: np.asarray(Image.open(only(out, f"{name}.png")), np.int16) for name in names}
    assert len(list(out.glob("0*.png"))) == len(names) + 2 + 2  # two layouts, a content and a style beside them
    plain = tiny_pipeline.generate([PROMPT] * 2, seeds=[7, 7], steps=2)
    np.testing.assert_array_equal(got["0000_seed7"], plain[0])
    np.testing.assert_array_equal(got["0003_seed7"], plain[0])  # strength 0 is without
    assert np.abs(got["0001_seed7"] - got["0000_seed7"]).max() > 0
    assert len(sets) == 2  # a merge a set of weights, for three buckets
    said = capsys.readouterr()
    assert "bad row: rows.jsonl:6: unknown field 'pairing'" in said.err
    for line in (
        "2 steps of ddim, 16x16: 2 images in 1 batch of 2",
        "2 steps of ddim, 16x16, lora lora.safetensors:0.5: 1 images in 1 batch of 1",
        "16x16, vmix vmix.safetensors, lora lora.safetensors:0.5, dense, style_aligned, fuse: 2 images in 1 batch of 2",
        "4 steps of ddim, 16x16, lora lora.safetensors:1, style_transfer, fuse: 1 images",
    ):
        assert line in said.out
    settings = read_settings(only(out, "0002_seed1.png"))
    assert settings["method"] == "dense+style_aligned+fuse"
    for name in ("vmix", "dense", "style_aligned", "fuse"):
        assert {*all_of[name]} <= {*settings}
    assert settings["lora"] == [all_of["lora"]["lora"]] and "gamma" not in settings and settings["switch"] == 0
    assert not {"method", "segments", "lora", "vmix"} & {*read_settings(only(out, "0003_seed7.png"))}
    page = unmarked((out / "gallery.html").read_text())
    for shown in ("0002_seed1_layout.png", "0006_seed6_content.png", "color x 0.5", "lora x 0.5", "cross, self"):
        assert shown in page
    # All of it is kept, and a group is drawn again whole.
    only(out, "0004_seed2.png").unlink()
    config, methods, good, bad = read(tmp_path, rows, switch=0, resume=True, dry_run=True)
    assert draw(config, good, bad, lambda: tiny_pipeline, None, methods) == 2
    assert "plan: 2 images with mini" in capsys.readouterr().out


def test_what_is_built_for_a_batch_holds_inversions_of_the_merged_weights(files, tiny_pipeline, tmp_path, monkeypatch):
    asked = []

    def invert(self, picture, prompts=None, steps=50, guidance_scale=None, **how):
        asked.append(self)
        states = np.zeros((1, steps + 1, *self.latent_shape), np.float32)
        return jaxmix.Inverted(states, {}, how.get("label", "next"))

    monkeypatch.setattr(jaxmix.Pipeline, "invert", invert)
    row = {**fields(files)["lora"], "group": "g"}
    flags = {"reference": str(files / "a.png"), "reference_prompt": "a cat", "offset": 0, "batch_size": 3}
    (bucket,), bad = planned(tmp_path, tiny_pipeline, [row, row, {**row, "group": "h"}, {**row, "group": "h"}], **flags)
    assert not bad
    for batch in batches_of(bucket, 3, 1):
        merge, aligned = build(tiny_pipeline, request(batch.filled), batch)
        assert (type(merge).__name__, aligned.groups) == ("Merge", (3,))
        assert isinstance(aligned.pictures[0], jaxmix.Inverted)
    assert len(asked) == 1 and asked[0] is not tiny_pipeline  # one picture, one inversion for both batches
