"""Draw the emoji sheets: download the openly licensed sets with npm, render them, write one grid and captions each.

    pip install resvg-py; python prepare.py data

Skin tones and country flags are left out. Needs npm.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

COLUMNS, PIXELS, DRAWN = 40, 64, 256
SETS = {
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "fluent-modern": ("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "fluent-hc": ("@iconify-json/fluent-emoji-high-contrast@1.2.6", "MIT"),
}
KEYWORDS, NAMES = "emojilib@4.0.3", "unicode-emoji-json@0.9.0"
VARIANT = "\ufe0f"
WHITE = (255, 255, 255)


def package(spec: str, *names: str) -> list[Any]:
    """JSON files out of an npm package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            return [json.load(io.TextIOWrapper(tar.extractfile(f"package/{name}"), "utf-8")) for name in names]


def character(codepoints: str) -> str:
    return "".join(chr(int(code, 16)) for code in codepoints.split("-")).replace(VARIANT, "")


def wanted(char: str) -> bool:
    """Neither a skin tone on something nor a country's flag."""
    toned = len(char) > 1 and any(0x1F3FB <= ord(c) <= 0x1F3FF for c in char)
    return not toned and not any(0x1F1E6 <= ord(c) <= 0x1F1FF for c in char)


def draw(icon: dict[str, Any], width: int, height: int) -> Image.Image | None:
    """An icon on white, cropped to what is drawn with a margin of 4 %; None if it is blank."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", width), icon.get("height", height)
    body = icon["body"].replace("currentColor", "#202020")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    ys, xs = np.nonzero(3 * 255 - np.asarray(image).astype(int).sum(-1) > 24)
    if len(ys) < 50:
        return None
    middle = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
    half = 0.54 * max(np.ptp(xs) + 1, np.ptp(ys) + 1)
    box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
    square = image.transform((DRAWN, DRAWN), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=WHITE)
    return square.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def sheet(
    style: str, names: dict[str, Any], keywords: dict[str, list[str]], fallback: dict[str, str], out: Path
) -> int:
    """Write the sheet of one style; the number of images on it."""
    spec, licence = SETS[style]
    icons, chars = package(spec, "icons.json", "chars.json")
    slugs = {slug: code for code, slug in reversed((chars or fallback).items())}
    found: dict[str, tuple[dict[str, Any], Image.Image]] = {}
    for slug, icon in icons["icons"].items():
        char = character(slugs[slug]) if slug in slugs else ""
        if not char or char in found or char not in names or not wanted(char):
            continue
        image = draw(icon, icons.get("width", 16), icons.get("height", 16))
        if image is not None:
            about = names[char]
            row = {"char": char, "slug": slug, "name": about["name"].lower(), "group": about["group"]}
            found[char] = (row | {"keywords": keywords.get(char, [])[:8]}, image)
    ordered = [found[char] for char in sorted(found)]
    grid = Image.new("RGB", (COLUMNS * PIXELS, -(-len(ordered) // COLUMNS) * PIXELS), WHITE)
    for at, (_, image) in enumerate(ordered):
        grid.paste(image, (at % COLUMNS * PIXELS, at // COLUMNS * PIXELS))
    grid.save(out / f"{style}_{PIXELS}.png", optimize=True)
    about = {"style": style, "package": spec, "license": licence, "columns": COLUMNS}
    text = json.dumps(about | {"items": [row for row, _ in ordered]}, ensure_ascii=False)
    (out / f"{style}.json").write_text(text, encoding="utf-8")
    return len(ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (names,) = package(NAMES, "data-by-emoji.json")
    (keywords,) = package(KEYWORDS, "dist/emoji-en-US.json")
    (fallback,) = package(SETS["fluent-flat"][0], "chars.json")
    plain = [{key.replace(VARIANT, ""): value for key, value in table.items()} for table in (names, keywords)]
    for style in SETS:
        print(f"{style}: {sheet(style, plain[0], plain[1], fallback, out)} images", flush=True)


if __name__ == "__main__":
    main()
