"""Weighted and long prompts beside compel, clip_skip and learnt embeddings beside diffusers, torch's own files."""

import types

import numpy as np
import pytest

import jaxmix
from jaxmix import InputError, Request
from jaxmix.pipeline.prompt_syntax import parse
from jaxmix.weights.embedding_files import read_embedding
from tests.parity.oracle import assert_close
from tests.parity.test_pipeline_parity import torch_pipeline

torch = pytest.importorskip("torch")
compel = pytest.importorskip("compel")

PROMPTS = [
    "a red apple by the sea",
    "a (red)1.4 apple++ by the sea",
    "a red- apple by (the sea)0.3, (a (boat)0.5 at dusk)+",
    "a photo of a cat, " * 6 + "(in the snow)1.5. " + "a dog on a mat, " * 16 + "(old)0.4 houses++ behind",
]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request, tmp_path_factory):
    """Return a torch pipeline and ours of the same weights."""
    theirs = torch_pipeline(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, jaxmix.load(folder)


def test_weights_and_chunks_are_those_of_compel(both):
    theirs, ours = both
    kinds = compel.ReturnedEmbeddingsType
    two = ours.text_encoder_2 is not None
    parts = [(theirs.tokenizer, theirs.text_encoder)] + ([(theirs.tokenizer_2, theirs.text_encoder_2)] if two else [])
    kind = kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if two else kinds.LAST_HIDDEN_STATES_NORMALIZED
    for prompt in PROMPTS:
        read = parse(prompt, "compel")[0]
        expected = []
        for tokenizer, encoder in parts:
            provider = compel.embeddings_provider.EmbeddingsProvider(
                tokenizer, encoder, truncate=False, returned_embeddings_type=kind
            )
            with torch.no_grad():
                expected.append(
                    provider.get_embeddings_for_weighted_prompt_fragments(
                        [[p.text for p in read]], [[p.weight for p in read]]
                    )
                )
        got = ours.encode_prompt([prompt], syntax="compel", max_chunks=None)
        assert_close(got.context, torch.cat(expected, -1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_grammar_is_that_of_compel(prompt):
    (flat,) = compel.prompt_parser.PromptParser().parse_conjunction(prompt).prompts
    assert [(f.text, f.weight) for f in flat.children if f.text] == [tuple(p) for p in parse(prompt, "compel")[0]]


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_that_of_diffusers(both, skip):
    """diffusers' own function does not run for one encoder with this transformers: `text_model` is gone."""
    theirs, ours = both
    request = Request(prompts=[PROMPTS[0]], negatives=["blurred"], clip_skip=skip).checked(ours)
    text = request.states(ours)
    with torch.no_grad():
        if ours.text_encoder_2 is None:
            ids = theirs.tokenizer([PROMPTS[0], "blurred"], padding="max_length", return_tensors="pt").input_ids
            made = theirs.text_encoder(ids, output_hidden_states=True)
            expected = theirs.text_encoder.final_layer_norm(made.hidden_states[-(skip + 1)][:1]), made[0][1:]
        else:
            expected = theirs.encode_prompt(
                prompt=[PROMPTS[0]], negative_prompt=["blurred"], device="cpu", num_images_per_prompt=1,
                do_classifier_free_guidance=True, clip_skip=skip,
            )  # fmt: skip
            assert_close(text.pooled[:, 1], expected[2])
    assert_close(text.context[:, 1], expected[0])
    assert_close(text.context[:, 0], expected[1])


def test_an_embedding_is_that_of_diffusers(both, tmp_path):
    theirs, ours = both
    prompt = "a cat in <my-style>, at night"
    if ours.text_encoder_2 is None:
        torch.save({"<my-style>": torch.randn(3, 16)}, tmp_path / "learned_embeds.bin")
        theirs.load_textual_inversion(str(tmp_path / "learned_embeds.bin"))
        ours = ours.with_embedding(tmp_path / "learned_embeds.bin")
        with torch.no_grad():
            expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        assert_close(ours.encode_prompt([prompt]).context, expected)
        return
    pair = {"clip_l": torch.randn(3, 16), "clip_g": torch.randn(3, theirs.text_encoder_2.config.hidden_size)}
    for key, n in (("clip_l", ""), ("clip_g", "_2")):  # diffusers loads one encoder's at a time
        theirs.load_textual_inversion(
            pair[key],
            "<my-style>",
            tokenizer=getattr(theirs, f"tokenizer{n}"),
            text_encoder=getattr(theirs, f"text_encoder{n}"),
        )
    ours = ours.with_embedding({key: x.numpy() for key, x in pair.items()}, "<my-style>")
    with torch.no_grad():
        expected, _, pooled, _ = theirs.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    text = ours.encode_prompt([prompt])
    assert_close(text.context, expected)
    assert_close(text.pooled, pooled)


# Files of torch ----------------------------------------------------------------------------------------------------


def a1111(vectors):
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    return {"string_to_token": {"*": 265}, "string_to_param": held, "name": "x", "step": 9, "sd_checkpoint": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchs_files_are_read_without_torch(tmp_path, dtype):
    vectors = torch.randn(4, 16).to(dtype)
    wide = torch.randn(16, 8).to(dtype).T[2:6]  # strided
    for name, held in (
        ("a", a1111(vectors)),
        ("b", {"string_to_param": {"*": vectors}}),
        ("c", {"emb_params": vectors}),
        ("d", {"<t>": vectors}),
    ):
        torch.save(held, tmp_path / f"{name}.pt")
        found = read_embedding(tmp_path / f"{name}.pt")
        assert found.token == ("<t>" if name == "d" else name)
        np.testing.assert_array_equal(found.vectors[0], vectors.float())
    torch.save({"clip_l": wide, "clip_g": vectors[0]}, tmp_path / "pair.pt")
    found = read_embedding(tmp_path / "pair.pt")
    np.testing.assert_array_equal(found.vectors[0], wide.float())
    assert found.vectors[1].shape == (1, 16)


class _Evil:
    def __reduce__(self):
        return (print, ("should not run",))


def test_pickles_that_ask_for_more_are_refused(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"<t>": torch.zeros(1, 16), "more": _Evil()}, path)
    with pytest.raises(
        InputError, match=r"evil.pt: found a pickle with (builtins|__builtin__).print, expected tensors"
    ):
        read_embedding(path)
    torch.save({"<t>": types.SimpleNamespace()}, path)
    with pytest.raises(InputError, match=r"found a pickle with types\.SimpleNamespace"):
        read_embedding(path)
    torch.save({"<t>": torch.zeros(1, 16)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="as torch wrote before"):
        read_embedding(path)
    assert "should not run" not in capsys.readouterr().out


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(a1111(torch.randn(2, 16)), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(200):
        data = bytearray(whole[: len(whole) if k % 3 else int(rng.integers(len(whole)))])
        for _ in range(int(rng.integers(1, 6))):
            if data:
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            found = read_embedding(path)
        except InputError as error:
            assert "\n" not in str(error) and "x.pt" in str(error)
        else:
            assert all(np.isfinite(v).all() for v in found.vectors)
