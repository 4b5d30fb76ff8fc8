"""What a user can get wrong on the command line: one line on stderr, exit code 2, and nothing half-written."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from spin.__main__ import main
from spin.store import SOON
from tests import tiny
from tests.integration.world import World

pytestmark = pytest.mark.integration

NUMBERS = count()
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Attempt:
    """A command line that would work, until one thing about it is spoilt."""

    world: World
    folder: Path
    run_key: str = field(default_factory=lambda: f"bad-{next(NUMBERS)}")
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {
            "run-key": self.run_key,
            "store-uri": self.world.store_uri,
            "store-endpoint": self.world.servers.s3_endpoint,
            "tracking-uri": "",
            "base-model": str(self.world.base),
            "data-source": str(self.world.images),
        }
        self.override()

    def override(self, **sections: dict[str, object]) -> None:
        """Lay options over those of the tiny models, section by section."""
        options = tiny.overrides(self.world.judge)
        merged = options | {name: {**options.get(name, {}), **section} for name, section in sections.items()}
        self.options["overrides"] = json.dumps(merged)

    def arguments(self, command: str = "prepare") -> list[str]:
        names = self.options
        if command != "prepare":
            names = {name: names[name] for name in ("run-key", "store-uri", "store-endpoint", "tracking-uri")}
        return [command, *(f"--{name}={self.options[name]}" for name in names)]

    def images(self, number: int) -> Path:
        folder = tiny.images(self.folder / "images", number)
        self.options["data-source"] = str(folder)
        return folder

    def base(self) -> Path:
        folder = self.folder / "base"
        shutil.copytree(self.world.base, folder)
        self.options["base-model"] = str(folder)
        return folder


@pytest.fixture
def attempt(world: World, tmp_path: Path) -> Attempt:
    return Attempt(world, tmp_path)


@pytest.fixture
def untouched(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Check that neither the store nor the temporary folder holds anything new; give that folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = world.names()
    yield scratch
    assert world.names() == before
    assert list(scratch.iterdir()) == []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """Give a function that calls the command line in this process and returns (exit code, standard error)."""

    # How long a stage waits for a server that is away is tested with the store's faults.
    monkeypatch.setattr("spin.store.PATIENT", SOON)

    def call(arguments: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["spin", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spin", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def assert_one_line(code: int, err: str, pattern: str) -> None:
    assert code == 2
    assert re.fullmatch(rf"error: (?=.*{pattern}).+(; .+|\(in overrides\))\n", err), err


def missing_folder(attempt: Attempt) -> str:
    attempt.options["data-source"] = str(attempt.folder / "nowhere")
    return "expected .+, got '.+/nowhere' .+No such file"


def folder_without_images(attempt: Attempt) -> str:
    attempt.options["data-source"] = str(attempt.folder)
    return "expected images .+, got none"


def unreadable_images(attempt: Attempt) -> str:
    for path in attempt.images(10).glob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture")
    return r"expected at least one image with a caption, got 0 pairs .+\(10 unreadable\)"


def images_without_captions(attempt: Attempt) -> str:
    (attempt.images(10) / "metadata.jsonl").unlink()
    return r"expected at least one image with a caption, got 0 pairs .+\(10 no caption\)"


def fewer_pairs_than_a_batch(attempt: Attempt) -> str:
    attempt.images(7)
    return r"expected at least one batch of training pairs \(train.batch_size 8\), got \d pairs .+; add images or lower"


def wrong_kind_of_source(attempt: Attempt) -> str:
    path = attempt.folder / "notes.txt"
    path.write_text("no images")
    attempt.options["data-source"] = str(path)
    return "expected emoji, a folder, .+, got '.+notes.txt'"


def resolution_that_does_not_fit(attempt: Attempt) -> str:
    attempt.override(data={"resolution": 36})
    return "expected data.resolution to be a multiple of 8 for this model, got 36; set it to 32 or 40"


def nothing_held_out(attempt: Attempt) -> str:
    attempt.images(12)
    attempt.override(data={"held_out_share": 0})
    return "expected held-out prompts for validation and test, got 0 and 0 .+; raise data.held_out_share"


def missing_judge(attempt: Attempt) -> str:
    attempt.override(score={"clip_model": str(attempt.folder / "nowhere")})
    return "expected a CLIP model with safetensors, got .+; set score.clip_model"


def missing_base(attempt: Attempt) -> str:
    attempt.options["base-model"] = str(attempt.folder / "nowhere")
    return "expected .+, got .+/nowhere"


def base_that_is_no_pipeline(attempt: Attempt) -> str:
    attempt.options["base-model"] = str(attempt.world.judge)
    return "expected a diffusers pipeline folder with model_index.json, got .+; check base_model"


def base_with_a_pickle(attempt: Attempt) -> str:
    (attempt.base() / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return "expected safetensors weights, got the pickle unet/diffusion_pytorch_model.bin"


def base_with_a_pickle_only(attempt: Attempt) -> str:
    weights = attempt.base() / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return "expected safetensors weights, got the pickle vae/diffusion_pytorch_model.bin"


def base_with_damaged_weights(attempt: Attempt) -> str:
    (attempt.base() / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    return "expected a loadable diffusers pipeline, got .+"


def base_without_a_part(attempt: Attempt) -> str:
    shutil.rmtree(attempt.base() / "tokenizer")
    return "expected the folder .+/tokenizer, got none"


def base_of_another_family(attempt: Attempt) -> str:
    index = attempt.base() / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    return "expected a pipeline of class StableDiffusionPipeline or .+, got FluxPipeline; choose another base_model"


def exact_spin_of_a_flow(attempt: Attempt) -> str:
    attempt.options["base-model"] = str(tiny.base(attempt.folder / "flow", "sd3"))
    attempt.override(train={"objective": "exact-spin"})
    return "expected a diffusion model for exact-spin, got a flow model; use train.objective spin"


def unknown_preset(attempt: Attempt) -> str:
    attempt.options["preset"] = "emoji_cpu"
    return r"expected a preset, got 'emoji_cpu'; did you mean 'emoji-cpu'\?"


def unknown_override(attempt: Attempt) -> str:
    attempt.override(train={"learning_rat": 1e-4})
    return r"expected a known option, got 'train.learning_rat'; did you mean 'learning_rate'\?"


def unknown_section(attempt: Attempt) -> str:
    attempt.override(trian={"beta": [1]})
    return r"expected a known option, got 'trian'; did you mean 'train'\?"


def override_out_of_range(attempt: Attempt) -> str:
    attempt.override(train={"learning_rate": -1})
    return "expected train.learning_rate to be greater than 0, got -1"


def override_that_is_a_number(attempt: Attempt) -> str:
    attempt.options["overrides"] = "{train: {1: 2}}"
    return "train.1: Keys should be strings, got 1"


def section_that_is_a_number(attempt: Attempt) -> str:
    attempt.options["overrides"] = "{train: 1}"
    return "expected a mapping of options under train, got 1; nest it"


def overrides_that_are_a_list(attempt: Attempt) -> str:
    attempt.options["overrides"] = "[1, 2]"
    return r"expected overrides as a mapping, got '\[1, 2\]'"


def overrides_that_are_no_yaml(attempt: Attempt) -> str:
    attempt.options["overrides"] = "{train: {beta: ["
    return "expected overrides as YAML, JSON or @FILE, got .+ParserError"


def overrides_in_no_file(attempt: Attempt) -> str:
    attempt.options["overrides"] = f"@{attempt.folder}/nowhere.yaml"
    return "expected overrides as YAML, JSON or @FILE, got .+FileNotFoundError"


def overrides_in_a_binary_file(attempt: Attempt) -> str:
    (attempt.folder / "binary").write_bytes(b"\xff\xfe\x00")
    attempt.options["overrides"] = f"@{attempt.folder}/binary"
    return "expected overrides as YAML, JSON or @FILE, got .+UnicodeDecodeError"


def no_iterations(attempt: Attempt) -> str:
    attempt.options["iterations"] = "0"
    return "expected at least 1 iteration, got 0"


def negative_iterations(attempt: Attempt) -> str:
    attempt.options["iterations"] = "-1"
    return "expected at least 1 iteration, got -1"


def wrong_key(attempt: Attempt) -> str:
    attempt.environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
    return "expected S3 keys that may use this bucket, got .+; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def no_key(attempt: Attempt) -> str:
    attempt.environment["AWS_ACCESS_KEY_ID"] = None
    return "expected S3 keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, got none"


def no_bucket(attempt: Attempt) -> str:
    attempt.options["store-uri"] = "s3://no-such-bucket/tests"
    return "expected the bucket 'no-such-bucket', got none .+; create it, or set store_uri"


def data_in_no_bucket(attempt: Attempt) -> str:
    attempt.options["data-source"] = "s3://no-such-data/images"
    return "expected the bucket 'no-such-data', got none .+; create it, or correct s3://no-such-data/images"


def no_server(attempt: Attempt) -> str:
    attempt.options["store-endpoint"] = f"http://127.0.0.1:{closed_port()}"
    return "expected an S3 server, got .+Connection refused .+; check store_endpoint and the network"


def bad_endpoint(attempt: Attempt) -> str:
    attempt.options["store-endpoint"] = "127.0.0.1:9000"
    return "expected an S3 endpoint like http://host:9000, got '127.0.0.1:9000'; set store_endpoint"


CASES = [
    missing_folder, folder_without_images, unreadable_images, images_without_captions, fewer_pairs_than_a_batch,
    data_in_no_bucket, wrong_kind_of_source, resolution_that_does_not_fit, nothing_held_out, missing_judge,
    missing_base, base_that_is_no_pipeline, base_with_a_pickle,
    base_with_a_pickle_only, base_with_damaged_weights, base_without_a_part, base_of_another_family,
    exact_spin_of_a_flow, unknown_preset, unknown_override, unknown_section, override_out_of_range,
    override_that_is_a_number, section_that_is_a_number,
    overrides_that_are_a_list, overrides_that_are_no_yaml, overrides_in_no_file, overrides_in_a_binary_file,
    no_iterations, negative_iterations, wrong_key, no_key, no_bucket, no_server, bad_endpoint,
]  # fmt: skip


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]], monkeypatch: pytest.MonkeyPatch, spoil: Callable
) -> None:
    pattern = spoil(attempt)
    for name, value in attempt.environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    assert_one_line(*run(attempt.arguments()), pattern)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", ["../x", "a/b", "", ".", "a" * 64, "x\ny"])
@pytest.mark.parametrize("command", ["prepare", "generate"])
def test_run_key_is_no_path(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]], key: str, command: str
) -> None:
    attempt.options["run-key"] = key
    arguments = attempt.arguments(command) + (["--iteration=1"] if command == "generate" else [])
    assert_one_line(*run(arguments), f"expected a run key of .+, got {re.escape(repr(key))}; choose another")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["generate", "--iteration=0"], "expected an iteration number of at least 1, got 0"),
        (["train", "--iteration=-1"], "expected an iteration number of at least 1, got -1"),
        (["score", "--iteration=-1"], "expected an iteration number of at least 0, got -1"),
        (["register", "--iterations=0"], "expected at least 1 iteration, got 0"),
        (["generate", "--iteration=1", "--shards=0"], "expected at least 1 shard, got 0"),
        (["train", "--iteration=1", "--shards=0"], "expected at least 1 shard, got 0"),
        (["generate", "--iteration=1", "--shard=2", "--shards=2"], "expected a shard from 0 to 1, got 2"),
        (["generate", "--iteration=1"], "expected a prepared run, got no run 'bad-.+; prepare it first"),
        (["train", "--iteration=1"], "expected a prepared run, got no run 'bad-.+; prepare it first"),
        (["score", "--iteration=0"], "expected a prepared run, got no run 'bad-.+; prepare it first"),
        (["register", "--iterations=1"], "expected a prepared run, got no run 'bad-.+; prepare it first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_stage_out_of_order_or_range(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]], arguments: list[str], pattern: str
) -> None:
    command, *more = arguments
    assert_one_line(*run(attempt.arguments(command) + more), pattern)


@pytest.mark.usefixtures("played", "untouched")
def test_report_that_cannot_be_written(attempt: Attempt, run: Callable[[list[str]], tuple[int, str]]) -> None:
    attempt.options["run-key"] = "played"
    arguments = [*attempt.arguments("score"), "--iteration=0", f"--report={attempt.folder}/nowhere/report.html"]
    assert_one_line(*run(arguments), "expected to write the report, got No such file or directory")


def test_corrected_input_may_use_the_same_run_key(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]]
) -> None:
    """A failed preparation binds nobody to its options."""
    attempt.images(5)
    attempt.override(train={"beta": [1000]})
    assert run(attempt.arguments())[0] == 2
    attempt.options["data-source"] = str(attempt.world.images)
    attempt.override()
    assert run(attempt.arguments()) == (0, "")
    assert attempt.world.documents(attempt.run_key).keys() == {"run.json", "prepare.json"}


def test_changed_config_under_an_existing_run_key(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]]
) -> None:
    assert run(attempt.arguments()) == (0, "")
    before = attempt.world.names(), attempt.world.documents(attempt.run_key)
    attempt.override(train={"beta": [1000]}, data={"limit": 20})
    pattern = rf"expected the config that run '{attempt.run_key}' began with, got data.limit None -> 20; train.beta .+"
    assert_one_line(*run(attempt.arguments()), pattern)
    assert (attempt.world.names(), attempt.world.documents(attempt.run_key)) == before
    attempt.override()
    assert run(attempt.arguments()) == (0, "")
    assert attempt.world.documents(attempt.run_key) == before[1]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("arguments", [["--itertions=1"], ["--preset"], ["--iterations=many"], ["surplus"]])
def test_unknown_command_line_option(
    attempt: Attempt, run: Callable[[list[str]], tuple[int, str]], arguments: list[str]
) -> None:
    code, err = run([*attempt.arguments(), *arguments])
    assert code == 2
    assert arguments[0].partition("=")[0] in err
    assert "Traceback" not in err


@pytest.mark.parametrize("spoil", [missing_folder, fewer_pairs_than_a_batch, wrong_key], ids=lambda case: case.__name__)
def test_process_ends_with_one_line(attempt: Attempt, untouched: Path, spoil: Callable) -> None:
    pattern = spoil(attempt)
    ended = process(attempt.arguments(), TMPDIR=str(untouched), **attempt.environment)
    assert_one_line(ended.returncode, ended.stderr, pattern)
    assert "Traceback" not in ended.stdout


def test_process_refuses_unknown_options(attempt: Attempt, untouched: Path) -> None:
    ended = process([*attempt.arguments(), "--itertions=2"], TMPDIR=str(untouched))
    assert ended.returncode == 2
    assert "--itertions" in ended.stderr
    assert "--iterations" in ended.stderr
    assert "Traceback" not in ended.stderr
