"""Prune the CLIP byte-pair vocabulary to what the embedded model's captions and plain English need.

    pip download --no-deps open_clip_torch==3.3.0
    python -m scripts.mini.tokenizer --open-clip-wheel open_clip_torch-3.3.0-py3-none-any.whl --npm node_modules
    python -m scripts.mini.tokenizer --open-clip-wheel open_clip_torch-3.3.0-py3-none-any.whl --full

Writes a folder that `transformers.CLIPTokenizer` can open. The pruned one keeps every byte, so any text can still be
encoded; a word that is covered is split exactly as in the full vocabulary, because all merges that build it are kept in
order. The common words are the names and keywords of `unicode-emoji-json` and `emojilib` (both MIT). With --full it is
the whole vocabulary, for single-file checkpoints, which hold no tokenizer; npm is not needed then.
The vocabulary is from `open_clip_torch` (MIT), originally OpenAI CLIP (MIT).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
FULL_MERGES = 49152 - 256 - 2
MINI_MERGES = 49152 - 2 * 256 - 2  # what the embedded model was trained with: without the 256 rarest
TEXT_LENGTH, FULL_TEXT_LENGTH = 32, 77
ASSETS = Path(__file__).parents[2] / "jaxmix" / "assets"
BPE_FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"


def byte_letters() -> dict[int, str]:
    """Return the printable letter for each byte, in the order of CLIP's vocabulary (the GPT-2 convention)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {b: chr(b) for b in plain}
    others = [b for b in range(256) if b not in letters]
    letters.update({b: chr(256 + i) for i, b in enumerate(others)})
    return letters


def read_merges(source: Path) -> list[tuple[str, str]]:
    """Return the merges of the full vocabulary, first to last, from the wheel or from the gz file."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            packed = wheel.read(BPE_FILE)
    else:
        packed = source.read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : FULL_MERGES + 1]
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != FULL_MERGES or any(len(p) != 2 for p in pairs):
        raise SystemExit(f"error: {source}: expected {FULL_MERGES} merges of two pieces")
    return pairs  # type: ignore[return-value]


def split_word(word: str, ranks: dict[tuple[str, str], int], letters: dict[int, str]) -> tuple[list[str], set]:
    """Split a word by byte-pair encoding; return its pieces and the merges that were used."""
    pieces = [letters[b] for b in word.encode("utf-8")]
    pieces[-1] += "</w>"
    used = set()
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, FULL_MERGES))
        if best not in ranks:
            break
        used.add(best)
        merged, i = [], 0
        while i < len(pieces):
            if tuple(pieces[i : i + 2]) == best:
                merged.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return pieces, used


def english_words(npm: Path) -> set[str]:
    """Lower-case words of the emoji names and keywords."""
    names = json.loads((npm / "unicode-emoji-json" / "data-by-emoji.json").read_text())
    keywords = json.loads((npm / "emojilib" / "dist" / "emoji-en-US.json").read_text())
    phrases = [entry["name"] for entry in names.values()] + [k for ks in keywords.values() for k in ks]
    return {w for phrase in phrases for w in re.findall(r"[a-z]+", phrase.lower())}


def prune(
    merges: Sequence[tuple[str, str]], words: Iterable[str], letters: dict[int, str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary (piece -> id; the end token has the largest id) and the merges that the words need."""
    ranks = {pair: i for i, pair in enumerate(merges)}
    needed: set[tuple[str, str]] = set()
    for word in words:
        needed |= split_word(word, ranks, letters)[1]
    kept = [pair for pair in merges if pair in needed]
    return vocabulary(kept, letters), kept


def vocabulary(merges: Sequence[tuple[str, str]], letters: dict[int, str]) -> dict[str, int]:
    """Return the id of every piece: bytes, bytes that end a word, what the merges build, the start and end tokens."""
    pieces = [*letters.values(), *(v + "</w>" for v in letters.values()), *(a + b for a, b in merges), START, END]
    return {piece: i for i, piece in enumerate(pieces)}


def write(out: Path, vocab: dict[str, int], merges: Sequence[tuple[str, str]], text_length: int) -> None:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "model_max_length": text_length,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prune the CLIP vocabulary for the embedded model, or write all of it."
    )
    parser.add_argument("--open-clip-wheel", type=Path, required=True, help="the wheel, or its vocabulary gz file")
    parser.add_argument("--npm", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--full", action="store_true", help="keep the whole vocabulary")
    parser.add_argument("--out", type=Path, help="folder to write, by default the one in jaxmix/assets")
    args = parser.parse_args()
    merges, letters = read_merges(args.open_clip_wheel), byte_letters()
    if args.full:
        out = args.out or ASSETS / "clip_tokenizer"
        vocab = vocabulary(merges, letters)
        write(out, vocab, merges, FULL_TEXT_LENGTH)
        print(f"{out}: {len(vocab)} pieces, {len(merges)} merges")
        return
    from train.scenes import Atlas
    from train.scenes.captions import all_words

    out = args.out or ASSETS / "mini" / "tokenizer"
    words = all_words(Atlas().objects) | english_words(args.npm)
    vocab, merges = prune(merges[:MINI_MERGES], sorted(words), letters)
    write(out, vocab, merges, TEXT_LENGTH)
    print(f"{out}: {len(vocab)} pieces, {len(merges)} merges, {len(words)} words covered")


if __name__ == "__main__":
    main()
