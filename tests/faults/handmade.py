"""Inputs made by hand to cost memory or time, or to surprise a parser; ``python -m tests.faults.handmade FOLDER``.

Each is read in this process, which may not take more than ``ADDRESSES`` bytes of addresses; a line of JSON per case
says what the answer was and what it took. ``test_hostile.py`` starts it and judges.
"""

import functools
import gc
import io
import json
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spin import prompts
from spin.__main__ import _mapping
from spin.config import DataConfig, override
from spin.data.sources import Row, read
from spin.errors import SpinError
from spin.presets import preset

ADDRESSES = 12 * 2**30
"""Libraries map a few gigabytes that they never touch."""
SECONDS = 60
"""After which a case is given up."""
MILLION = 2**20

Act = Callable[[], list[str]]
Case = Callable[[Path], Act]
CASES: dict[str, tuple[Case, str]] = {}
"""By name: what makes the input below a folder and returns what reads it, and a pattern of the whole answer."""


def add(name: str, answer: str, case: Case) -> None:
    assert name not in CASES, name
    CASES[name] = case, answer


def encoded(kind: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


SMALL = encoded("PNG", "RGB", (32, 32))


def reading(source: Path) -> Act:
    config = DataConfig(source=str(source), resolution=16, min_size=8)
    return lambda: ["row" if isinstance(item, Row) else item.reason for item in read(config)]


# --- pictures


def picture(kind: str, mode: str, size: tuple[int, int], **options: Any) -> Case:
    def make(folder: Path) -> Act:
        (folder / "a.png").write_bytes(encoded(kind, mode, size, **options))
        (folder / "a.txt").write_text("a cat")
        return reading(folder)

    return make


add("picture RGBA 9400x9400", "row", picture("PNG", "RGBA", (9400, 9400)))
add("picture with a transparent colour", "row", picture("PNG", "P", (5000, 5000), transparency=0))
for mode in ("RGB", "LA", "P", "1", "I;16"):
    add(f"picture {mode} 3000x3000", "row", picture("PNG", mode, (3000, 3000)))
add("picture JPEG CMYK 3000x3000", "row", picture("JPEG", "CMYK", (3000, 3000)))
add("picture GIF 3000x3000", "row", picture("GIF", "P", (3000, 3000)))
add("picture BMP 3000x3000", "row", picture("BMP", "RGB", (3000, 3000)))
add("picture 30000x100", "row", picture("PNG", "RGB", (30_000, 100)))
add("picture 100x30000", "row", picture("PNG", "RGBA", (100, 30_000)))
add("picture 8x11000000", "row", picture("PNG", "1", (8, 11_000_000)))
add("picture 20000x20000", "too large: more than .+", picture("PNG", "1", (20_000, 20_000)))


# --- captions and metadata


def folder_with(name: str, content: Callable[[], bytes]) -> Case:
    def make(folder: Path) -> Act:
        (folder / "a.png").write_bytes(SMALL)
        (folder / name).write_bytes(content())
        return reading(folder)

    return make


def line(size: int) -> bytes:
    return b'{"file_name":"a.png","text":"x","z":[' + b"{}," * (size // 3) + b"1]}\n"


LONG = r"caption too long: \d+ bytes, at most 100000"
add("caption of a megabyte", LONG, folder_with("a.txt", lambda: b"ab " * (MILLION // 3)))
add("caption of 63 MB", LONG, folder_with("a.txt", lambda: b"ab " * (21 * MILLION)))
add("caption of spaces", LONG, folder_with("a.txt", lambda: b" " * (63 * MILLION)))
METADATA = r"too large: a line of more than 100000 bytes; no caption: not in metadata.jsonl"
add("metadata line of 63 MB", METADATA, folder_with("metadata.jsonl", lambda: line(63 * MILLION)))
add(
    "metadata goes on after a long line",
    r"too large: a line of more than 100000 bytes; row",
    folder_with("metadata.jsonl", lambda: line(MILLION) + line(30)),
)
add(
    "metadata of brackets",
    "unreadable: expected a JSON object with file_name; no caption: .+",
    folder_with("metadata.jsonl", lambda: b"[" * 99_000),
)


# --- archives


def header(name: str, size: int | bytes, kind: bytes = b"0") -> bytes:
    """Return a tar header, which may say what it likes."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148], block[148:156], block[156:157], block[257:265] = b"00000000000\0", b" " * 8, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(body: bytes, kind: bytes = b"x") -> bytes:
    return header("p", len(body), kind) + body + bytes(-len(body) % 512)


def record(key: str, value: str) -> bytes:
    text, length = f" {key}={value}\n".encode(), 0
    while length != len(str(length)) + len(text):
        length = len(str(length)) + len(text)
    return str(length).encode() + text


def archive(*parts: bytes) -> Case:
    def make(folder: Path) -> Act:
        (folder / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
        return reading(folder / "a.tar")

    return make


def members(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()[:-1024]


TAR = "expected an intact, uncompressed tar archive, got .+"
PLAIN = header("a.txt", 512) + bytes(512)
NEGATIVE = b"\xff" * 8 + struct.pack(">i", -512)
add("archive with 3000 extended headers", TAR, archive(extended(record("a", "b")) * 3000))
add("archive with 3000 long names", TAR, archive(extended(b"abc\0", b"L") * 3000))
add("archive with a name of 60 MB", TAR, archive(extended(b"a" * (60 * MILLION), b"L"), PLAIN))
add("archive with 60 MB of records", TAR, archive(extended(record("a", "b") * (10 * MILLION)), PLAIN))
add("archive with a caption of 60 MB", LONG, archive(members(("a.txt", b"ab " * (20 * MILLION)), ("a.png", SMALL))))
add("archive with a record of 60 MB", LONG, archive(members(("a.json", line(60 * MILLION)), ("a.png", SMALL))))
for what, size in {"-512": "-512", "5000 digits": "9" * 5000, "1e30": "1" + "0" * 30, "words": "many"}.items():
    add(f"archive with a size of {what}", f"{TAR}|no .+", archive(extended(record("size", size)), PLAIN))
for kind in (b"0", b"L", b"x", b"S"):
    add(f"archive with a negative size in {kind.decode()}", f"{TAR}|no .+|", archive(header("a.txt", NEGATIVE, kind)))
add("archive that claims a terabyte", "too large: .+|" + TAR, archive(header("a.png", 2**33 - 1), bytes(512)))
for key in ("GNU.sparse.map", "GNU.sparse.size", "hdrcharset", "path"):
    add(f"archive with an odd {key}", ".*", archive(extended(record(key, "0,\x00x")), PLAIN))


# --- tables


def table(columns: Callable[[], dict[str, Any]], **options: Any) -> Case:
    def make(folder: Path) -> Act:
        pq.write_table(pa.table(columns()), folder / "a.parquet", compression="zstd", **options)
        return reading(folder / "a.parquet")

    return make


def cell(size: int, kind: pa.DataType) -> pa.Array:
    """Return one value of ``size`` zeros, next to nothing in memory."""
    offsets = pa.py_buffer(struct.pack("<qq", 0, size))
    return pa.Array.from_buffers(kind, 1, [None, offsets, pa.py_buffer(bytes(size))])


GROUPS = r"expected row groups of at most 512 MiB, got \d+ MiB .+; write the table again with smaller ones"
BYTES = r"too large: \d+ bytes, at most 67108864"
NO_IMAGE = "no image: expected its bytes in the row"
add(
    "table with a cell of 520 MiB",
    GROUPS,
    table(lambda: {"image": cell(520 * MILLION, pa.large_binary()), "text": ["a"]}, use_dictionary=False),
)
add(
    "table with 50 references to one cell of 8 MiB",
    "; ".join(["unreadable: UnidentifiedImageError"] * 50),
    table(
        lambda: {"image": pa.array([bytes(8 * MILLION)] * 50, pa.large_binary()), "text": [str(i) for i in range(50)]},
        use_dictionary=["image"],
        dictionary_pagesize_limit=2**30,
    ),
)
add(
    "table with 16 references to one cell of 64 MiB",
    "; ".join([BYTES] * 16),
    table(
        lambda: {
            "image": pa.DictionaryArray.from_arrays(
                pa.array([0] * 16, pa.int32()), cell(64 * MILLION + 1, pa.large_binary())
            ),
            "text": [str(i) for i in range(16)],
        },
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    ),
)
add(
    "table with a caption of 60 MiB",
    r"caption too long: \d+ bytes, at most 100000",
    table(lambda: {"image": [SMALL], "text": ["ab " * (20 * MILLION)]}, use_dictionary=False),
)
for name in ("image", "text"):
    add(
        f"table with {name} of 20 million nothings",
        NO_IMAGE if name == "image" else "no caption",
        table(
            lambda name=name: {
                "image": [SMALL],
                "text": ["a"],
                name: pa.ListArray.from_arrays(pa.array([0, 20_000_000], pa.int32()), pa.nulls(20_000_000, pa.int8())),
            }
        ),
    )


# --- prompts


def prompt_file(name: str, content: Callable[[], bytes]) -> Case:
    def make(folder: Path) -> Act:
        (folder / name).write_bytes(content())
        return lambda: [str(len(prompts.read(str(folder / name))))]

    return make


def prompt_table(folder: Path) -> Act:
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["ab " * 3000]))
    pq.write_table(pa.table({"prompt": words}), folder / "a.parquet", store_schema=False)
    return lambda: [str(len(prompts.read(str(folder / "a.parquet"))))]


MUCH = "expected at most 16 MiB of prompts, got more .+"
add(
    "prompts of brackets",
    "expected readable prompts, got RecursionError.+",
    prompt_file("a.json", lambda: b"[" * 10**6),
)
add(
    "prompts in lines of brackets",
    "expected readable prompts, got RecursionError.+",
    prompt_file("a.jsonl", lambda: b"[" * 10**6),
)
for what in (b'["\\ud800 cat"]', b'[{"prompt": "\\udfff"}]'):
    add(
        f"prompts with a lone surrogate {what[2:3].decode()}",
        "expected a prompt without lone surrogates, got one in row 1 .+",
        prompt_file("a.json", lambda what=what: what),
    )
add("prompts of 70 MB", MUCH, prompt_file("a.txt", lambda: b"a" * (70 * MILLION)))
add("prompts of 70 MB of nothing", MUCH, prompt_file("a.json", lambda: b"[" + b"{}," * (23 * MILLION) + b"1]"))
add("prompts that refer to one", MUCH, prompt_table)


# --- options


def overrides(text: str) -> Case:
    return lambda _: lambda: [override(preset("sd15-paper"), _mapping("overrides", text)).preset]


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [" + ",".join([f"*{chr(97 + i)}"] * 10) + "]\n" for i in range(7)
)
YAML = "expected overrides as YAML, JSON or @FILE, got .+"
add("options of aliases", YAML, overrides(ALIASES))
add("options of one alias", YAML, overrides("{train: {beta: &b [1]}, data: {limit: *b}}"))
for text in (
    "!!python/object/apply:os.system ['id']", "!!python/name:os.system", "{data: {limit: !!int ''}}",
    "{data: {limit: !!float ''}}", "{train: {shared_noise: !!bool x}}", "{data: {limit: !!timestamp x}}",
    "{preset: !!binary YQ==}", "{train: {beta: !!set {1,2}}}", "{train: {beta: !!omap [a: 1]}}", "!x 1",
):  # fmt: skip
    add(f"options with the tag {text[:40]}", YAML, overrides(text))
add("options of brackets", YAML, overrides("[" * 3000 + "]" * 3000))
add("options of braces", YAML, overrides("{a: " * 2000 + "1" + "}" * 2000))
add("options of a megabyte", YAML, overrides("{preset: " + "x" * MILLION + "}"))
for text in ("{a: 2020-99-99}", "{[1]: 2}", "{train: {<<: 3}}", "{a: 0x}", "{a: \x07}", "{a: 1", "\ud800"):
    add(f"options {text!r}", f"{YAML}|expected a .+", overrides(text))
HEX = "0x" + "f" * 5000
for text in (
    f"{{train: {{seed: {HEX}}}}}", f"{{train: {{seed: -{HEX}}}}}", f"{{train: {HEX}}}", f"{{{HEX}: 1}}",
    f"{{train: {{beta: [{HEX}]}}}}", f"{{score: {{template: {HEX}}}}}", f"{{data: {{limit: {HEX}}}}}", HEX,
    f"{{train: {{{HEX}: 1}}}}", f"{{train: {{link: {HEX}}}}}",
):  # fmt: skip
    add(f"options with many digits {text.replace(HEX, 'H')}", "(?=.*(expected|should)).+", overrides(text))


def nested(depth: int) -> Any:
    return functools.reduce(lambda inner, _: {"train": inner}, range(depth), 1)


def given(options: Any) -> Case:
    return lambda _: lambda: [override(preset("sd15-paper"), options).preset]


SURPRISE = "a\nb\x1b[31m\u2028\ud800"
for name, options in {
    "deep": nested(2000),
    "deep in a list": {"train": {"beta": functools.reduce(lambda inner, _: [inner], range(2000), 1)}},
    "resamples": {"score": {"bootstrap": 10**12}},
    "steps": {"train": {"steps": [10**15], "decay_steps": 0}},
    "resolution": {"data": {"resolution": 8 * 10**9}},
    "a long value": {"train": {"link": "x" * MILLION}},
    "a long list": {"train": {"link": [1] * MILLION}},
    "a long name": {"x" * MILLION: 1},
    "a long section": {"train": "x" * MILLION},
    "long overrides": ["x" * MILLION],
    "a surprising name": {SURPRISE: 1},
    "a surprising section": {"train": SURPRISE},
    "a surprising scorer": {"score": {"weights": {SURPRISE: 1}}},
    "a surprising scorer with weights": {"score": {"weights": {SURPRISE: {"source": "x"}}}},
    "a surprising option of weights": {"score": {"weights": {"clip_score": {SURPRISE: "x"}}}},
    "a long scorer": {"score": {"weights": {"x" * MILLION: 1}}},
    "a surprising template": {"score": {"template": SURPRISE}},
    "a long template": {"score": {"template": "x" * MILLION}},
    "long scorers": {"score": {"scorers": ["x" * MILLION]}},
    "many scorers": {"score": {"scorers": ["clip_score"] * 10**5}},
}.items():
    add(f"options with {name}", r"(?=.*expected).+", given(options))


# --- models


def model(file: str, content: Callable[[bytes], bytes]) -> Case:
    def make(folder: Path) -> Act:
        from spin import models

        base = shutil.copytree(tiny_base(folder.parent), folder / "base")
        (base / file).write_bytes(content((base / file).read_bytes()))

        def load() -> list[str]:
            import torch

            models.load(base, torch.device("cpu")).latents_shape(32)
            return ["loaded"]

        return load

    return make


@functools.cache
def tiny_base(folder: Path) -> Path:
    from tests import tiny

    return tiny.base(folder / "tiny-base")


def tensors(head: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), offsets: tuple[int, ...] = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LOADABLE = "expected a loadable diffusers pipeline, got .+"
for name, data in {
    "claims 2^63 bytes of header": tensors({"a": 1}, length=2**63 - 1),
    "claims 1 GB of header": tensors({}, length=10**9),
    "has 5 MB of header": tensors(b"{" + b" " * (5 * MILLION) + b"}"),
    "points beyond its end": tensors({"a": entry()}, b"1"),
    "points backwards": tensors({"a": entry(offsets=(16, 0))}, bytes(16)),
    "points before its start": tensors({"a": entry(offsets=(-16, 0))}, bytes(16)),
    "claims 2^40 numbers": tensors({"a": entry(shape=(2**40,))}, bytes(16)),
    "claims 2^126 numbers": tensors({"a": entry(shape=(2**63, 2**63))}, bytes(16)),
    "overlaps": tensors({"a": entry(), "b": entry()}, bytes(16)),
    "has a hole": tensors({"a": entry(offsets=(16, 32))}, bytes(32)),
    "names no type": tensors({"a": entry("X")}, bytes(16)),
    "names a rare type": tensors({"a": entry("F8_E8M0", offsets=(0, 4))}, bytes(4)),
    "names another type": tensors({"conv_in.weight": entry("BOOL", (16,))}, bytes(16)),
    "holds no text": tensors(b"\xff\xfe{"),
    "holds brackets": tensors(b"[" * 100_000),
    "is empty": b"",
    "ends in its length": b"\1\0\0",
    "is a pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
}.items():
    file = "unet/diffusion_pytorch_model.safetensors"
    long = "header" in name or name == "is a pickle"
    add(
        f"model whose file {name}",
        "expected a header of at most .+" if long else LOADABLE,
        model(file, lambda _, data=data: data),
    )


def changed(**options: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | options).encode()


MEMORY = f"{LOADABLE}|expected memory for the model.+"
CONFIG = "expected .+ of at most .+, got .+"
for part, options, answer in (
    ("unet", {"layers_per_block": 10**7}, CONFIG),
    ("unet", {"layers_per_block": [2, 10**7]}, CONFIG),
    ("unet", {"transformer_layers_per_block": [[10**7], 1]}, CONFIG),
    ("unet", {"down_block_types": ["DownBlock2D"] * 10**4}, CONFIG),
    ("unet", {"down_block_types": ["DownBlock2D"] * 10**5}, "expected a config of at most .+"),
    ("text_encoder", {"num_hidden_layers": 10**7}, CONFIG),
    ("vae", {"layers_per_block": 10**7}, CONFIG),
    ("unet", {"norm_num_groups": 0}, LOADABLE),
    ("unet", {"block_out_channels": [2**20, 2**20]}, MEMORY),
    ("unet", {"block_out_channels": []}, LOADABLE),
    ("unet", {"layers_per_block": "x"}, LOADABLE),
    ("unet", {"cross_attention_dim": 2**40}, MEMORY),
    ("unet", {"act_fn": "__import__"}, LOADABLE),
    ("unet", {"in_channels": -1}, LOADABLE),
    ("unet", {"sample_size": 10**9}, "loaded"),
    ("unet", {"_class_name": "os.system"}, f"loaded|{LOADABLE}"),
    ("text_encoder", {"hidden_size": 2**40}, MEMORY),
    ("text_encoder", {"num_attention_heads": 0}, LOADABLE),
    ("text_encoder", {"vocab_size": 2**50}, MEMORY),
    ("vae", {"norm_num_groups": 0}, LOADABLE),
):
    shown = f"{part} {next(iter(options))} {str(next(iter(options.values())))[:24]} {len(str(options))}"
    add(f"model with {shown}", answer, model(f"{part}/config.json", changed(**options)))
add("model with brackets", "expected a JSON object in .+", model("model_index.json", lambda _: b"[" * 10**6))
add("model with a part of brackets", "expected .+", model("unet/config.json", lambda _: b"[" * 10**6))


# --- measured


def peak() -> int:
    """Return the most memory that this process has held since the last ``forget``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget() -> int:
    """Begin to measure anew; return what is held now."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


class Slow(BaseException):
    """Too much time; no ``Exception``, which a parser might take for one of its own."""


def give_up(*_: object) -> None:
    raise Slow


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Make and read one case; ``answer`` begins with ``!`` where it is no answer."""
    folder.mkdir()
    act = CASES[name][0](folder)
    before = forget()
    started, used = time.monotonic(), time.process_time()
    signal.alarm(SECONDS)
    try:
        answer = "; ".join(act())
    except SpinError as error:
        answer = str(error)
    except BaseException as error:
        answer = f"!{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    took = {"seconds": time.monotonic() - started, "cpu": time.process_time() - used, "bytes": peak() - before}
    shutil.rmtree(folder)
    return {"name": name, "answer": answer[:20_000], **took}


def main(folder: Path, names: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.signal(signal.SIGALRM, give_up)
    # What is loaded once is no case's memory.
    tried(next(name for name in CASES if "sample_size" in name), folder / "first")
    gc.collect()
    gc.freeze()
    for number, name in enumerate(names or CASES):
        print(json.dumps(tried(name, folder / str(number))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
