"""The gallery: 5,000 pictures in a browser, small copies made once, what draws a picture again, damaged folders."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from infer import gallery, overview, thumbnails
from infer.again import command_of, row_lines, without_rows
from infer.flags import Config
from infer.gallery import PAGE, Item, Picture, write_contact_sheet, write_gallery
from infer.job import complete
from infer.methods.registry import Methods
from infer.rows import Defaults, rows_of_objects
from infer.thumbnails import SIDE, make_thumbnails
from jaxmix import paths
from jaxmix.types import InputError
from tests.browser import CHROMIUM, opened
from tests.smoke.test_generate import StandIn, job, lines_of

METHODS = ("plain", "vmix", "image_prompt")
COMMAND = "python -m infer.generate --model sdxl"
A_MOMENT = "new Promise(done => setTimeout(done, 100))"  # for events that come later


def item(number, seed, pictures, caption, method="plain"):
    row = {"prompt": caption, "seed": seed, "steps": 30}
    return Item(caption, pictures, {"seed": str(seed), "steps": "30 ddim"}, method=method, rows=json.dumps(row))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """5,000 pictures of 1024 px, of which each has its small copy, and 30 rows that were not drawn."""
    out = tmp_path_factory.mktemp("large")
    image = Image.effect_noise((1024, 1024), 60).convert("RGB")
    image.save(out / "one.png", compress_level=0)
    make_thumbnails(out, ["one.png"])
    items = []
    for n in range(5000):
        name = f"{n:04d}_seed{n}_{n:08x}"
        os.link(out / "one.png", out / f"{name}.png")
        os.link(out / "thumbs" / "one.webp", out / "thumbs" / f"{name}.webp")
        caption = f"a {'red' if n % 7 else 'blue & <b>'} apple, number {n}, in soft morning light, highly detailed"
        items.append(item(n, n, [Picture(f"{name}.png", 1024, 1024)], caption, METHODS[n % 3]))
    items += [Item("", error=f"rows.jsonl:{n}: steps: found {n}", rows='{"prompt": "it\'s"}') for n in range(30)]
    write_gallery(out, items, "Drawn by sdxl", {"images": "5000"}, COMMAND)
    return out


@pytest.fixture(scope="module")
def page(large):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with opened() as page:
        page.seconds = page.open((large / "gallery.html").as_uri())
        page.run("globalThis.copied = []; Object.defineProperty(navigator, 'clipboard', {value: "
                 "{writeText: async text => { copied.push(text); }}}); 0")  # fmt: skip
        yield page


def count(page):
    return page.run("document.querySelector('.bar .count').textContent")


def test_5000_pictures_are_there_at_once_and_ask_for_little(large, page):
    files = [Path(url.removeprefix("file://")) for url in page.asked]
    assert page.seconds < 3
    assert all(file.is_relative_to(large) for file in files)  # nothing from outside
    assert sum(file.stat().st_size for file in files) < 30e6
    assert page.run("document.querySelectorAll('article').length") == PAGE
    assert count(page) == "1 to 60 of 5,000"
    assert page.run("document.querySelector('.errors').offsetTop < document.querySelector('main').offsetTop")
    assert page.run("[...document.images].slice(0, 4).every(image => image.src.endsWith('.webp'))")
    assert not page.said


def test_pages_turn_by_button_and_key_and_look_as_the_first_does(page):
    first = page.run("document.querySelector('article').outerHTML")
    page.run("document.querySelector('.foot .on').click()")
    assert count(page) == "61 to 120 of 5,000"
    page.press("n")
    assert count(page) == "121 to 180 of 5,000" and page.run("location.hash") == "#page=3"
    page.press("p"), page.press("p"), page.press("p")
    assert page.run("document.querySelector('article').outerHTML") == first
    page.run("document.querySelector('.pages select').value = 83;"
             "document.querySelector('.pages select').dispatchEvent(new Event('change'))")  # fmt: skip
    assert count(page) == "4,981 to 5,000 of 5,000"


def test_rows_are_found_by_text_method_and_error(page):
    def choose(place, value):
        kind = "input" if place == "input" else "change"
        page.run(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{kind}')); }})"
                 f"(document.querySelector('.bar {place}'))")  # fmt: skip

    page.press("/")
    assert page.run("document.activeElement.type") == "search"
    choose("input", "BLUE <b> morning")
    assert count(page) == "1 to 60 of 715"
    choose("select[aria-label=Method]", "vmix")
    assert count(page) == f"1 to 60 of {sum(n % 3 == 1 and n % 7 == 0 for n in range(5000))}"
    choose("input", "number 4998")
    assert count(page) == "none"
    choose("select[aria-label=Method]", "")
    assert count(page) == "1 to 1 of 1"
    choose("input", "steps: found 23")
    shown = "[...document.querySelectorAll('.errors li')].filter(line => !line.hidden).length"
    assert page.run(shown) == 1
    choose("input", "")
    choose("select[aria-label=State]", "failed")
    assert count(page) == "none" and page.run(shown) == 30
    choose("select[aria-label=State]", "drawn")
    assert count(page) == "1 to 60 of 5,000" and page.run("document.querySelector('.errors').hidden")
    choose("select[aria-label=State]", "")


def test_a_picture_opens_with_settings_and_what_draws_it_again(page):
    page.run("document.querySelectorAll('article')[59].querySelector('a').click()")
    assert page.run("document.querySelector('dialog').open")
    page.press("ArrowRight")  # onto the next page
    said = page.run("document.querySelector('dialog .caption').textContent")
    assert "number 60," in said
    assert page.run("document.querySelector('dialog .settings').textContent") == "seed60steps30 ddim"
    page.press("r"), page.press("c")
    row, command = page.run("copied.splice(0)")
    assert json.loads(row) == {"prompt": said, "seed": 60, "steps": 30}
    written, drawn = command.split("\n")
    assert drawn == f"{COMMAND} --prompts row.jsonl --out again"
    made = subprocess.run(["sh", "-c", written.replace("> row.jsonl", "")], capture_output=True, text=True, check=True)
    assert made.stdout == row + "\n"
    page.run(f"document.querySelector('dialog .close').click(); {A_MOMENT}")
    assert count(page) == "61 to 120 of 5,000"
    page.run("document.querySelector('.errors button').click()")
    assert page.run("copied.splice(0)") == ['{"prompt": "it\'s"}']
    assert not page.said


def test_a_phone_shows_two_columns_and_nothing_beyond_its_width(large, page):
    page.open((large / "gallery.html").as_uri() + "?phone#page=2&row=62", 390, 844, mobile=True)
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length") == 2
    assert "number 61," in page.run("document.querySelector('dialog[open] .caption').textContent")
    page.run(f"document.querySelector('dialog').close(); {A_MOMENT}")
    assert count(page) == "61 to 120 of 5,000" and not page.said


# Without a browser ----------------------------------------------------------------------------------------------------


def test_small_copies_are_made_once_and_go_with_their_pictures(tmp_path):
    def picture(name, side=600):
        Image.new("RGB", (side, side // 2), "red").save(tmp_path / name)
        return name

    names = [picture(f"000{n}_seed1_0123456{n}.png") for n in range(3)]
    found = make_thumbnails(tmp_path, names)
    copies = [tmp_path / found[name] for name in names]
    with Image.open(copies[0]) as image:
        assert image.size == (SIDE, SIDE // 2)
    before = [copy.stat().st_mtime_ns for copy in copies]
    os.utime(tmp_path / names[1], ns=(before[1] + 10**9,) * 2)  # drawn again since
    (tmp_path / names[2]).unlink()
    (tmp_path / "thumbs" / "holiday.webp").write_bytes(b"mine")
    (tmp_path / "0009_seed1_01234567.png").write_bytes(b"\x89PNG")
    found = make_thumbnails(tmp_path, [*names[:2], "0009_seed1_01234567.png"])
    assert list(found) == names[:2]  # the damaged one has none
    assert copies[0].stat().st_mtime_ns == before[0] and copies[1].stat().st_mtime_ns > before[1]
    assert not copies[2].exists() and (tmp_path / "thumbs" / "holiday.webp").read_bytes() == b"mine"


def test_small_pictures_have_no_copies_and_large_ones_are_shown_by_theirs(tmp_path):
    items = []
    for n, side in enumerate((64, 512)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{n}.png")
        items.append(item(n, n, [Picture(f"{n}.png", side, side)], f"picture {n}"))
    text = write_gallery(tmp_path, items, "t", {}).read_text()
    assert [path.name for path in (tmp_path / "thumbs").iterdir()] == ["1.webp"]
    assert '<a href="1.png" aria-label="Enlarge: picture 1"><img src="thumbs/1.webp"' in text and 'src="0.png"' in text
    write_contact_sheet(tmp_path, items, "t")  # from the copy
    assert "No such" not in text and "http" not in text


def test_a_drawn_picture_has_its_copy_at_once_and_a_bucket_has_copies_too(tmp_path, monkeypatch):
    for module in (thumbnails, gallery):
        monkeypatch.setattr(module, "SIDE", 8)  # of the stand-in's 16 px
    folder = paths.place("memory://gallery/out")
    status, _, out = job(tmp_path, "a\nb\n", name="p.txt")
    drawn = sorted(path.name for path in out.glob("0*.png"))
    assert status == 0 and sorted(path.stem for path in (out / "thumbs").iterdir()) == [name[:-4] for name in drawn]
    for name in drawn:
        paths.write(folder / name, (out / name).read_bytes())
    paths.write(folder / "thumbs" / "0007_seed1_01234567.webp", b"of a picture that is gone")
    assert overview.main(overview.Config(folder=str(folder))) == 0
    assert paths.names(folder / "thumbs") == {f"{name[:-4]}.webp" for name in drawn}
    text = paths.read(folder / "gallery.html").decode()
    assert text.count("<article>") == 2 and f"thumbs/{drawn[0][:-4]}.webp" in text


def test_without_scripts_the_first_page_is_there_and_the_number_of_the_others(tmp_path):
    items = [item(n, n, [Picture(f"{n}.png", 64, 64)], f"</script> {n}") for n in range(PAGE + 5)]
    text = write_gallery(tmp_path, items, "t", {}).read_text()
    assert text.count("<article>") == PAGE and "5 more, which need scripts" in text
    assert text.count("</script>") == 2  # of the page itself


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 'it\'s a "cat"\nof {glass}', "seed": 2**64 - 1, "negative_prompt": "", "id": "x"},
        {"prompt": "a (cat:1.2)", "prompt_syntax": "comfy", "guidance_rescale": 0.5, "clip_skip": 1, "eta": 0.3},
        {"prompt": "a", "sampler": "euler", "spacing": "karras", "steps": 7, "height": 24, "width": 32},
    ],
)
def test_a_copied_row_draws_the_same_picture_under_the_copied_command(tmp_path, row):
    flags = {"seed": 9, "steps": 3, "guidance_scale": 2.5, "dtype": "bfloat16", "batch_size": 2, "num_images": 2}
    methods = Methods(Config(prompt="unused", **flags))
    pipe = StandIn()

    def completed(objects, methods, **defaults):
        rows, bad = rows_of_objects([("x", held) for held in objects], Defaults(**defaults), methods.fields)
        rows, unfit = complete(rows, pipe, methods)
        assert not bad and not unfit
        return rows

    (before,) = completed([row], methods, seed=9, steps=3, guidance_scale=2.5)
    lines = row_lines([before], methods)[0]
    (after,) = completed([json.loads(lines)], Methods(Config()))
    assert before.mark == after.mark and before.file_name == after.file_name
    assert command_of(methods) == "python -m infer.generate --batch-size 2 --dtype bfloat16"


def test_the_command_of_a_folder_is_taken_without_its_rows():
    words = shlex.split("jaxmix generate --prompts r.jsonl --model 'my model' --cfg_scale=3 --lora a --lora b --vae x")
    assert without_rows(words, Config.aliases, Methods(Config()).fields) == "jaxmix generate --model 'my model' --vae x"


def test_a_job_tells_rows_and_methods_to_its_gallery(tmp_path):
    _, _, out = job(tmp_path, '{"prompt": "a"}\nnot json\n{"prompt": "b", "seed": 3}\n')
    text = (out / "gallery.html").read_text()
    held = json.loads(text.split('id="rows">')[1].split("</script>")[0])
    assert [row[0] for row in held["rows"]] == ["a", "b"] and {row[3] for row in held["rows"]} == {"plain"}
    assert json.loads(held["rows"][1][4])["seed"] == 3
    assert text.index("p.jsonl:2: not JSON") < text.index("<article>")


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_with_damage_is_shown_with_one_line_for_each_damaged_row(tmp_path, capsys):
    _, _, out = job(tmp_path, "a\nb\nc\nd\n\n", name="p.txt")
    lines = lines_of(out)
    gone, unlisted = lines[1]["file"], lines[2]["file"]
    (out / gone).unlink()
    damaged = ["{", "[1]", '{"status": "ok", "file": "../x.png"}', '{"status": "ok", "file": "x.png"}', "[" * 50_000]
    kept = [json.dumps(line) for line in lines if line.get("file") != unlisted]
    (out / "manifest.jsonl").write_bytes("\n".join([*damaged, *kept]).encode() + b"\n\xff{}\n")
    capsys.readouterr()
    assert overview.main(overview.Config(folder=str(out))) == 2
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("damaged: ")]
    assert len(told) == len(damaged) + 2 and told[-1].endswith(f"{gone}: found it in a manifest, but no such picture")
    assert [line.split(":")[1:3] for line in told[:2]] == [[" manifest.jsonl", "1"], [" manifest.jsonl", "2"]]
    text = (out / "gallery.html").read_text()
    assert text.count("<article>") == 3 and unlisted in text and "3 pictures" in said.out
    assert text.count("<li>") == len(told) + 1 and "p.txt:5: empty line" in text
    assert "Traceback" not in said.err


def test_a_whole_folder_is_shown_as_its_job_showed_it(tmp_path, capsys):
    _, _, out = job(tmp_path, '{"prompt": "a", "seed": 5, "steps": 2}\n')
    before = json.loads((out / "gallery.html").read_text().split('id="rows">')[1].split("</script>")[0])["rows"]
    (out / "gallery.html").unlink()
    assert overview.main(overview.Config(folder=str(out))) == 0 and not capsys.readouterr().err.count("damaged")
    after = json.loads((out / "gallery.html").read_text().split('id="rows">')[1].split("</script>")[0])["rows"]
    assert [row[:2] for row in after] == [row[:2] for row in before]
    assert json.loads(after[0][4]).items() >= {"prompt": "a", "seed": 5, "steps": 2}.items()


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_folder_without_anything_is_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"--folder .*{name}: (no such folder|found no manifest)"):
        overview.main(overview.Config(folder=str(tmp_path / name)))
