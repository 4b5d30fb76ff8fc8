"""Prompt sets to measure on: those of the field by name, and any file of prompts."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin.data.dataset import Prompt
from spin.data.sources import MAX_CAPTION, group_sizes, sound
from spin.disk import scratch
from spin.download import download
from spin.errors import SpinError, printable
from spin.store import Ref, Store

COLUMNS = ("prompt", "text", "caption")
"""Names under which a prompt is looked for, the preferred one first; case does not matter."""
CATEGORIES = ("category", "style")
MAX_SIZE = 16 * 2**20
"""Bytes of a prompt set's file or columns, and characters of its prompts: three thousand are usual, all are drawn."""
ENDINGS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Known:
    """A prompt set with a name.

    Attributes:
        url: its public home; it names a commit, and so the content.
        count: prompts in it.
        licence: of the prompts, as their publisher states it.
        category: the category of a row from its number, where the file itself has none.
    """

    url: str
    count: int
    licence: str
    category: Callable[[int], str] | None = None


STYLES = ("anime", "concept-art", "paintings", "photo")
_COPIES = "https://raw.githubusercontent.com/AIDC-AI/Diffusion-SDPO/1c83c650fccbe7c1262e0b098401490162c7348d/prompts"
KNOWN = {
    "pickapic-test": Known(
        f"{_COPIES}/papv2.json", 487, "none stated by Pick-a-Pic v2; user-written and unfiltered, look before you show"
    ),
    "partiprompts": Known(
        "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/"
        "PartiPrompts.tsv",
        1632,
        "Apache-2.0",
    ),
    # 800 of each style, one style after the other; 28 prompts occur twice.
    "hpsv2-benchmark": Known(f"{_COPIES}/hpsv2.json", 3200, "Apache-2.0", lambda row: STYLES[row // 800]),
}


def stored(store: Store, source: str) -> Ref:
    """Return the prompt set ``source`` in the store, as a Parquet file of id, prompt and category.

    A known set is fetched from its home once per store, and from then on is what its digest says.

    Raises:
        SpinError: as ``read``.
    """
    known = KNOWN.get(source)
    place = f"prompt-sets/{source}-{hashlib.sha256(known.url.encode()).hexdigest()[:12]}.json" if known else ""
    if known and (found := store.read_json(place)):
        return Ref.model_validate(found)
    local = str(store.download(source)) if source.startswith("s3://") else source
    rows = read(local)
    with scratch() as work:
        path = work / "prompts.parquet"
        columns = {name: [getattr(row, name) for row in rows] for name in ("id", "prompt", "category")}
        pq.write_table(pa.table(columns), path)
        ref = store.put_file(path)
    if known:
        store.write_json(place, ref.model_dump(mode="json"))
    return ref


def load(path: Path) -> list[Prompt]:
    """Return the rows that ``stored`` wrote."""
    return [Prompt(**row) for row in pq.read_table(path).to_pylist()]


def read(source: str) -> list[Prompt]:
    """Return the prompts of a known set or a file, in its order.

    A prompt's id is its hash, so its seeds are the same in every file; a repeated one counts on.

    Raises:
        SpinError: an unknown name, a file of another kind or without prompts, or a set that is not what it was.
    """
    known = KNOWN.get(source)
    path = download(known.url) if known else Path(source).expanduser()
    if not known and path.suffix.lower() not in ENDINGS:
        raise SpinError(
            f"expected one of {', '.join(KNOWN)} or a file ({', '.join(ENDINGS)}), got {source!r}; set score.prompts"
        )
    if not path.is_file():
        raise SpinError(f"expected a file of prompts, got nothing at {source!r} (score.prompts); correct the path")
    try:
        if path.suffix.lower() != ".parquet" and path.stat().st_size > MAX_SIZE:
            raise _too_much(source)
        rows, size = list[tuple[str, str]](), 0
        for row in _rows(path):
            if (size := size + sum(map(len, row))) > MAX_SIZE:
                raise _too_much(source)
            rows.append(row)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        # pyarrow's errors are ValueErrors, and so are those of JSON and of text that is no UTF-8.
        raise SpinError(
            f"expected readable prompts, got {type(error).__name__} in {source!r} (score.prompts); write it again as "
            "UTF-8"
        ) from None
    if known and len(rows) != known.count:
        raise SpinError(f"expected {known.count} prompts in {source}, got {len(rows)} from {known.url}; it has changed")
    if not rows:
        raise SpinError(f"expected prompts, got none in {source!r} (score.prompts); name a file with some")
    seen: Counter[str] = Counter()
    found = []
    for number, (text, category) in enumerate(rows):
        prompt = " ".join(text.split())
        if not prompt or len(prompt) > MAX_CAPTION:
            raise SpinError(
                f"expected a prompt of 1 to {MAX_CAPTION} characters, got {len(prompt)} in row {number + 1} of "
                f"{source!r} (score.prompts); mend or remove it"
            )
        if not sound(prompt + category):
            raise SpinError(
                f"expected a prompt without lone surrogates, got one in row {number + 1} of {source!r} "
                "(score.prompts); mend or remove it"
            )
        id, times = hashlib.sha256(prompt.encode()).hexdigest()[:16], seen[prompt]
        seen[prompt] += 1
        if known and known.category:
            category = known.category(number)
        found.append(Prompt(f"{id}-{times}" if times else id, prompt, category))
    return found


def _rows(path: Path) -> Iterable[tuple[str, str]]:
    """Yield (prompt, category) of each row, both as they stand there."""
    ending = path.suffix.lower()
    if ending == ".txt":
        yield from ((line, "") for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    elif ending in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as lines:
            # Tab-separated files quote nothing: a quotation mark belongs to the prompt.
            options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {}
            yield from (_columns(row) for row in csv.DictReader(lines, **options))
    elif ending == ".parquet":
        yield from _table(path)
    else:
        text = path.read_text("utf-8-sig")
        # Only a line feed ends a line of JSON: a prompt may hold other signs that Python takes for ends.
        lined = [json.loads(line) for line in text.split("\n") if line.strip()] if ending == ".jsonl" else None
        values = json.loads(text) if lined is None else lined
        if not isinstance(values, list):
            raise ValueError("no list")
        yield from ((value, "") if isinstance(value, str) else _columns(value) for value in values)


def _table(path: Path) -> Iterable[tuple[str, str]]:
    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
        # Also where the same few words are kept once, as a dictionary of them.
        kinds = {field.name: getattr(field.type, "value_type", field.type) for field in table.schema_arrow}
        texts = [name for name, kind in kinds.items() if "string" in str(kind).partition("<")[0]]
        texts = [name for name in texts if name.strip().lower() in (*COLUMNS, *CATEGORIES)]
        if sum(group_sizes(table, texts)) > MAX_SIZE:
            raise _too_much(str(path))
        if not any(name.strip().lower() in COLUMNS for name in texts):
            _columns(dict.fromkeys(table.schema_arrow.names))
        # Rows may share one long text, which is made anew for each.
        for batch in table.iter_batches(batch_size=16, columns=texts):
            yield from map(_columns, batch.to_pylist())


def _too_much(source: str) -> SpinError:
    return SpinError(
        f"expected at most {MAX_SIZE // 2**20} MiB of prompts, got more in {source!r} (score.prompts); choose some"
    )


def _columns(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError("no row with columns")
    lower = {str(name).strip().lower(): value for name, value in row.items()}
    name = next((name for name in COLUMNS if isinstance(lower.get(name), str)), None)
    if name is None:
        raise SpinError(
            f"expected a column {' or '.join(map(repr, COLUMNS))} of text, got {printable(', '.join(lower)) or 'none'} "
            "(score.prompts); rename one"
        )
    category = next((lower[name] for name in CATEGORIES if lower.get(name)), "")
    return lower[name], category if isinstance(category, str) else ""
