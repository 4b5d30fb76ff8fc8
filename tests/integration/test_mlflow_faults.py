"""MLflow behind a faulty network: training goes on, and what it had to tell arrives late, whole, in order and once."""

import itertools
import re
import time
from collections.abc import Callable, Iterator

import pytest
from mlflow import MlflowClient

from spin import tracking
from spin.errors import SpinError
from spin.run import Index
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.register import register
from spin.stages.score import score
from spin.stages.train import train
from spin.training import Trainer
from tests.faults.proxy import Answer, Fault, Proxy, Request, after, mlflow_error, slow
from tests.integration.conftest import Played
from tests.integration.test_tracking import Interrupted, only, points, sheets
from tests.integration.world import BUCKET, PREFIX, World

pytestmark = pytest.mark.integration
NUMBER = itertools.count()
TRAINING = "iteration-001/train"
CURVES = ("loss", "winner_drift", "learning_rate")


@pytest.fixture
def proxy(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A way to MLflow; every step is told at once, and a server that was away is asked again at the next one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setattr(tracking, "SECONDS_BEFORE_RETRY", 0.0)
    proxy = Proxy(world.servers.mlflow_uri)
    yield proxy
    if proxy.listens:
        proxy.refuse()


@pytest.fixture(scope="module")
def client(world: World) -> MlflowClient:
    return MlflowClient(tracking_uri=world.servers.mlflow_uri)


def drawn(world: World, run_key: str, **training: object) -> Place:
    """Return the place, without MLflow, of a run that is to be trained next."""
    place = world.place(run_key)
    world.prepare(place, **training)
    generate(place, 1)
    return place


def before_step(monkeypatch: pytest.MonkeyPatch, changes: dict[int, Callable[[], object]]) -> None:
    """Call ``changes`` before the steps that they are named by."""
    do = Trainer.train_step

    def step(self: Trainer, *given: object) -> dict[str, float]:
        changes.pop(self.step + 1, lambda: None)()
        return do(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", step)


def assert_told(client: MlflowClient, index: Index, run_key: str, steps: int) -> None:
    run = only(client, run_key, TRAINING)
    assert run.info.status == "FINISHED"
    for name in CURVES:
        assert [step for step, _ in points(client, run, name)] == [*range(1, steps + 1)]
    assert points(client, run, "loss")[-1][1] == index.facts["final_loss"]
    assert run.data.tags["spin.model"] == index.outputs["model"].digest
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["index.json"]


def none(_: Request, forward: Callable[[], Answer]) -> Answer:
    return forward()


def login(*_: object) -> Answer:
    body = b"<html>Please log in"
    return Answer(200, [("Content-Type", "text/html"), ("Content-Length", str(len(body)))], body)


def lost(_: Request, forward: Callable[[], Answer]) -> Answer:
    """Let the server do what it is asked, and lose its answer."""
    answer = forward()
    answer.send = 0
    return answer


def test_every_fault_within_one_stage(
    world: World,
    client: MlflowClient,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Down at the start; then it comes and goes, each time in another way; at the end it is well."""
    place = drawn(world, "mlflow-faulty", steps=[30])
    proxy.refuse()
    counts = []

    def asked() -> None:
        # Steps do not wait for the server, so that the test has to.
        deadline = time.monotonic() + 30
        while counts and len(proxy.seen) == counts[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
        counts.append(len(proxy.seen))

    def fault(kind: Fault) -> Callable[[], object]:
        def change() -> None:
            asked()
            proxy.fault = kind

        return change

    changes = {
        3: proxy.listen,
        6: proxy.refuse,
        9: proxy.listen,
        **{
            first: fault(kind)
            for first, kind in [
                (10, lambda *_: mlflow_error(403, "PERMISSION_DENIED")),
                (13, none),
                (14, lambda *_: mlflow_error(503, "TEMPORARILY_UNAVAILABLE")),
                (17, none),
                # A version that does not know what it is asked.
                (18, lambda *_: mlflow_error(404, "ENDPOINT_NOT_FOUND")),
                (21, none),
                (22, login),
                (25, none),
                (26, lost),
                (29, none),
            ]
        },
    }
    before_step(monkeypatch, changes)
    index = train(world.place("mlflow-faulty", proxy.endpoint), 1)
    assert changes == {}, "all of it happened"
    assert all(later > earlier for earlier, later in itertools.pairwise(counts)), "it was asked in between"
    assert index == world.run("mlflow-faulty").find(TRAINING)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings
    assert not [line for line in warnings if "\n" in line]
    assert_told(client, index, "mlflow-faulty", 30)
    assert train(place, 1) == index


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda *_: mlflow_error(403, "PERMISSION_DENIED"), id="403"),
        pytest.param(lambda *_: mlflow_error(404, "ENDPOINT_NOT_FOUND"), id="wrong-version"),
        pytest.param(login, id="login-page"),
    ],
)
def test_a_server_that_refuses_all_along_is_told_by_a_rerun(
    world: World, client: MlflowClient, proxy: Proxy, caplog: pytest.LogCaptureFixture, kind: Fault
) -> None:
    name = f"mlflow-refuses-{next(NUMBER)}"
    drawn(world, name)
    proxy.fault = kind
    index = train(world.place(name, proxy.endpoint), 1)
    assert f"{TRAINING} is safe in the store, run the stage again to log it" in caplog.text
    proxy.fault = none
    assert train(world.place(name, proxy.endpoint), 1) == index
    assert_told(client, index, name, 3)


def test_no_step_waits_for_a_slow_server(world: World, client: MlflowClient, proxy: Proxy) -> None:
    """Each answer takes a second; the steps take what they take, and all is told at the end."""
    with tracking.stage(world.place("mlflow-slow", proxy.endpoint), TRAINING, 1) as log:
        proxy.fault = slow(1.0)
        waits = []
        for step in range(1, 201):
            asked = time.monotonic()
            log.step(step, {"loss": 0.5, "margin": 1.0 / step})
            waits.append(time.monotonic() - asked)
            time.sleep(0.01)
        assert len(proxy.seen) > 1, "it was told meanwhile"
        assert max(waits) < 0.2
        assert sum(waits) < 0.5
    for name in ("loss", "margin"):
        assert [step for step, _ in points(client, only(client, "mlflow-slow", TRAINING), name)] == [*range(1, 201)]


def test_what_a_killed_attempt_did_not_tell_comes_first(
    world: World, client: MlflowClient, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve's points are in order by their times too, which the server lists them by."""
    place = drawn(world, "mlflow-killed", steps=[6])

    def kill() -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        before_step(patch, {4: kill})
        with pytest.raises(Interrupted):
            train(place, 1)
    index = train(world.place("mlflow-killed", proxy.endpoint), 1)
    assert_told(client, index, "mlflow-killed", 6)


STAGES: dict[str, Callable[[World, Place], object]] = {
    "prepare": lambda world, place: world.prepare(place),
    "iteration-001/generate-0000-of-0001": lambda _, place: generate(place, 1),
    "iteration-000/score": lambda _, place: score(place, 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_outlasts_a_server_that_comes_late(
    world: World, client: MlflowClient, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """MLflow refuses connections until the stage has nothing left but to tell its index."""
    run_key = f"mlflow-late-{next(NUMBER)}"
    if stage != "prepare":
        world.prepare(world.place(run_key))
    index, missed = tracking.StageLog.index, []

    def at_last(self: tracking.StageLog, made: Index) -> None:
        deadline = time.monotonic() + 30
        while not self.warned and time.monotonic() < deadline:
            time.sleep(0.01)
        missed.append(self.warned)
        proxy.listen()
        index(self, made)

    proxy.refuse()
    monkeypatch.setattr(tracking.StageLog, "index", at_last)
    STAGES[stage](world, world.place(run_key, proxy.endpoint))
    assert missed == [True]
    run, parent = only(client, run_key, stage), only(client, run_key, "pipeline")
    assert (run.info.status, parent.info.status) == ("FINISHED", "RUNNING")
    told = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert told == {"index.json"} | ({"scores.json", "estimates.json"} if "score" in stage else set())
    if stage == "prepare":
        assert parent.data.params["train.batch_size"] == "8"
    if "score" in stage:
        assert [step for step, _ in points(client, parent, "test.clip_score")] == [0]
        assert sheets(client, parent) == [0]


@pytest.mark.parametrize("status", [403, 413, 507])
def test_a_model_file_that_is_refused_is_one_line(
    world: World, proxy: Proxy, played: Played, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """As a gateway's limit on bodies, or a full disk behind the server, refuses it."""
    name = f"mlflow-upload-{next(NUMBER)}"
    world.copy(played.place.run_key, name)
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/{name}/register.json")
    place = world.place(name, proxy.endpoint)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)

    def refusal(request: Request, forward: Callable[[], Answer]) -> Answer:
        return Answer(status, [("Content-Length", "0")], b"") if request.method == "PUT" else forward()

    proxy.fault = refusal
    with pytest.raises(SpinError) as refused:
        register(place, name, 2)
    assert re.fullmatch(rf"expected the MLflow registry at \S+, got {status} .+; .+", str(refused.value))
    proxy.fault = none
    assert register(place, name, 2).facts["versions"] == {"1": "1", "2": "2"}


@pytest.mark.parametrize("passed", [0, 1, 6, 12])
def test_a_registration_that_was_refused_is_completed_by_a_rerun(
    world: World, client: MlflowClient, proxy: Proxy, played: Played, passed: int
) -> None:
    """A registry must succeed: wherever its server goes away, there is one line; and then one version per player."""
    name = f"mlflow-register-{next(NUMBER)}"
    world.copy(played.place.run_key, name)
    world.minio().remove_object(BUCKET, f"{PREFIX}/runs/{name}/register.json")
    place = world.place(name, proxy.endpoint)
    if passed:
        proxy.fault = after(passed, lambda *_: mlflow_error(503, "TEMPORARILY_UNAVAILABLE"))
    else:
        proxy.refuse()
    with pytest.raises(SpinError) as refused:
        register(place, name, 2)
    assert re.fullmatch(r"expected the MLflow registry at .+, got .+; .+", str(refused.value))
    assert "register.json" not in world.documents(name)
    proxy.fault = none
    if not passed:
        proxy.listen()
    facts = register(place, name, 2).facts
    assert facts["versions"] == {"1": "1", "2": "2"}
    assert {str(version.version) for version in client.search_model_versions(f"name = '{name}'")} == {"1", "2"}
    assert client.get_run(facts["mlflow_run_id"]).info.status == "FINISHED"
