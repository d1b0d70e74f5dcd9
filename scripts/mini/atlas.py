"""Build the sprite atlas of the training scenes from four emoji packages.

    npm install @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \
        @iconify-json/fluent-emoji-high-contrast@1.2.6 @iconify-json/noto@1.2.9
    pip install resvg-py pillow numpy
    python -m scripts.mini.atlas --npm node_modules

Writes `train/scenes/atlas.webp`, `atlas.json` and `LICENSES.md`. The result is committed, so training and tests do not
need the packages. The order of OBJECTS matters: a model trained on n objects knows the first n, so the most distinct
shapes come first, and the last four are reserved for few-shot personalisation.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TILE = 112
COLUMNS = 20
RASTER = 512

OBJECT_LIST = """
🍎 apple | 🚗 car | 🌲 tree | 🐟 fish | ⭐ star | 🏠 house | 🦋 butterfly | ☂️ umbrella | 🍌 banana |
🐱 cat | ⚽ soccer ball | 🍄 mushroom | 🌵 cactus | 🔑 key | 🎩 top hat | 🚀 rocket | 🌻 sunflower |
🍓 strawberry | ⛵ sailboat | 🐧 penguin | ❤️ heart | 🎁 gift | 🍕 pizza | 🐢 turtle | 🐸 frog |
🎈 balloon | 🍩 donut | 🐷 pig | 🥕 carrot | 🐙 octopus | ☕ coffee cup | 🎸 guitar | 🍇 grapes |
🌙 moon | 🐝 bee | 🏀 basketball | 🍦 ice cream | 🔔 bell | 🦊 fox | 🚲 bicycle | 👑 crown |
🐘 elephant | 🍉 watermelon | ☀️ sun | ✈️ airplane | 🕯️ candle | 🐼 panda | 🌷 tulip |
🍔 hamburger | ⚓ anchor | 🎃 pumpkin | 🚂 train | 🦉 owl | 🍒 cherries | 📷 camera | 🐍 snake |
⏰ alarm clock | 🌽 corn | 🐌 snail | 🎺 trumpet | 🍋 lemon | 🚌 bus | 💡 light bulb | 🦀 crab |
🐶 dog | 🥑 avocado | 🔨 hammer | 🐳 whale | 💎 diamond | 🧀 cheese | 🦁 lion | 👢 boot | 🍍 pineapple |
🚁 helicopter | 🐞 ladybug | 🎲 dice | 🔒 lock | 🌈 rainbow | 🍞 bread | 🐰 rabbit | 📖 book |
👓 glasses | 🐔 chicken | 🥚 egg | ⛄ snowman | 🚜 tractor | 🍪 cookie | 🦓 zebra | 👕 shirt |
🏆 trophy | 🐵 monkey | 🍐 pear | ☁️ cloud | 🪑 chair | 🍆 eggplant | 🦒 giraffe | 🤖 robot | 🦆 duck |
👻 ghost | 🧸 teddy bear
"""

OBJECTS: tuple[tuple[str, str], ...] = tuple(
    (entry.split()[0], " ".join(entry.split()[1:])) for entry in OBJECT_LIST.split("|")
)


@dataclass(frozen=True)
class Style:
    """One drawing style of the atlas: its name and the package that it comes from."""

    name: str
    package: str
    licence: str
    author: str
    homepage: str


STYLES = (
    Style("3d", "@lobehub/fluent-emoji-3d", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Style("flat", "@iconify-json/fluent-emoji-flat", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Style("ink", "@iconify-json/fluent-emoji-high-contrast", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Style("cartoon", "@iconify-json/noto", "Apache-2.0", "Google Inc.", "https://github.com/googlefonts/noto-emoji"),
)  # fmt: skip

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def codepoints(emoji: str) -> tuple[str, ...]:
    """Return the spellings under which packages file an emoji: with and without the variation selector."""
    full = "-".join(f"{ord(c):04x}" for c in emoji)
    bare = "-".join(f"{ord(c):04x}" for c in emoji if ord(c) != 0xFE0F)
    return full, bare, f"{bare}-fe0f"


def read_webp(folder: Path, emoji: str) -> Image.Image:
    for name in codepoints(emoji):
        path = folder / "assets" / f"{name}.webp"
        if path.exists():
            return Image.open(path).convert("RGBA")
    raise SystemExit(f"error: {folder} has no picture of {emoji}")


def read_svg(folder: Path, emoji: str) -> Image.Image:
    import resvg_py

    icons = json.loads((folder / "icons.json").read_text())
    chars = json.loads((folder / "chars.json").read_text())
    name = next((chars[c] for c in codepoints(emoji) if c in chars), None)
    if name is None:
        raise SystemExit(f"error: {folder} has no picture of {emoji}")
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" color="#000">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RASTER, height=RASTER * height // width)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def paper(drawing: Image.Image) -> Image.Image:
    """Put white paper inside and a little around a black drawing, so that it also shows on dark backgrounds."""
    size = drawing.width
    margin = size // 12
    canvas = Image.new("RGBA", (size + 2 * margin, drawing.height + 2 * margin))
    canvas.paste(drawing, (margin, margin))
    reach = size // 36
    ink = canvas.getchannel("A").point(lambda a: 255 if a > 100 else 0)
    # Closing joins strokes that nearly touch; what the border cannot reach after it is inside the drawing.
    grown = ink.filter(ImageFilter.MaxFilter(2 * reach + 1))
    outside = grown.copy()
    ImageDraw.floodfill(outside, (0, 0), 128)
    sheet = outside.point(lambda v: 0 if v == 128 else 255).filter(ImageFilter.GaussianBlur(1.5))
    result = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    result.putalpha(sheet)
    return Image.alpha_composite(result, canvas)


def fit(picture: Image.Image) -> Image.Image:
    """Trim a picture to its visible part and centre it in a tile, its longer side filling the tile."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        raise SystemExit("error: an emoji has no visible part")
    cut = picture.crop(box)
    scale = (TILE - 2) / max(cut.size)
    width, height = (max(1, round(side * scale)) for side in cut.size)
    tile = Image.new("RGBA", (TILE, TILE))
    tile.paste(cut.resize((width, height), Image.Resampling.LANCZOS), ((TILE - width) // 2, (TILE - height) // 2))
    return tile


def draw(npm: Path, style: Style, emoji: str) -> Image.Image:
    folder = npm / style.package
    if style.name == "3d":
        return fit(read_webp(folder, emoji))
    picture = read_svg(folder, emoji)
    return fit(paper(picture) if style.name == "ink" else picture)


def licences(versions: dict[str, str]) -> str:
    lines = [
        "# Licences of the pictures in `atlas.webp`",
        "",
        "Written by `scripts/mini/atlas.py`. Every tile was rasterised, trimmed, scaled and compressed from the",
        "package named here; the ink tiles also got white paper behind the drawing.",
        "",
        "| style | package | version | licence | copyright | source |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.name} | `{s.package}` | {versions[s.name]} | {s.licence} | {s.author} | {s.homepage} |" for s in STYLES
    ]
    lines += ["", "## MIT (3d, flat, ink)", "", "Copyright (c) Microsoft Corporation.", "", MIT, ""]
    lines += [
        "## Apache-2.0 (cartoon)",
        "",
        "Copyright Google Inc. Licensed under the Apache License, Version 2.0; you may not use these files except in",
        "compliance with it. The text is the `LICENSE` file of this repository and",
        "http://www.apache.org/licenses/LICENSE-2.0. They are distributed on an \"AS IS\" basis, without warranties or",
        "conditions of any kind, either express or implied. Changed here: see above.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sprite atlas of the training scenes.")
    parser.add_argument("--npm", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "train" / "scenes")
    parser.add_argument("--quality", type=int, default=82, help="webp quality, 1-100")
    args = parser.parse_args()
    if len({name for _, name in OBJECTS}) != 100:
        raise SystemExit("error: OBJECTS: expected 100 different names")
    rows = -(-len(OBJECTS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE * len(STYLES)))
    for s, style in enumerate(STYLES):
        for i, (emoji, _) in enumerate(OBJECTS):
            row, column = divmod(i, COLUMNS)
            sheet.paste(draw(args.npm, style, emoji), (column * TILE, (s * rows + row) * TILE))
        print(f"{style.name}: {len(OBJECTS)} tiles")
    # Colour under full transparency is noise to the encoder.
    pixels = np.array(sheet)
    pixels[pixels[..., 3] == 0] = 0
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "atlas.webp"
    Image.fromarray(pixels).save(path, quality=args.quality, method=6, alpha_quality=90)
    versions = {s.name: json.loads((args.npm / s.package / "package.json").read_text())["version"] for s in STYLES}
    index = {
        "image": path.name,
        "tile": TILE,
        "columns": COLUMNS,
        "rows_per_style": rows,
        "objects": [name for _, name in OBJECTS],
        "emoji": [emoji for emoji, _ in OBJECTS],
        "styles": [
            {"name": s.name, "package": s.package, "version": versions[s.name], "licence": s.licence} for s in STYLES
        ],
    }
    (args.out / "atlas.json").write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n")
    (args.out / "LICENSES.md").write_text(licences(versions))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(OBJECTS)} objects x {len(STYLES)} styles at {TILE} px")


if __name__ == "__main__":
    main()
