"""Weights of scorers: from a hub name, a folder or S3, pinned by revision and digest; safetensors alone."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.errors import SpinError
from spin.store import digest_of, digest_of_file

if TYPE_CHECKING:
    import torch

    from spin.config import WeightsConfig

PATTERNS = ("model*.safetensors", "*.json", "*.txt")
"""Files that make up the weights of a scorer: network, configuration, vocabulary. Nothing else is fetched or read."""
MADE_FOR = "scorer.json"
"""What ``convert-weights`` leaves beside converted weights: for which scorer, and of which file."""


@dataclass(frozen=True)
class Part:
    """Files of a hub repository at one commit."""

    repo: str
    revision: str
    files: tuple[str, ...] = PATTERNS

    def fetch(self, named_by: str = "the name") -> Path:
        """Return the folder of a download from the model hub; ``named_by`` is the option to correct.

        Raises:
            SpinError: no such repository or revision, or no network.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=list(self.files)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise SpinError(
                f"expected {self.repo} at revision {self.revision} on the model hub, got {type(error).__name__}; check "
                f"{named_by} and the network, or give a folder with these files"
            ) from None


class Weights:
    """Finds the weights of scorers, and remembers their digests.

    Args:
        pins: ``score.weights``.
        download: returns the local copy of an ``s3://`` address.
    """

    def __init__(
        self, pins: "Mapping[str, WeightsConfig] | None" = None, download: Callable[[str], Path] | None = None
    ):
        self._pins, self._download = pins or {}, download
        self._linked: list[tempfile.TemporaryDirectory[str]] = []
        self.digests: dict[str, str] = {}
        """Digest of the weights of each scorer that was asked for, and of the Fréchet distance's image model."""

    def fetched(self, source: str) -> str:
        """Return ``source``, or the local copy of an ``s3://`` address."""
        if not source.startswith("s3://"):
            return source
        if self._download is None:
            raise SpinError(f"expected a folder or hub name, got {source!r}; fetch it first, there is no store here")
        return str(self._download(source))

    def judge(self, name: str) -> str:
        """Return the folder of ``score.clip_model``, or the name itself where it can be nothing but a folder."""
        return self._named("score.clip_model", "clip_score", "judge", name)

    def features(self, name: str) -> str:
        """Return the folder of ``score.frechet_model``, or the name itself where it can be nothing but a folder."""
        return self._named("score.frechet_model", "frechet_distance", "features", name)

    def _named(self, option: str, measure: str, part: str, name: str) -> str:
        found = Path(packaged(part, self.fetched(name))).expanduser()
        if not found.is_dir():
            if name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
                return name
            repository, _, revision = name.partition("@")
            found = Part(repository, revision or "main").fetch(option)
        self.digests[measure] = digest_of_weights(found)
        return str(found)

    def folder(self, scorer: str, parts: Sequence[Part] = ()) -> Path:
        """Return a folder with ``model.safetensors`` and what belongs to it.

        It is what ``score.weights`` names for ``scorer``, else ``parts`` of the hub put side by side.

        Raises:
            SpinError: nothing is named and nothing public could be loaded as it is, the weights were made for another
                scorer, or their digest is not the one asked for.
        """
        pin = self._pins.get(scorer)
        if pin is None and not parts:
            raise SpinError(
                f"expected weights for the scorer {scorer}, got none: its authors publish a pickle; convert it once "
                f"with `python -m spin convert-weights {scorer} FOLDER` and set score.weights.{scorer}.source"
            )
        if pin is None:
            folder = self._beside(parts)
        elif (path := Path(self.fetched(pin.source)).expanduser()).is_dir():
            folder = path
        elif pin.source.startswith(("/", ".", "~")):
            raise SpinError(f"expected a folder, got nothing at {pin.source} (score.weights.{scorer}); correct it")
        else:
            folder = Part(pin.source, pin.revision or "main").fetch(f"score.weights.{scorer}")
        self._check(scorer, folder, pin.digest if pin else "")
        return folder

    def _beside(self, parts: Sequence[Part]) -> Path:
        self._linked.append(tempfile.TemporaryDirectory(prefix="spin-weights-"))
        target = Path(self._linked[-1].name)
        for part in parts:
            found = part.fetch()
            for pattern in part.files:
                for path in found.glob(pattern):
                    if not (target / path.name).exists():
                        (target / path.name).symlink_to(path.resolve())
        return target

    def _check(self, scorer: str, folder: Path, wanted: str) -> None:
        where = f"{folder} (score.weights.{scorer})"
        if not (folder / "model.safetensors").is_file():
            raise SpinError(
                f"expected model.safetensors in {where}, got none; convert the authors' file with "
                f"`python -m spin convert-weights {scorer} FOLDER`"
            )
        got = digest_of_weights(folder)
        if wanted and got != wanted:
            raise SpinError(f"expected weights with digest {wanted[:12]}, got {got[:12]} in {where}; fetch them again")
        if (note := folder / MADE_FOR).is_file():
            made_for = read_json(note).get("scorer")
            if made_for != scorer:
                raise SpinError(
                    f"expected weights of {scorer}, got those of {made_for} in {where}; name the right ones"
                )
        self.digests[scorer] = got


def packaged(part: str, name: str) -> str:
    """Return the folder of the package's own ``part`` (``judge``, ``features``) for ``emoji``, else ``name``."""
    return str(files("spin.emoji") / part) if name == "emoji" else name


def digest_of_weights(folder: Path) -> str:
    """Return the SHA-256 that stands for a folder of weights: that of the names and digests of its files."""
    found = {path.name for pattern in PATTERNS for path in folder.glob(pattern)}
    return digest_of({name: digest_of_file(folder / name) for name in found})


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, an empty one where there is something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read(folder: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of ``model.safetensors``.

    Raises:
        SpinError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise SpinError(
            f"expected intact weights, got none in {folder}; name the folder that holds model.safetensors"
        ) from None
    except (SafetensorError, OSError) as error:
        raise SpinError(
            f"expected intact weights, got a damaged model.safetensors in {folder} ({type(error).__name__}); fetch it "
            "again"
        ) from None


def read_parts(folder: Path) -> "defaultdict[str, dict[str, torch.Tensor]]":
    """Return the tensors of ``model.safetensors`` by the first word of their names, without it."""
    parts: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in read(folder).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


def network(kind: Any, config: Any, state: "Mapping[str, torch.Tensor]", what: str, **options: Any) -> Any:
    """Return ``kind(config)`` of transformers with the weights ``state``, each of which must fit.

    Raises:
        SpinError: a weight is missing, left over or of another shape: it is another architecture.
    """
    import torch

    with torch.device("meta"):
        wanted = {name: value.shape for name, value in kind(config, **options).state_dict().items()}
    # Older checkpoints carry this table of 0, 1, 2, ...; current networks make it themselves.
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    for name in sorted({*wanted, *state}):
        if name not in state or name not in wanted or state[name].shape != wanted[name]:
            got = list(state[name].shape) if name in state else "none"
            expected = list(wanted[name]) if name in wanted else "none"
            raise SpinError(
                f"expected weights of {what}, got others: {name} is {got}, not {expected}; name the right ones"
            )
    return kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.float32, **options)
