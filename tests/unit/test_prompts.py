"""Prompt sets: every kind of file, the known sets' rules, and what is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin import prompts
from spin.errors import SpinError
from spin.prompts import KNOWN, read

TEXTS = ['a "quoted" cat', "a dog, sitting", "<script>alert(1)</script>"]


def written(path: Path) -> Path:
    rows = [{"Prompt": text, "Category": f"c{i}"} for i, text in enumerate(TEXTS)]
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\n\n".join(TEXTS) + "\n")
    elif path.suffix == ".tsv":
        path.write_text("Prompt\tCategory\n" + "".join(f"{row['Prompt']}\t{row['Category']}\n" for row in rows))
    elif path.suffix == ".csv":
        quoted = ['"' + row["Prompt"].replace('"', '""') + '"' for row in rows]
        path.write_text("id,Prompt,Category\n" + "".join(f"7,{text},c{i}\n" for i, text in enumerate(quoted)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", prompts.ENDINGS)
def test_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    found = read(str(written(tmp_path / f"mine{ending}")))
    assert [row.prompt for row in found] == TEXTS
    assert [row.category for row in found] == (["", "", ""] if ending == ".txt" else ["c0", "c1", "c2"])


def test_seeds_belong_to_the_prompt_not_to_the_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("cat\ndog\ncat\n")
    other.write_text("bird\ndog\ncat\n")
    ids = [{row.prompt: row.id for row in reversed(read(str(path)))} for path in (one, other)]
    assert ids[0]["cat"] == ids[1]["cat"]
    assert ids[0]["dog"] == ids[1]["dog"]
    assert len({row.id for row in read(str(one))}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "got nothing at"),
        ("pickapic", None, "expected one of pickapic-test, partiprompts, hpsv2-benchmark or a file"),
        ("a.txt", "\n\n", "expected prompts, got none"),
        ("a.csv", "id,words\n1,cat\n", "expected a column 'prompt' or 'text' or 'caption' of text, got id, words"),
        ("a.json", "{", "expected readable prompts, got JSONDecodeError"),
        ("a.json", "[1]", "expected readable prompts, got ValueError"),
        ("a.json", '{"prompt": "cat"}', "expected readable prompts, got ValueError"),
        ("a.parquet", "no table", "expected readable prompts, got ArrowInvalid"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": " "}\n', "got 0 in row 2"),
        ("a.txt", "x" * 10_001, "got 10001 in row 1"),
        ("a.json", "[" * 10**6, "expected readable prompts, got RecursionError"),
        ("a.json", '["\\ud800 cat"]', "expected a prompt without lone surrogates, got one in row 1"),
        ("a.txt", "x\n" * (8 * 2**20 + 1), "expected at most 16 MiB of prompts, got more"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SpinError) as caught:
        read(str(tmp_path / name) if "." in name else name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_columns_of_a_table_are_not_read(tmp_path: Path) -> None:
    """A data set with its images may be a prompt set."""
    rows = {"Prompt": TEXTS, "style": ["a", None, "b"], "image": [bytes(6 * 2**20)] * 3, "category": [1, 2, 3]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", use_dictionary=False)
    found = read(str(tmp_path / "a.parquet"))
    assert [(row.prompt, row.category) for row in found] == [*zip(TEXTS, ["a", "", "b"], strict=True)]


def test_a_column_of_few_words_may_be_a_dictionary_of_them(tmp_path: Path) -> None:
    words = pa.array(TEXTS).dictionary_encode()
    pq.write_table(pa.table({"prompt": words, "category": words}), tmp_path / "a.parquet")
    assert [(row.prompt, row.category) for row in read(str(tmp_path / "a.parquet"))] == [
        *zip(TEXTS, TEXTS, strict=True)
    ]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SpinError, match="expected readable prompts, got UnicodeDecodeError"):
        read(str(tmp_path / "a.txt"))


def test_the_known_sets_name_a_commit_and_a_count() -> None:
    assert {name: known.count for name, known in KNOWN.items()} == {
        "pickapic-test": 487, "partiprompts": 1632, "hpsv2-benchmark": 3200,
    }  # fmt: skip
    for known in KNOWN.values():
        assert any(len(part) == 40 for part in known.url.split("/"))
        assert known.licence


def test_the_benchmark_has_its_styles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hpsv2.json"
    path.write_text(json.dumps([{"prompt": f"p{i % 3172}", "gen_image_path": "", "metadata": {}} for i in range(3200)]))
    monkeypatch.setattr(prompts, "download", lambda _: path)
    rows = read("hpsv2-benchmark")
    assert [rows[i].category for i in (0, 799, 800, 1600, 2400, 3199)] == [
        "anime", "anime", "concept-art", "paintings", "photo", "photo",
    ]  # fmt: skip
    assert len({row.id for row in rows}) == 3200
    path.write_text(json.dumps([{"prompt": "p"}]))
    with pytest.raises(SpinError, match="expected 3200 prompts in hpsv2-benchmark, got 1 from https://"):
        read("hpsv2-benchmark")
