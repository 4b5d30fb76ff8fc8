"""What is refused before a cluster sees it: parameter files, and parameters that the compiled file has no place for."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.compiled import check_parameters, parameters_of, read_parameters
from spin.errors import SpinError

PACKAGE = Path(__file__).parents[1] / "golden" / "spin-diffusion.yaml"


def refusal(error: pytest.ExceptionInfo[SpinError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_parameters_of_the_compiled_file() -> None:
    parameters = parameters_of(PACKAGE)

    assert parameters["iterations"]["defaultValue"] == 2
    assert parameters["overrides"]["parameterType"] == "STRUCT"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"iterations": 1, "shards": 1, "gpu_count": 0, "run_key": "mine", "gpu_pool": {}},
        {"data_source": "s3://bucket/images", "tracking_uri": "", "store_endpoint": "https://s3.example"},
        {"preset": "sd15-lora", "overrides": {"train": {"beta": [3000], "steps": [50, 20]}}},
        {
            "preset": "sd15-paper",
            "base_model": "/models/sd15",
            "data_source": "/data/images",
            "draw_pool": {"tolerations": []},
        },
    ],
    ids=["defaults", "small", "elsewhere", "overrides", "own-model-and-data"],
)
def test_what_is_in_order(params: dict[str, Any]) -> None:
    check_parameters(PACKAGE, params)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"iteration": 2}, "expected a pipeline parameter, got 'iteration'; did you mean 'iterations'?"),
        ({"zzz": 2}, "expected a pipeline parameter, got 'zzz'; known: base_model, data_source, draw_pool, "),
        ({1: 2}, "expected a pipeline parameter, got 1; known: base_model, "),
        ({"iterations": "2"}, "expected a whole number for parameter 'iterations', got '2'; "),
        ({"iterations": 2.5}, "expected a whole number for parameter 'iterations', got 2.5; "),
        ({"iterations": True}, "expected a whole number for parameter 'iterations', got True; "),
        ({"run_key": None}, "expected text for parameter 'run_key', got None; "),
        ({"gpu_pool": "a100"}, "expected a mapping for parameter 'gpu_pool', got 'a100'; "),
        ({"overrides": {"train": {"steps": "many"}}}, "expected train.steps to be a list, got 'many'; "),
        ({"gpu_pool": {"node_selecter": {}}}, "expected a setting of gpu_pool, got 'node_selecter'; did you mean 'n"),
        ({"gpu_pool": {"node_selector": ["a100"]}}, "expected labels as a mapping of text, got ['a100']; correct gpu_"),
        ({"draw_pool": {"node_selector": {"spot": True}}}, "got {'spot': True}; correct draw_pool.node_selector"),
        ({"draw_pool": {"tolerations": {}}}, "expected a list of mappings, got {}; correct draw_pool.tolerations"),
        ({"preset": "emoji"}, "expected preset to be one of emoji-cpu, sd15-paper, sd15-lora, got 'emoji'; "),
        ({"iterations": 0}, "expected iterations of at least 1, got 0; "),
        ({"shards": -1}, "expected shards of at least 1, got -1; "),
        ({"gpu_count": -1}, "expected gpu_count of at least 0, got -1; "),
        ({"train_nodes": 0}, "expected train_nodes of at least 1, got 0; "),
        ({"overrides": {"train": {"betta": [1]}}}, "expected a known option, got 'train.betta'; did you mean 'beta'?"),
        ({"overrides": {"trian": {}}}, "expected a known option, got 'trian'; did you mean 'train'?"),
        ({"overrides": {"train": 5}}, "expected a mapping of options under train, got 5; "),
        ({"overrides": {"train": {"steps": [0]}}}, "expected train.steps.0 to be greater than 0, got 0; change it"),
        ({"overrides": {"train": {"batch_size": 7, "micro_batch_size": 2}}}, "multiple of micro_batch_size, got 7"),
        ({"gate": {"beter": {}}}, "expected a known option of the gate, got 'beter'; did you mean 'better'?"),
        ({"run_key": "../x"}, "expected a run key of letters, digits, '.', '_' and '-' (at most 63), got '../x'; "),
        ({"store_uri": "spin"}, "expected a store uri like s3://bucket/prefix, got 'spin'; set store_uri"),
        ({"store_endpoint": "minio:9000"}, "expected an S3 endpoint like http://host:9000, got 'minio:9000'; "),
        ({"tracking_uri": "sqlite:///x.db"}, "expected an MLflow server like http://host:5000, got 'sqlite:///x.db'; "),
        ({"data_source": "ftp://x/y"}, "got the address 'ftp://x/y' (data.source); copy the data to a local path"),
        ({"base_model": "ftp://x/y"}, "base_model: expected a model folder, its s3:// address or a hub name, got 'ftp"),
        ({"data_source": "hf:a b"}, "expected hf:NAME or hf:NAME@REVISION, got 'hf:a b' (data.source); "),
        ({"model_name": "a/b"}, "expected a registry name without '/', ':' and quotes, got 'a/b'; set model_name"),
        ({"overrides": [1]}, "expected a mapping for parameter 'overrides', got [1]; "),
    ],
)  # fmt: skip
def test_what_is_not(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpinError) as error:
        check_parameters(PACKAGE, params)

    assert expected in refusal(error)


def test_the_check_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither servers nor the environment: keys are the cluster's."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))

    check_parameters(PACKAGE, {"data_source": "hf:someone/images"})


def test_the_keys_of_arms_are_run_keys_too() -> None:
    comparison = PACKAGE.with_name("spin-comparison.yaml")
    with pytest.raises(SpinError, match=r"^expected a run key .*-dpo-0'; choose another$"):
        check_parameters(comparison, {"run_key": "x" * 60})


def test_only_what_a_pipeline_has_is_looked_at() -> None:
    comparison = PACKAGE.with_name("spin-comparison.yaml")
    assert "train_nodes" not in parameters_of(comparison)
    check_parameters(comparison, {})


def test_a_parameter_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("iterations: 3\nrun_key: größe\noverrides:\n  train: {beta: [3000]}\n", encoding="utf-8")

    assert read_parameters(path) == {"iterations": 3, "run_key": "größe", "overrides": {"train": {"beta": [3000]}}}


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_parameter_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)

    assert read_parameters(path) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"iterations: 2\noverrides: {train: [1\n", "expected ',' or ']', but got '<stream end>' (line 3)"),
        (b"iterations: 2\nrun_key: a: b\n", "mapping values are not allowed here (line 2)"),
        (b"iterations: 2\n--- \niterations: 3\n", "but found another document (line 2)"),
        (b"[1]: 2\n", "found unhashable key (line 1)"),
        (b"run_key: \xff\n", "unacceptable character #x00ff: invalid start byte"),
        (b"run_key: a\x00\n", "unacceptable character #x0000"),
        (b"- iterations\n", "expected a mapping of parameters in {path}, got list; use 'name: value'"),
        (b"[]\n", "expected a mapping of parameters in {path}, got list; use 'name: value'"),
        (b"iterations\n", "expected a mapping of parameters in {path}, got str; use 'name: value'"),
        (b"!!python/object/apply:os.mkdir [{made}]\n", "tag:yaml.org,2002:python/object/apply:os.mkdir"),
        (b"run_key: !!python/name:os.getcwd ''\n", "tag:yaml.org,2002:python/name:os.getcwd"),
        (b"run_key: !own tag\n", "could not determine a constructor for the tag '!own' (line 1)"),
    ],
    ids=[
        "unclosed", "two-colons", "two-documents", "list-as-name", "not-utf8", "nul", "list", "empty-list", "text",
        "python-call", "python-name", "own-tag",
    ],
)  # fmt: skip
def test_a_broken_parameter_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path, made = tmp_path / "params.yaml", tmp_path / "made"
    path.write_bytes(content.replace(b"{made}", str(made).encode()))

    with pytest.raises(SpinError) as error:
        read_parameters(path)

    message = refusal(error)
    assert str(path) in message
    assert expected.replace("{path}", str(path)) in message
    assert not made.exists()


def test_no_parameter_file(tmp_path: Path) -> None:
    with pytest.raises(SpinError, match=r"none\.yaml \(No such file or directory\); check --params"):
        read_parameters(tmp_path / "none.yaml")
    with pytest.raises(SpinError, match=r"\(Is a directory\); check --params"):
        read_parameters(tmp_path)
