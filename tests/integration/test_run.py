"""Run keys, configs and indexes in a real store."""

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from spin.config import RunConfig, override
from spin.errors import SpinError
from spin.presets import preset
from spin.run import Index, Run, iteration_stage, whole_iteration, whole_iterations
from spin.store import Ref
from tests.integration.world import World

pytestmark = pytest.mark.integration

CONFIG = preset("emoji-cpu")
NUMBERS = count()


@pytest.fixture
def run(world: World) -> Iterator[Run]:
    """A run that nobody has begun; what is left of it names objects that were never there, and is removed."""
    made = world.run(f"run-{next(NUMBERS)}")
    yield made
    for name in world.documents(made.key):
        made.store.remove_json(f"runs/{made.key}/{name}")


def index(stage: str, inputs: dict[str, Any], **facts: object) -> Index:
    ref = Ref(kind="file", digest="0" * 64, size=1, uri="s3://spin/objects/0")
    return Index(
        stage=stage, iteration=1, inputs=inputs, outputs={"model": ref}, facts=facts, seconds=1.5, items=3, producer={}
    )


def changed(**options: object) -> RunConfig:
    return override(CONFIG, options)


def test_config_is_what_the_run_began_with(world: World, run: Run) -> None:
    assert not run.began(CONFIG)
    assert world.documents(run.key) == {}
    run.begin(CONFIG)
    assert run.began(CONFIG)
    assert world.run(run.key).config() == CONFIG


def test_same_config_resumes(world: World, run: Run) -> None:
    run.begin(CONFIG)
    before = world.documents(run.key)
    world.run(run.key).begin(CONFIG)
    assert world.documents(run.key) == before


def test_a_run_older_than_an_option_resumes(world: World, run: Run) -> None:
    older = CONFIG.model_dump(mode="json")
    del older["train"]["ema_decay"]
    world.store().write_json(f"runs/{run.key}/run.json", {"config": older})
    assert run.began(CONFIG)
    with pytest.raises(SpinError, match=r"train\.ema_decay 0\.0 -> 0\.9"):
        run.began(changed(train={"ema_decay": 0.9}))


@pytest.mark.parametrize("method", ["began", "begin"])
def test_changed_config_names_the_options(world: World, run: Run, method: str) -> None:
    run.begin(CONFIG)
    before = world.documents(run.key)
    config = changed(train={"beta": [1000], "learning_rate": 0.5}, data={"limit": 5})
    with pytest.raises(SpinError) as refused:
        getattr(run, method)(config)
    line = str(refused.value)
    rate = f"train.learning_rate {CONFIG.train.learning_rate} -> 0.5"
    assert f"got data.limit None -> 5; train.beta {[*CONFIG.train.beta]} -> [1000.0]; {rate}; " in line
    assert repr(run.key) in line
    assert re.fullmatch(r"expected .+, got .+; choose another run key, .+", line)
    assert world.documents(run.key) == before


def test_config_of_no_run_is_refused(run: Run) -> None:
    with pytest.raises(SpinError, match=f"^expected a prepared run, got no run '{run.key}' in s3://.+; prepare it"):
        run.config()


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "a/b",
        "",
        ".",
        "..",
        "a..b",
        "a" * 64,
        "x\ny",
        "x\n",
        " ",
        "-x",
        "/x",
        "~",
        "a b",
        "a\\b",
        "ä",
        "a\0",
        "%2e",
    ],
)
def test_run_key_is_a_plain_name(world: World, key: str) -> None:
    with pytest.raises(SpinError) as refused:
        Run(world.store(), key)
    line = str(refused.value)
    assert repr(key) in line
    assert re.fullmatch(r"expected a run key of .+, got .+; choose another", line)


@pytest.mark.parametrize("key", ["a", "A-1_b.c", "a" * 63, "0"])
def test_plain_run_key_is_accepted(world: World, key: str) -> None:
    assert Run(world.store(), key).key == key


def test_stage_is_absent_until_it_is_finished(world: World, run: Run) -> None:
    stage, inputs = iteration_stage(1, "train"), {"opponent": "abc", "steps": 3}
    assert run.find(stage) is None
    made = run.finish(index(stage, inputs, loss=0.5))
    assert world.documents(run.key).keys() == {"iteration-001/train.json"}
    other = world.run(run.key)
    assert other.find(stage) == other.find(stage, {"steps": 3, "opponent": "abc"}) == other.need(stage, "x") == made


@pytest.mark.parametrize(
    "inputs", [{}, {"opponent": "abc"}, {"opponent": "abc", "steps": 4}, {"opponent": "abc", "steps": 3, "x": None}]
)
def test_other_inputs_do_not_find_the_stage(run: Run, inputs: dict[str, Any]) -> None:
    stage = iteration_stage(1, "train")
    run.finish(index(stage, {"opponent": "abc", "steps": 3}))
    assert run.find(stage, inputs) is None


def test_finished_again_replaces_the_index(run: Run) -> None:
    stage = iteration_stage(1, "train")
    run.finish(index(stage, {"steps": 3}))
    again = run.finish(index(stage, {"steps": 4}))
    assert run.find(stage, {"steps": 3}) is None
    assert run.find(stage, {"steps": 4}) == again


def test_missing_predecessor_is_named(run: Run) -> None:
    with pytest.raises(SpinError) as refused:
        run.need("iteration-001/train", "iteration-002/generate-0000-of-0001")
    assert re.fullmatch(
        f"expected iteration-001/train of run '{run.key}' to be complete before iteration-002/generate-0000-of-0001, "
        "got none in s3://spin/tests; run it first",
        str(refused.value),
    )


def test_unreadable_documents_are_refused(run: Run) -> None:
    """As another version of this package may have left them."""
    run.store.write_json(f"runs/{run.key}/prepare.json", {"stage": "prepare"})
    run.store.write_json(f"runs/{run.key}/run.json", {"config": {"preset": "emoji-cpu", "novel": 1}})
    for read in (lambda: run.find("prepare"), run.config):
        with pytest.raises(SpinError) as refused:
            read()
        assert re.fullmatch(f"expected runs/{run.key}/.+, got another (iteration|novel) .+; .+", str(refused.value))


def test_progress_is_kept_beside_the_stage(world: World, run: Run) -> None:
    assert run.read_progress("iteration-001/train") is None
    run.write_progress("iteration-001/train", {"parts": [], "step": 2})
    assert world.run(run.key).read_progress("iteration-001/train") == {"parts": [], "step": 2}
    assert run.find("iteration-001/train") is None


@pytest.mark.parametrize(
    ("value", "lowest"), [(0, 1), (-1, 1), (-1, 0), (1.5, 1), (float("nan"), 1), (float("inf"), 1)]
)
def test_iteration_is_a_whole_number(value: float, lowest: int) -> None:
    with pytest.raises(SpinError, match=f"^expected an iteration number of at least {lowest}, got {value}; "):
        whole_iteration(value, lowest)


def test_iteration_may_come_as_a_float() -> None:
    assert repr(whole_iteration(2.0, 1)) == "2"


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_number_of_iterations_is_a_count(value: float) -> None:
    with pytest.raises(SpinError, match=f"^expected at least 1 iteration, got {value}; "):
        whole_iterations(value)
    assert repr(whole_iterations(2.0)) == "2"
