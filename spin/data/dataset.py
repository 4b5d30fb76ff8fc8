"""The prepared data set: winners as latents, prompts with their splits, held-out real images.

A folder::

    index.parquet          id, prompt, split
    latents-*.safetensors  ``latents``: float16 [rows, C, H, W] in the denoiser's scale, and the rows' ids; train rows
                           and the first ``MOST_VALIDATION`` validation rows
    losers-*.safetensors   the same of the data's own losers, where it was prepared with pairs
    held-out.parquet       id, prompt, split, image (PNG) of validation and test rows
    rejections.jsonl       where and why, one line per rejected row
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from spin.emoji import Split

MOST_VALIDATION = 256
"""Validation rows that training measures itself on."""
ROWS_PER_FILE = 8192
"""Rows of latents in one file; as many are held in memory when it is written."""


@dataclass(frozen=True)
class Prompt:
    """A row's id and prompt, and the category that a prompt set gives it."""

    id: str
    prompt: str
    category: str = ""


@dataclass(frozen=True)
class HeldOut:
    """A prompt that is never trained on, with its real image."""

    id: str
    prompt: str
    image: Image.Image
    category: str = ""


class Dataset:
    """Read access to a prepared data set folder; latents are read row by row, never all at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        table = pq.read_table(folder / "index.parquet", columns=["id", "prompt", "split"])
        train = table.filter(pc.equal(table["split"], "train"))
        self.ids: list[str] = train["id"].to_pylist()
        self.prompts: list[str] = train["prompt"].to_pylist()
        validation = table.filter(pc.equal(table["split"], "validation")).slice(0, MOST_VALIDATION)
        self.validation = [Prompt(row["id"], row["prompt"]) for row in validation.to_pylist()]
        """Held-out rows with latents."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _latents(self) -> "Latents":
        return Latents.under([self.folder], "latents")

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one winner's latents."""
        return self._latents.shape

    def winners(self, ids: Sequence[str]) -> torch.Tensor:
        """Return the latents of the winners ``ids``, float32 [len(ids), C, H, W]."""
        return self._latents.of(ids)

    def losers(self) -> "Latents":
        """Return the losers of a data set that was prepared with pairs."""
        return Latents.under([self.folder], "losers")

    def held_out(self, split: Split, limit: int) -> list[HeldOut]:
        """Return at most ``limit`` rows of ``split``, in the order of the data set."""
        table = pq.read_table(self.folder / "held-out.parquet")
        rows = table.filter(pc.equal(table["split"], split)).slice(0, limit).to_pylist()
        return [HeldOut(row["id"], row["prompt"], Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]


class Latents:
    """Latents in several safetensors files, addressed by pair id; read row by row, never all at once."""

    def __init__(self, files: Sequence[Path]):
        self._where: dict[str, tuple[int, int]] = {}
        self._shards = []
        for number, path in enumerate(files):
            shard = safe_open(path, framework="pt")
            self._shards.append(shard.get_slice("latents"))
            ids = shard.metadata()["ids"].split()
            self._where |= {id: (number, row) for row, id in enumerate(ids)}

    @classmethod
    def under(cls, folders: Sequence[Path], side: str) -> "Latents":
        """Open the files of one side of the pairs (``latents``, ``winners``, ``losers``) in all ``folders``."""
        return cls([path for folder in folders for path in sorted(folder.glob(f"{side}*.safetensors"))])

    @staticmethod
    def write(path: Path, ids: Sequence[str], latents: torch.Tensor) -> None:
        """Write one file: ``latents`` [len(ids), C, H, W] as float16."""
        save_file({"latents": latents.half().cpu().contiguous()}, path, metadata={"ids": " ".join(ids)})

    def save(self, folder: Path, side: str) -> Path:
        """Write all rows into ``folder``, which is made, as files of ``ROWS_PER_FILE``; return it."""
        folder.mkdir()
        ids = self.ids
        for number, start in enumerate(range(0, max(1, len(ids)), ROWS_PER_FILE)):
            rows = ids[start : start + ROWS_PER_FILE]
            self.write(folder / f"{side}-{number:05d}.safetensors", rows, self.of(rows))
        return folder

    @property
    def ids(self) -> list[str]:
        """The ids of all rows, in the files' order."""
        return list(self._where)

    def __contains__(self, id: str) -> bool:
        return id in self._where

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        c, h, w = self._shards[0].get_shape()[1:]
        return c, h, w

    def of(self, ids: Sequence[str]) -> torch.Tensor:
        """Return the latents of ``ids``, float32 [len(ids), C, H, W]."""
        places = [self._where[id] for id in ids]
        if not places:
            return torch.zeros(0, *self.shape)
        return torch.stack([self._shards[shard][row] for shard, row in places]).float()
