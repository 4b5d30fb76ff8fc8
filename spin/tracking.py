"""MLflow, and the only module that knows it: runs and curves (never fatal), the model registry (must succeed).

MLflow shows what the store knows; it decides nothing. A run in the store is one parent run here, found again from any
pod by the tag ``spin.run_key``, with a child per stage and iteration. What could not be logged, because the server was
out of reach, is logged when the stage is run again: each stage's index and history stay in the store.

With ``MLFLOW_RUN_ID`` in the environment (set by KFP's own MLflow plugin) that run is the stage's run; it is written
to, never ended.
"""

import io
import json
import logging
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spin.config import GenerateConfig, RunConfig
from spin.disk import scratch
from spin.errors import SpinError, cause
from spin.run import Index
from spin.stages import Place, logger
from spin.store import digest_of, digest_of_file

SECONDS_BETWEEN_FLUSHES = 3.0
SECONDS_BEFORE_RETRY = 20.0
# MLflow's client sends more than this in several requests, of which the first may be all that arrives.
MOST_METRICS = 1000
# MLflow's own client takes databases and folders too; here, those would be on the disk of a pod.
ADDRESS = re.compile(r"(?i:https?)://([^/\s]*@)?([\w.-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?(/[^\s?#]*)?")
RUN_KEY, STAGE, ITERATION, INDEX = "spin.run_key", "spin.stage", "spin.iteration", "spin.index_digest"
FAILURE = "spin.failure"
DIGEST, CHAMPIONS = "spin.digest", "spin.champions"
PARENT = "pipeline"
MODEL_TYPE = "text-to-image"
SERVED_WITH = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "pandas")
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SECONDS_TO_UPLOAD = 900


def without_password(text: str) -> str:
    """Return ``text`` without the user and password of addresses in it."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _why(error: Exception) -> str:
    return without_password(cause(error))


def check_address(uri: str) -> None:
    """Make sure that ``uri`` is the address of a server.

    Raises:
        SpinError: it is something else.
    """
    address = ADDRESS.fullmatch(uri)
    if not address or int(address["port"] or 0) > 65535:
        raise SpinError(
            f"expected an MLflow server like http://host:5000, got {without_password(uri)!r}; set tracking_uri"
        )


def _client(uri: str) -> Any:
    check_address(uri)
    # A server that is away must cost seconds, not MLflow's default of several minutes.
    os.environ.setdefault(TIMEOUT, "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def server_version(uri: str) -> str:
    """Return the version of the MLflow server, which answered a question that needs its database and its keys.

    Raises:
        SpinError: it is out of reach, does not accept its name in the Host header, or refuses these credentials.
    """
    client = _client(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        client.search_experiments(max_results=1)
        answer = http_request(get_default_host_creds(uri), "/version", "GET", timeout=10, max_retries=0)
        return str(answer.text).strip()
    except MlflowException as error:
        said = _why(error)
        if "Invalid Host header" in str(error):
            do = "add the host and port of tracking_uri to the server's MLFLOW_SERVER_ALLOWED_HOSTS"
        elif "401" in said or "403" in said or "authenti" in said.lower():
            do = "put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into the secret named by tracking_secret"
        else:
            do = "check tracking_uri, the server and the network"
        raise SpinError(f"expected an answer from MLflow at {without_password(uri)}, got {said}; {do}") from None


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        # Without the kind, MLflow's UI shows runs as evaluations of language models.
        return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
    except MlflowException:
        # Another pod was faster.
        return str(client.get_experiment_by_name(name).experiment_id)


def _find_or_create(client: Any, place: Place, experiment: str, stage: str, tags: Mapping[str, str]) -> Any:
    where = f"tags.`{RUN_KEY}` = '{place.run_key}' and tags.`{STAGE}` = '{stage}'"
    oldest = ["attributes.start_time ASC", "attributes.run_id ASC"]

    def find() -> Any:
        return next(iter(client.search_runs([experiment], where, order_by=oldest, max_results=1)), None)

    if found := find():
        return _agreed(client, place, found) or found if stage == PARENT else found
    name = place.run_key if stage == PARENT else stage
    made = client.create_run(experiment, run_name=name, tags={RUN_KEY: place.run_key, STAGE: stage, **tags})
    # Shards that find none at once make one each.
    first = (_agreed(client, place, made) if stage == PARENT else find()) or made
    if first.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    return first


def _agreed(client: Any, place: Place, known: Any) -> Any:
    """Return the parent that counts, of those that several stages have made at once: the store lets one be first.

    MLflow alone cannot say: a run that was begun earlier may come into view later. ``None``: the first one is of a
    server or an experiment that is no longer used, or has been deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(place.open().agreed("mlflow", known.info.run_id))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    same = run.info.experiment_id == known.info.experiment_id and run.info.lifecycle_stage == "active"
    return run if same else None


def _parent(client: Any, place: Place, experiment: str) -> Any:
    return _find_or_create(client, place, experiment, PARENT, {})


@dataclass(frozen=True)
class Version:
    """A version of a registered model; ``source`` is where MLflow keeps it."""

    number: str
    source: str
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """What the registry is told of a player: lineage, scores, and how it draws.

    Attributes:
        stage: the training stage, whose MLflow run the version belongs to.
        tags: lineage, with the tags ``RUN_KEY``, ``ITERATION`` and ``DIGEST``, which name the player.
        params, scores: columns of MLflow's table of models.
        solver: how the served player draws, see ``register.solver_of``.
    """

    stage: str
    iteration: int
    tags: Mapping[str, str]
    params: dict[str, str]
    scores: Mapping[str, float]
    generate: GenerateConfig
    resolution: int
    solver: Mapping[str, Any]


class StageLog:
    """Writes one stage's MLflow run, from a thread of its own: no call waits for the server but the last, ``close``.

    Calls never raise: what fails is kept and tried again until the stage ends.
    """

    def __init__(self, place: Place, stage: str, iteration: int):
        self.place, self.stage, self.iteration = place, stage, iteration
        self.injected = os.environ.get("MLFLOW_RUN_ID", "")
        self.run_id = self.parent_id = ""
        self.known_index = ""
        self._parent_tags: Mapping[str, str] = {}
        self._tags: Mapping[str, str] = {}
        # MLflow is imported here: two threads that import libraries at once meet half of one.
        self._server: Any = _client(place.tracking_uri) if place.tracking_uri else None
        self._client: Any = None
        self._lock = threading.Lock()
        self._backlog: list[Callable[[], None]] = []
        self._points: dict[int, tuple[int, dict[str, float]]] = {}
        self._sent: set[int] = set()
        self._worker = ThreadPoolExecutor(1, "mlflow")
        self._asked = False
        self._away_until = self._flush_at = 0.0
        self._status = "FINISHED"
        self._failed_before = False
        self.warned = False

    def _connect(self) -> None:
        if self._client is None:
            client = self._server
            experiment = _experiment(client, self.place.experiment)
            parent = _parent(client, self.place, experiment)
            self.parent_id, self._parent_tags = parent.info.run_id, parent.data.tags
            tags = {ITERATION: str(self.iteration), "mlflow.parentRunId": self.parent_id}
            if self.injected:
                run = client.get_run(self.injected)
                for key, value in {RUN_KEY: self.place.run_key, STAGE: self.stage, ITERATION: tags[ITERATION]}.items():
                    client.set_tag(self.injected, key, value)
            else:
                run = _find_or_create(client, self.place, experiment, self.stage, tags)
            self._tags, self.known_index = run.data.tags, run.data.tags.get(INDEX, "")
            self._failed_before = FAILURE in run.data.tags
            self.run_id = run.info.run_id
            if not self.known_index:
                # There is work to do, after a failure or with more iterations than before.
                for again in [parent] if self.injected else [parent, run]:
                    if again.info.status != "RUNNING":
                        client.update_run(again.info.run_id, status="RUNNING")
            if "loss" in run.data.metrics:
                self._sent = {point.step for point in client.get_metric_history(self.run_id, "loss")}
            self._client = client

    def _drain(self, force: bool = False) -> bool:
        """Send points and backlog in the order that they were given in; return whether nothing is left."""
        self._asked = False
        if not force and time.monotonic() < self._away_until:
            return False
        try:
            self._connect()
            while True:
                with self._lock:
                    # Together, so that no later action overtakes a point.
                    points, action = dict(self._points), next(iter(self._backlog), None)
                if not points and not action:
                    return True
                self._send(points)
                if action:
                    action()
                    self._backlog.pop(0)
        except Exception as error:
            # Whatever MLflow raises, training goes on. Stages that were refused together do not come back together.
            self._away_until = time.monotonic() + SECONDS_BEFORE_RETRY * random.uniform(1, 1.5)
            if not self.warned:
                where = without_password(self.place.tracking_uri)
                logger.warning("MLflow at %s is out of reach (%s); going on without it", where, _why(error))
                self.warned = True
            return False

    def _send(self, points: Mapping[int, tuple[int, Mapping[str, float]]]) -> None:
        """Send points, whole steps in one request each: a step that has its loss has everything."""
        from mlflow.entities import Metric

        batches: list[tuple[list[int], list[Metric]]] = [([], [])]
        for step, (stamp, measures) in points.items():
            metrics = [Metric(name, value, stamp, step) for name, value in measures.items() if step not in self._sent]
            if len(batches[-1][1]) + len(metrics) > MOST_METRICS:
                batches.append(([], []))
            batches[-1][0].append(step)
            batches[-1][1].extend(metrics)
        for steps, metrics in batches:
            if metrics:
                self._client.log_batch(self.run_id, metrics=metrics)
            self._sent.update(steps)
            with self._lock:
                for step in steps:
                    self._points.pop(step, None)

    def _wake(self) -> None:
        """Let the thread look for what there is to send."""
        if not self._asked:
            self._asked = True
            self._worker.submit(self._drain)

    def _do(self, action: Callable[[], None]) -> None:
        if self._server:
            with self._lock:
                self._backlog.append(action)
            self._wake()

    def params(self, config: RunConfig) -> None:
        """Log the run's whole config, flat and as a file, to the parent run."""
        flat = _flat(config.model_dump(mode="json"))

        def action() -> None:
            if self.known_index:
                return
            from mlflow.entities import Param

            self._client.log_batch(self.parent_id, params=[Param(key, str(value)) for key, value in flat.items()])
            self._client.log_dict(self.parent_id, config.model_dump(mode="json"), "config.json")

        self._do(action)

    def step(self, step: int, measures: Mapping[str, float]) -> None:
        """Log one training step; points are sent in batches every few seconds."""
        self._add({step: measures})
        if (now := time.monotonic()) > self._flush_at and self._server:
            self._flush_at = now + SECONDS_BETWEEN_FLUSHES
            self._wake()

    def curves(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log the steps of ``history`` that have not arrived yet, each once, in order."""
        self._add({row["step"]: {key: value for key, value in row.items() if key != "step"} for row in history})
        if self._server:
            self._wake()

    def _add(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        stamp = int(time.time() * 1000)
        if self._server:
            with self._lock:
                for step, measures in rows.items():
                    if step not in self._sent:
                        self._points.setdefault(step, (stamp, dict(measures)))

    def index(self, index: Index) -> None:
        """Log a finished stage once: facts as metrics or tags, digests and producer as tags.

        It comes last: what is known by its index is not logged again.
        """
        identity = digest_of(index.model_dump(mode="json"))
        # Points of one time, step and value are one point to the server, however often they are sent.
        finished = int(datetime.fromisoformat(index.producer["finished"]).timestamp() * 1000)

        def action() -> None:
            from mlflow.entities import Metric, RunTag

            from spin.measures import followed

            if self.known_index == identity:
                return
            numbers = {k: v for k, v in _flat(index.facts).items() if isinstance(v, int | float)}
            numbers |= {"seconds": index.seconds, "items": index.items, **_flat(index.cost, "cost.")}
            tags = {f"spin.{name}": ref.digest for name, ref in index.outputs.items()}
            tags |= {f"spin.producer.{name}": value for name, value in index.producer.items() if value}
            tags |= {f"spin.{name}": value for name, value in index.facts.items() if isinstance(value, str) and value}
            for run_id, values in ((self.run_id, numbers), (self.parent_id, followed(index.facts))):
                points = [Metric(key, float(value), finished, index.iteration) for key, value in values.items()]
                self._client.log_batch(run_id, metrics=points)
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            self._client.log_dict(self.run_id, index.model_dump(mode="json"), "index.json")
            self._client.set_tag(self.run_id, INDEX, identity)

        self._do(action)

    def report(self, html: str, pictures: Mapping[str, Path | bytes], iteration: int) -> None:
        """Log the report page and pictures by key to the parent run, each once; step is the iteration."""
        known = f"spin.report_digest.{iteration:03d}"
        digest = digest_of([html, sorted(pictures)])

        def action() -> None:
            # The parent is asked: the stage's own run is a new one each time where it is injected.
            if self._parent_tags.get(known) == digest:
                return
            from PIL import Image

            self._client.log_text(self.parent_id, html, f"report/iteration-{iteration:03d}.html")
            # What an interrupted attempt has sent is not sent again; pictures of other scores are.
            sent = [] if known in self._parent_tags else self._client.list_artifacts(self.parent_id, "images")
            for key, picture in pictures.items():
                name = f"images/{key.replace('/', '~')}+step+{iteration}+"
                if not any(item.path.startswith(name) for item in sent):
                    image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
                    self._client.log_image(self.parent_id, image, key=key, step=iteration)
            self._client.set_tag(self.parent_id, known, digest)

        self._do(action)

    def table(self, rows: Path | Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows, or a Parquet file, as a table of the stage's run; MLflow compares it with those of other runs."""
        digest = digest_of_file(rows) if isinstance(rows, Path) else digest_of(rows)

        def action() -> None:
            import pandas as pd

            if self._tags.get(f"spin.{name}_table") == digest:
                return
            frame = pd.read_parquet(rows) if isinstance(rows, Path) else pd.DataFrame(rows)
            if any(item.path == f"{name}.json" for item in self._client.list_artifacts(self.run_id)):
                # log_table would append.
                self._client.log_text(self.run_id, frame.to_json(orient="split", index=False), f"{name}.json")
            else:
                self._client.log_table(self.run_id, frame, f"{name}.json")
            self._client.set_tag(self.run_id, f"spin.{name}_table", digest)

        self._do(action)

    def text(self, text: str, name: str) -> None:
        """Keep a text file with the parent run."""
        self._do(lambda: self._client.log_text(self.parent_id, text, name))

    def failed(self, error: BaseException) -> None:
        """Mark the stage's run, and the whole run, as failed, with the reason as a tag; as killed after SIGTERM."""
        self._status, reason = "FAILED", without_password(str(error) or type(error).__name__)
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            self._status, reason = "KILLED", "asked to stop (SIGTERM); run the stage again to go on"
        self._do(lambda: self._client.set_tag(self.run_id, FAILURE, reason[:500]))

    def close(self) -> None:
        """Send what is left, wait for it, and end the run (an injected run is its owner's to end)."""
        if not self._server:
            return

        def action() -> None:
            if self._failed_before and self._status == "FINISHED":
                self._client.delete_tag(self.run_id, FAILURE)
            if not self.injected:
                self._client.set_terminated(self.run_id, self._status)
            if self._status != "FINISHED":
                # Whoever runs the stage again opens it again; nobody may, and then it is over.
                self._client.set_terminated(self.parent_id, self._status)

        with self._lock:
            self._backlog.append(action)
        whole = self._worker.submit(self._drain, force=True).result()
        self._worker.shutdown(wait=False)
        if not whole:
            logger.warning(
                "MLflow at %s is still out of reach; %s is safe in the store, run the stage again to log it",
                without_password(self.place.tracking_uri),
                self.stage,
            )

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Record CPU, memory and accelerator use while a stage works, where MLflow can read them."""
        if not self._server:
            yield
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitors, over = [], threading.Event()

        def action() -> None:
            try:
                # MLflow may come back at the very end.
                if not over.is_set():
                    monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
                    monitor.start()
                    monitors.append(monitor)
                    if over.is_set():
                        monitor.finish()
            except Exception as error:
                logger.warning("system metrics are not available (%s)", type(error).__name__)

        self._do(action)
        try:
            yield
        finally:
            over.set()
            for monitor in monitors:
                # It waits for the server too.
                self._worker.submit(monitor.finish)


@contextmanager
def stage(place: Place, name: str, iteration: int, system_metrics: bool = False) -> Iterator[StageLog]:
    """Open the MLflow run of a stage; an exception inside marks it as failed and passes on."""
    log = StageLog(place, name, iteration)
    # So that the run is seen from the start.
    log._do(lambda: None)
    try:
        if system_metrics:
            with log.system_metrics():
                yield log
        else:
            yield log
    except BaseException as error:
        log.failed(error)
        raise
    finally:
        log.close()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        # An empty section is shown as one: it is part of the config.
        inside = isinstance(item, Mapping) and item
        flat |= _flat(item, f"{prefix}{key}.") if inside else {f"{prefix}{key}": item}
    return flat


class Registry:
    """The model registry of an MLflow server.

    Raises:
        SpinError: no server, or it refuses; nothing is lost, the command can be given again.
    """

    def __init__(self, tracking_uri: str):
        if not tracking_uri:
            raise SpinError("expected an MLflow server for the registry, got no tracking_uri; set it")
        self._uri, self._client = tracking_uri, _client(tracking_uri)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        try:
            yield
        # A file that is refused is told by the library that sends it.
        except (MlflowException, RequestException) as error:
            raise SpinError(
                f"expected the MLflow registry at {without_password(self._uri)}, got {_why(error)}; check "
                "tracking_uri and the names, and try again"
            ) from None

    def _known(self, question: Callable[[], Any]) -> Any:
        """Return the answer, or ``None`` where the server knows no such model or version."""
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                return question()
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def find(self, name: str, tags: Mapping[str, str]) -> Version | None:
        """Return the newest version of ``name`` that has all of ``tags``."""
        with self._errors():
            found = [
                version
                for version in self._client.search_model_versions(f"name = '{name}'")
                if version.tags.items() >= tags.items() and version.status == "READY"
            ]
        return max((_version(version) for version in found), key=lambda version: int(version.number), default=None)

    def version(self, name: str, number: str) -> Version | None:
        """Return a version by its number, if there is one."""
        return self._known(lambda: _version(self._client.get_model_version(name, number)))

    def aliased(self, name: str, alias: str) -> Version | None:
        """Return the version that ``alias`` points to."""
        model = self._known(lambda: self._client.get_registered_model(name))
        number = model.aliases.get(alias) if model else None
        return self.version(name, number) if number else None

    def register(self, place: Place, name: str, player: Path, card: Card) -> Version:
        """Return the version of ``name`` that stands for a player; it is made once.

        The player's folder is packed into an MLflow model that needs neither spin nor the store: what is served
        outlives the run. Its files go through the MLflow server.
        """
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.exceptions import MlflowException

        same = {key: card.tags[key] for key in (RUN_KEY, ITERATION, DIGEST)}
        if known := self.find(name, same):
            # It may have been scored anew since.
            changed = {key: value for key, value in card.tags.items() if known.tags.get(key) != value}
            self.tag(name, known.number, changed)
            return replace(known, tags={**known.tags, **changed})
        with self._errors(), _patiently():
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = _experiment(self._client, place.experiment)
            run_id = self._training(place, experiment, card)
            model = self._client.create_logged_model(
                experiment, f"{place.run_key}-{card.iteration:03d}", run_id, dict(card.tags), card.params, MODEL_TYPE
            )
            try:
                with scratch() as work:
                    _pack(work / "model", player, card, model.model_id, run_id)
                    self._client.log_model_artifacts(model.model_id, str(work / "model"))
            except BaseException:
                self._client.finalize_logged_model(model.model_id, "FAILED")
                raise
            self._client.finalize_logged_model(model.model_id, "READY")
            # MLflow's table of models shows the scores beside each of them.
            self._client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, card.iteration)])
            now = int(time.time() * 1000)
            scores = [
                Metric(key, value, now, card.iteration, model_id=model.model_id) for key, value in card.scores.items()
            ]
            self._client.log_batch(run_id, metrics=scores)
            # As a uri of the logged model, so that MLflow knows which of its models this is a version of.
            source, tags = f"models:/{model.model_id}", dict(card.tags)
            made = self._client.create_model_version(name, source, run_id, tags, model_id=model.model_id)
            return _version(made)

    def _training(self, place: Place, experiment: str, card: Card) -> str:
        """Return the id of the run of a player's training; where training could not make it, it is made, and ended."""
        parent = _parent(self._client, place, experiment).info.run_id
        tags = {ITERATION: str(card.iteration), "mlflow.parentRunId": parent}
        run = _find_or_create(self._client, place, experiment, card.stage, tags)
        if run.info.status == "RUNNING" and INDEX not in run.data.tags:
            self._client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    def point(self, name: str, alias: str, number: str) -> None:
        """Move ``alias`` to a version."""
        with self._errors():
            self._client.set_registered_model_alias(name, alias, number)

    def tag(self, name: str, number: str, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        with self._errors():
            for key, value in tags.items():
                self._client.set_model_version_tag(name, number, key, value)

    def champions(self, name: str) -> list[dict[str, str]]:
        """Return the champions so far, the present one last, as ``set_champions`` left them."""
        model = self._known(lambda: self._client.get_registered_model(name))
        listed: list[dict[str, str]] = json.loads(model.tags.get(CHAMPIONS, "[]")) if model else []
        return listed

    def set_champions(self, name: str, champions: Sequence[Mapping[str, str]]) -> None:
        """Keep the list of champions with the registered model."""
        with self._errors():
            self._client.set_registered_model_tag(name, CHAMPIONS, json.dumps(list(champions)))

    def close_run(self, place: Place) -> str:
        """Mark the run's parent as finished and return its id."""
        with self._errors():
            parent = _parent(self._client, place, _experiment(self._client, place.experiment))
            self._client.set_terminated(parent.info.run_id, "FINISHED")
            return str(parent.info.run_id)


def _version(found: Any) -> Version:
    return Version(str(found.version), found.source or "", found.run_id or "", dict(found.tags))


def _pack(target: Path, player: Path, card: Card, model_id: str, run_id: str) -> None:
    """Write an MLflow model folder: the served file, the player's weights, signature and requirements."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    drawn = card.generate
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.long, drawn.num_inference_steps),
                ParamSpec("guidance_scale", DataType.double, drawn.guidance_scale),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    pyfunc.save_model(
        target,
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        python_model=str(Path(__file__).with_name("served_player.py")),
        artifacts={"player": str(player)},
        signature=signature,
        input_example=(pd.DataFrame({"prompt": ["a red apple"]}), {"seed": 1}),
        # A local build's suffix (2.13.0+cpu) is on no package index.
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in SERVED_WITH],
        model_config={"resolution": card.resolution, "solver": card.solver},
        metadata=dict(card.tags),
    )


@contextmanager
def _patiently() -> Iterator[None]:
    """Let MLflow's client wait for a server that passes gigabytes on to its own store."""
    before = os.environ.get(TIMEOUT)
    os.environ[TIMEOUT] = str(SECONDS_TO_UPLOAD)
    try:
        yield
    finally:
        if before is None:
            del os.environ[TIMEOUT]
        else:
            os.environ[TIMEOUT] = before
