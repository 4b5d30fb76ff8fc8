"""Fetch and render the emoji drawings into one array: ``python -m examples.emoji.world``.

The base draws four styles: noto (Apache-2.0), twemoji (CC-BY-4.0) and fluent-emoji-flat (MIT) from their npm
packages, OpenMoji (CC BY-SA 4.0) from PyPI. Autoencoder and judge see two older sets beside them: emojione
(CC-BY-4.0) and noto-v1 (Apache-2.0). Nothing of them is committed.

400 (concept, style) pairs are ``held_out``: no model of this folder ever trains on them. They are OpenMoji for
all validation and test concepts, and one of the other three styles for 250 training concepts.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from spin.emoji import concepts, openmoji_svg, render_svg
from spin.errors import SpinError, in_one_line

BUILD = Path(__file__).resolve().parents[2] / "build" / "emoji"
SIZE = 64
ICONIFY = ("noto", "twemoji", "fluent-emoji-flat")
STYLES = (*ICONIFY, "openmoji")
OLDER = ("emojione", "noto-v1")
# npm package versions are pinned so that a second build renders the same pixels.
PACKAGES = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
}
HELD_OUT_TRAIN_CONCEPTS = 250


@dataclass(frozen=True)
class Picture:
    """One row of the image array; ``player`` marks the concepts and styles that the base learns to draw."""

    codepoint: str
    prompt: str
    style: str
    held_out: bool
    player: bool


def held_out_pairs() -> set[tuple[str, str]]:
    """(code point, style) of the 400 drawings that no model sees; each concept misses at most one style."""
    pairs = {(concept.codepoint, "openmoji") for concept in concepts() if concept.split != "train"}
    train = concepts("train")
    for i, k in enumerate(np.random.RandomState(7).permutation(len(train))[:HELD_OUT_TRAIN_CONCEPTS]):
        pairs.add((train[k].codepoint, ICONIFY[i % len(ICONIFY)]))
    return pairs


def shows_held_out(codepoint: str, style: str, pairs: set[tuple[str, str]]) -> bool:
    """Compositions quote their parts (a black cat is a cat), and noto-v1 shares drawings with noto."""
    style = style.removesuffix("-v1")
    return any((part, style) in pairs for part in codepoint.split("-"))


def bare(codepoint: str) -> str:
    """Drop the variation selector, on which the sets disagree."""
    return "-".join(part for part in codepoint.upper().split("-") if part != "FE0F")


def skin_tone(codepoint: str) -> bool:
    return any("1F3FB" <= part <= "1F3FF" and len(part) == 5 for part in codepoint.split("-"))


def fetch() -> Path:
    """Install the npm packages below ``build/emoji`` and return their folder."""
    target = BUILD / "npm"
    folder = target / "node_modules" / "@iconify-json"
    if not all((folder / name).is_dir() for name in PACKAGES):
        npm = shutil.which("npm")
        if npm is None:
            raise SpinError("expected npm on the PATH, got none (to fetch the drawings); install Node.js with npm")
        target.mkdir(parents=True, exist_ok=True)
        names = [f"@iconify-json/{name}@{version}" for name, version in PACKAGES.items()]
        done = subprocess.run([npm, "install", "--ignore-scripts", "--prefix", str(target), *names])
        if done.returncode:
            raise SpinError(
                f"expected npm to fetch the drawings, got exit code {done.returncode}; see what it said and start again"
            )
    return folder


def iconify(folder: Path, style: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the style's code point -> icon name map (skin tones left out) and its parsed ``icons.json``."""
    chars = json.loads((folder / style / "chars.json").read_text())
    icons = json.loads((folder / style / "icons.json").read_text())
    names = {bare(code): name for code, name in chars.items() if name in icons["icons"]}
    return {code: name for code, name in names.items() if not skin_tone(code)}, icons


def older(folder: Path, style: str, codes: dict[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """As ``iconify``, for sets without code points: their names are looked up in ``codes``."""
    icons = json.loads((folder / style / "icons.json").read_text())
    return {codes[name]: name for name in icons["icons"] if name in codes}, icons


def iconify_svg(icons: dict[str, Any], name: str) -> str:
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
    codes = {name: code for chars, _ in sets.values() for code, name in chars.items()}
    sets |= {style: older(folder, style, codes) for style in OLDER}
    played = {concept.codepoint: concept.prompt for concept in concepts()}
    held_out = held_out_pairs()
    images, rows = [], []
    for code in sorted({code for chars, _ in sets.values() for code in chars}):
        drawings = {style: iconify_svg(icons, chars[code]) for style, (chars, icons) in sets.items() if code in chars}
        with suppress(FileNotFoundError):
            drawings["openmoji"] = openmoji_svg(code)
        name = next(chars[code] for chars, _ in sets.values() if code in chars)
        for style, drawing in drawings.items():
            images.append(np.asarray(render_svg(drawing, SIZE)))
            player = code in played and style in STYLES
            prompt = played.get(code, name.replace("-", " "))
            rows.append(Picture(code, prompt, style, shows_held_out(code, style, held_out), player))
    stacked = np.stack(images)
    part = array.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, stacked)
    part.replace(array)
    part.write_text(json.dumps([asdict(row) for row in rows]))
    part.replace(index)
    return stacked, rows


def run(main: Callable[..., None]) -> None:
    """Run a script; what its user can mend is one line on stderr and exit code 2."""
    with in_one_line():
        typer.run(main)


def main() -> None:
    _, pictures = build()
    for style in (*STYLES, *OLDER):
        print(f"{style:18} {sum(picture.style == style for picture in pictures)}")
    print(f"{len(pictures)} pictures, {sum(picture.held_out for picture in pictures)} of them held out, in {BUILD}")


if __name__ == "__main__":
    run(main)
