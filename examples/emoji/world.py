"""Fetch and render the four emoji styles into one array: ``python examples/emoji/world.py``.

noto (Apache-2.0), twemoji (CC-BY-4.0) and fluent-emoji-flat (MIT) come from their npm packages, OpenMoji
(CC BY-SA 4.0) from PyPI. Nothing of them is committed. OpenMoji drawings of validation and test concepts are
marked ``held_out``: no model of this folder ever trains on them.
"""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from spin.emoji import concepts, openmoji_svg, render_svg

BUILD = Path(__file__).resolve().parents[2] / "build" / "emoji"
SIZE = 64
ICONIFY = ("noto", "twemoji", "fluent-emoji-flat")
STYLES = (*ICONIFY, "openmoji")
# npm package versions are pinned so that a second build renders the same pixels.
PACKAGES = {"noto": "1.2.9", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6"}


@dataclass(frozen=True)
class Picture:
    """One row of the image array; ``player`` marks the concepts that the base learns to draw."""

    codepoint: str
    prompt: str
    style: str
    held_out: bool
    player: bool


def bare(codepoint: str) -> str:
    """Drop the variation selector, on which the sets disagree."""
    return "-".join(part for part in codepoint.upper().split("-") if part != "FE0F")


def fetch() -> Path:
    """Install the npm packages below ``build/emoji`` and return their folder."""
    target = BUILD / "npm"
    folder = target / "node_modules" / "@iconify-json"
    if not folder.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        names = [f"@iconify-json/{name}@{PACKAGES[name]}" for name in ICONIFY]
        subprocess.run(["npm", "install", "--ignore-scripts", "--prefix", str(target), *names], check=True)
    return folder


def iconify(folder: Path, style: str) -> tuple[dict[str, str], dict]:
    """Return the style's code point -> icon name map and its parsed ``icons.json``."""
    chars = json.loads((folder / style / "chars.json").read_text())
    icons = json.loads((folder / style / "icons.json").read_text())
    return {bare(code): name for code, name in chars.items() if name in icons["icons"]}, icons


def iconify_svg(icons: dict, name: str) -> str:
    """Wrap an icon's body in a square drawing (non-square icons are centred)."""
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} width="{side}" height="{side}" viewBox="{box}">{icon["body"]}</svg>'


def build() -> tuple[np.ndarray, list[Picture]]:
    """Return uint8 images [N, 64, 64, 3] and their rows; rendered once, then read from ``build/emoji``."""
    array, index = BUILD / "world.npy", BUILD / "world.json"
    if index.exists():
        return np.load(array), [Picture(**row) for row in json.loads(index.read_text())]
    folder = fetch()
    sets = {style: iconify(folder, style) for style in ICONIFY}
    played = {concept.codepoint: concept for concept in concepts()}
    images, rows = [], []
    for code, name in sorted(sets["noto"][0].items()):
        if "-" in code or any(code not in chars for chars, _ in sets.values()):
            continue
        try:
            drawings = {"openmoji": openmoji_svg(code)}
        except FileNotFoundError:
            continue
        drawings |= {style: iconify_svg(icons, chars[code]) for style, (chars, icons) in sets.items()}
        concept = played.get(code)
        for style in STYLES:
            held_out = style == "openmoji" and concept is not None and concept.split != "train"
            prompt = concept.prompt if concept else name.replace("-", " ")
            images.append(np.asarray(render_svg(drawings[style], SIZE)))
            rows.append(Picture(code, prompt, style, held_out, concept is not None))
    np.save(array, np.stack(images))
    index.write_text(json.dumps([asdict(row) for row in rows]))
    return np.stack(images), rows


if __name__ == "__main__":
    pixels, pictures = build()
    print(f"{len(pictures)} pictures of {len({p.codepoint for p in pictures})} concepts in {BUILD}")
