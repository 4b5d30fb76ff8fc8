"""Whatever the input, the answer is a value, a counted rejection or one line, of cases generated and made by hand."""

import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from spin import models, prompts
from spin.config import DataConfig, RunConfig, override
from spin.data.sources import MAX_CAPTION, Rejection, Row, read
from spin.errors import SpinError
from spin.presets import PRESETS, preset
from spin.run import RUN_KEY, Index, Run, whole_iteration, whole_iterations, whole_shards
from spin.sampling import batches, shard_batches
from spin.seeding import seed_of
from spin.store import Ref, Store, digest_of
from tests.faults.handmade import CASES

ROOT = Path(__file__).resolve().parents[2]
GENERATED: Counter[str] = Counter()
"""Cases that each test has had."""
bounded = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def hostile(test: Any) -> Any:
    """Give a test of generated cases its settings, and count its cases."""
    inner = test.hypothesis.inner_test
    GENERATED[inner.__name__] = 0

    @functools.wraps(inner)
    def counted(*args: Any, **options: Any) -> None:
        GENERATED[inner.__name__] += 1
        inner(*args, **options)

    test.hypothesis.inner_test = counted
    return bounded(test)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.one_of(
    st.text(max_size=200),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "{0.__class__} %s %n {prompt}",
            "\u202egnp.exe",
            "../../etc/passwd",
            "\x00\x1b[2J\r\n",
            "a" * (MAX_CAPTION + 1),
            "\N{PILE OF POO}" * 500,
            "a " * 500_000,
        ]
    ),
)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


PICTURES = [
    *(encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")),
    encoded("JPEG", "CMYK"),
    encoded("PNG", "I;16"),
    encoded("PNG", "P"),
    encoded("PNG", "LA"),
    encoded("PNG", "1", (1, 1)),
    encoded("PNG", "1", (30_000, 2)),
    encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")] * 3),
]


@st.composite
def damaged(draw: st.DrawFn, whole: Sequence[bytes]) -> bytes:
    """One of ``whole`` with bytes overwritten, cut out, doubled, or with its end missing."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        # Headers are where a lie does most.
        place = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([16, 64, 600, 10**6])))))
        match draw(st.sampled_from(["overwrite", "remove", "double", "end"])):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=8))
                data[place : place + len(new)] = new
            case "remove":
                del data[place : place + draw(st.integers(1, 64))]
            case "double":
                data[place:place] = data[place : place + 64]
            case "end":
                del data[place:]
    return bytes(data)


def is_one_line(error: SpinError) -> None:
    assert "expected " in str(error)
    assert "\n" not in str(error)


def answers(source: Path, **options: Any) -> list[Row | Rejection]:
    """Read ``source``; every answer must be a usable row or a rejection that can be shown, a refusal one line."""
    try:
        found = list(read(DataConfig(source=str(source), resolution=16, min_size=8, **options)))
    except SpinError as error:
        is_one_line(error)
        return []
    for item in found:
        if isinstance(item, Row):
            assert item.image.size == (16, 16)
            assert item.image.mode == "RGB"
            assert 0 < len(item.prompt) <= MAX_CAPTION
            assert item.id.isalnum()
        else:
            assert item.where.isprintable()
            assert item.reason
    return found


def folder_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@hostile
@given(data=damaged(PICTURES), caption=TEXTS)
def test_images_and_captions(tmp_path: Path, data: bytes, caption: str) -> None:
    source = tmp_path / "images"
    source.mkdir(exist_ok=True)
    (source / "a.png").write_bytes(data)
    (source / "a.txt").write_bytes(caption.encode(errors="surrogatepass"))
    assert len(answers(source)) == 1


@hostile
@given(lines=st.lists(st.one_of(JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=80)), max_size=6))
def test_metadata_lines(tmp_path: Path, lines: list[bytes]) -> None:
    source = tmp_path / "listed"
    source.mkdir(exist_ok=True)
    (source / "a.png").write_bytes(PICTURES[0])
    (source / "metadata.jsonl").write_bytes(b"\n".join(lines))
    assert answers(source)


@hostile
@given(name=TEXTS.filter(lambda text: "\x00" not in text))
def test_names_in_metadata(tmp_path: Path, name: str) -> None:
    source = tmp_path / "named"
    source.mkdir(exist_ok=True)
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    (source / "a.png").write_bytes(PICTURES[0])
    rows = [{"file_name": name, "text": "x"}, {"file_name": "../secret.png", "text": "x"}]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not [item for item in answers(source) if isinstance(item, Row)] or name == "a.png"


def archive(members: Sequence[tuple[str, bytes, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    return stream.getvalue()


KINDS = [
    tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
    tarfile.DIRTYPE, tarfile.CONTTYPE,
]  # fmt: skip
NAMES = st.sampled_from(
    ["a.png", "a.txt", "../b.png", "/c.png", "d/../../e.txt", "a.json", "a.PNG", "f" * 300 + ".png"]
)


@hostile
@given(
    members=st.lists(
        st.tuples(NAMES, st.sampled_from(KINDS), st.sampled_from([PICTURES[0], b"a cat", b""])), max_size=6
    ),
    spoil=st.booleans(),
    more=st.data(),
)
def test_archives(tmp_path: Path, members: list[tuple[str, bytes, bytes]], spoil: bool, more: st.DataObject) -> None:
    data = archive(members)
    (tmp_path / "data.tar").write_bytes(more.draw(damaged([data])) if spoil else data)
    before = folder_of(tmp_path)
    answers(tmp_path / "data.tar")
    assert folder_of(tmp_path) == before


def table(columns: dict[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


@hostile
@given(data=damaged([table({"image": [PICTURES[0], b"", PICTURES[1]], "text": ["a", "b", None]})]))
def test_tables(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data.parquet").write_bytes(data)
    answers(tmp_path / "data.parquet")


@pytest.mark.parametrize("values", [[1, 2], [1.5, math.nan], [True, False], [[1], [2]], [{"a": 1}, None], ["x", "y"]])
def test_columns_of_other_types(tmp_path: Path, values: list[Any]) -> None:
    for columns in ({"image": values, "text": ["a", "b"]}, {"image": [PICTURES[0], PICTURES[1]], "text": values}):
        (tmp_path / "data.parquet").write_bytes(table(columns))
        rows = [item for item in answers(tmp_path / "data.parquet") if isinstance(item, Row)]
        assert not rows or values == ["x", "y"]


@hostile
@given(options=JSON)
def test_overrides(options: Any) -> None:
    refused_or_valid(lambda: override(preset("sd15-paper"), options))


SECTIONS = {name: list(value) for name, value in preset("sd15-paper").model_dump().items() if isinstance(value, dict)}


@hostile
@given(more=st.data(), section=st.sampled_from(sorted(SECTIONS)), value=JSON)
def test_overrides_of_known_options(more: st.DataObject, section: str, value: Any) -> None:
    option = more.draw(st.sampled_from(SECTIONS[section]))
    refused_or_valid(lambda: override(preset("sd15-paper"), {section: {option: value}}))


def refused_or_valid(act: Callable[[], RunConfig]) -> None:
    try:
        config = act()
    except SpinError as error:
        is_one_line(error)
        return
    dumped = config.model_dump(mode="json")
    assert RunConfig.model_validate(json.loads(json.dumps(dumped, allow_nan=False))) == config
    digest_of(dumped)


@hostile
@given(key=TEXTS)
def test_run_keys(key: str) -> None:
    try:
        Run(None, key)  # type: ignore[arg-type]
    except SpinError as error:
        is_one_line(error)
        return
    assert RUN_KEY.fullmatch(key)
    assert ".." not in key
    assert "/" not in key


@hostile
@given(
    uri=st.one_of(
        TEXTS,
        st.sampled_from(
            [
                "file:///etc",
                "s3://b/../x",
                "s3://169.254.169.254/latest",
                "http://metadata/",
                "s3://",
                "s3://UP/x",
                "s3://a",
            ]
        ),
        TEXTS.map(lambda text: f"s3://spin/{text}"),
    ),
    endpoint=st.one_of(
        TEXTS, st.sampled_from(["file:///x", "http://h:99999", "http://a@b/", "http://h/path", "gopher://h"])
    ),
)
def test_addresses(uri: str, endpoint: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "k")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        for pair in ((uri, "http://localhost:1"), ("s3://spin", endpoint)):
            try:
                store = Store(*pair)
            except SpinError as error:
                is_one_line(error)
            else:
                assert ".." not in store.prefix
                assert store.endpoint.lower().startswith(("http://", "https://"))


@hostile
@given(value=st.one_of(st.floats(), st.integers()))
def test_numbers_of_loops(value: float) -> None:
    for check, lowest in ((lambda v: whole_iteration(v, 1), 1), (whole_iterations, 1), (whole_shards, 1)):
        try:
            assert check(value) == value >= lowest
        except SpinError as error:
            is_one_line(error)


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "metadata.google.internal"])
def test_no_data_or_model_is_an_address(host: str) -> None:
    """That an endpoint may be the metadata service's address, which network policies forbid, the threat model says."""
    for act in (
        lambda: list(read(DataConfig(source=f"http://{host}/latest"))),
        lambda: models.find(f"http://{host}/latest"),
        lambda: prompts.read(f"http://{host}/latest.txt"),
    ):
        with pytest.raises(SpinError) as refused:
            act()
        is_one_line(refused.value)
    assert "metadata address" in (ROOT / "docs/threat-model.md").read_text()


MOST_BYTES = 512 * 2**20
MOST_SECONDS = 10


@pytest.mark.timeout(900)
def test_cases_made_by_hand(tmp_path: Path) -> None:
    """A picture of 9400 x 9400 pixels has 353 MB decoded; nothing else comes near that."""
    command = [sys.executable, "-m", "tests.faults.handmade", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [case["name"] for case in found] == list(CASES), ended.stderr[-2000:]
    for case in found:
        assert re.fullmatch(CASES[case["name"]][1], case["answer"]), case
        assert len(case["answer"]) < 3000, case
        assert case["bytes"] < MOST_BYTES, case
        assert case["cpu"] < MOST_SECONDS, case


# --- state


@hostile
@given(count=st.integers(0, 500), size=st.integers(1, 70), shards=st.integers(1, 40))
def test_every_pair_is_in_one_shard(count: int, size: int, shards: int) -> None:
    dealt = [rows for shard in range(shards) for rows in shard_batches(count, size, shard, shards)]
    assert sorted(i for rows in dealt for i in rows) == list(range(count))
    assert sorted(dealt, key=lambda rows: rows.start) == batches(count, size)


NAME_PARTS = st.one_of(st.text(max_size=12), st.integers())


@hostile
@given(names=st.lists(st.lists(NAME_PARTS, min_size=1, max_size=5).map(tuple), min_size=2, max_size=40, unique=True))
def test_other_names_have_other_seeds(names: list[tuple[str | int, ...]]) -> None:
    said = {tuple(map(str, name)) for name in names}
    assert len({seed_of(*name) for name in names}) == len(said)


REFS = st.builds(
    Ref,
    kind=st.sampled_from(["file", "folder"]),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    size=st.integers(0, 2**60),
    uri=st.text(max_size=30),
)
NUMBERS = st.dictionaries(st.text(max_size=10), st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@hostile
@given(
    index=st.builds(
        Index, stage=st.text(max_size=20), iteration=st.integers(0, 10**6), inputs=NUMBERS, facts=NUMBERS,
        outputs=st.dictionaries(st.text(max_size=10), REFS, max_size=3), items=st.integers(0, 10**12),
        seconds=st.floats(0, 1e9), producer=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    ),
    spoil=st.tuples(st.sampled_from(sorted(Index.model_fields)), JSON),
)  # fmt: skip
def test_an_index_comes_back(index: Index, spoil: tuple[str, Any]) -> None:
    document = json.loads(json.dumps(index.model_dump(mode="json")))
    assert Index.model_validate(document) == index
    try:
        Index.model_validate(document | {spoil[0]: spoil[1]})
    except ValidationError:
        return
    with pytest.raises(ValidationError):
        Index.model_validate(document | {"more": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plain_json(name: str) -> None:
    config = preset(name)
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert np.isfinite(config.train.beta).all()


def test_the_cases_are_counted() -> None:
    """The documents say how many there are."""
    if not all(GENERATED.values()):
        pytest.skip("not every test has run in this process")
    said = re.search(r"(\d+) generated cases and (\d+) made by hand", (ROOT / "docs/reliability.md").read_text())
    assert said, GENERATED.total()
    assert 200 <= int(said[1]) <= GENERATED.total(), GENERATED
    assert int(said[2]) == len(CASES)
