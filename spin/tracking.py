"""MLflow, and the only module that knows it: runs and curves (never fatal), the model registry (must succeed).

MLflow shows what the store knows; it decides nothing. A run in the store is one parent run here, found again from any
pod by the tag ``spin.run_key``, with a child per stage and iteration. What could not be logged, because the server was
out of reach, is logged when the stage is run again: each stage's index and history stay in the store.

With ``MLFLOW_RUN_ID`` in the environment (set by KFP's own MLflow plugin) that run is the stage's run; it is written
to, never ended.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from spin.config import RunConfig
from spin.errors import SpinError
from spin.run import Index
from spin.stages import Place, logger
from spin.store import digest_of, digest_of_file

SECONDS_BETWEEN_FLUSHES = 3.0
SECONDS_BEFORE_RETRY = 20.0
# A server that hangs may take this share of a stage's time.
LARGEST_SHARE = 0.1
RUN_KEY, STAGE, ITERATION, INDEX = "spin.run_key", "spin.stage", "spin.iteration", "spin.index_digest"
FAILURE = "spin.failure"
PARENT = "pipeline"


def _client(uri: str) -> Any:
    # A server that is away must cost seconds, not MLflow's default of several minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
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
        said = str(error).splitlines()[0][:200]
        if "Invalid Host header" in str(error):
            do = "add the host and port of tracking_uri to the server's MLFLOW_SERVER_ALLOWED_HOSTS"
        elif "401" in said or "403" in said or "authenti" in said.lower():
            do = "put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into the secret named by tracking_secret"
        else:
            do = "check tracking_uri, the server and the network"
        raise SpinError(f"expected an answer from MLflow at {uri}, got {said}; {do}") from None


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
    found = client.search_runs([experiment], where, order_by=["attributes.start_time ASC"], max_results=1)
    if found:
        return found[0]
    name = place.run_key if stage == PARENT else stage
    return client.create_run(experiment, run_name=name, tags={RUN_KEY: place.run_key, STAGE: stage, **tags})


def _parent(client: Any, place: Place, experiment: str) -> Any:
    return _find_or_create(client, place, experiment, PARENT, {})


class StageLog:
    """Writes one stage's MLflow run. Calls never raise: what fails is kept and tried again until the stage ends."""

    def __init__(self, place: Place, stage: str, iteration: int):
        self.place, self.stage, self.iteration = place, stage, iteration
        self.injected = os.environ.get("MLFLOW_RUN_ID", "")
        self.run_id = self.parent_id = ""
        self.known_index = ""
        self._parent_tags: Mapping[str, str] = {}
        self._client: Any = None
        self._backlog: list[Callable[[], None]] = []
        self._points: list[tuple[int, int, dict[str, float]]] = []
        self._sent: set[int] = set()
        self._away_until = self._flushed = 0.0
        self._status = "FINISHED"
        self._failed_before = False
        self.warned = False

    def _connect(self) -> None:
        if self._client is None:
            client = _client(self.place.tracking_uri)
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
            self.known_index = run.data.tags.get(INDEX, "")
            self._failed_before = FAILURE in run.data.tags
            self.run_id = run.info.run_id
            if not self.injected and run.info.status != "RUNNING" and not self.known_index:
                client.update_run(self.run_id, status="RUNNING")
            if "loss" in run.data.metrics:
                self._sent = {point.step for point in client.get_metric_history(self.run_id, "loss")}
            self._client = client

    def _drain(self, force: bool = False) -> bool:
        """Send the backlog in order; return whether nothing is left."""
        if not self.place.tracking_uri:
            self._backlog.clear()
            return True
        if not force and time.monotonic() < self._away_until:
            return False
        started = time.monotonic()
        try:
            self._connect()
            while self._backlog:
                self._backlog[0]()
                self._backlog.pop(0)
        except Exception as error:
            # Whatever MLflow raises, training goes on.
            now = time.monotonic()
            self._away_until = now + max(SECONDS_BEFORE_RETRY, (now - started) / LARGEST_SHARE)
            if not self.warned:
                reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
                logger.warning(
                    "MLflow at %s is out of reach (%s); going on without it", self.place.tracking_uri, reason
                )
                self.warned = True
            return False
        return True

    def _do(self, action: Callable[[], None]) -> None:
        self._backlog.append(action)
        self._drain()

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
        self._points.append((step, int(time.time() * 1000), dict(measures)))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._flush()

    def _flush(self) -> None:
        points, self._points = self._points, []

        def action() -> None:
            from mlflow.entities import Metric

            metrics = [
                Metric(name, value, stamp, step)
                for step, stamp, measures in points
                if step not in self._sent
                for name, value in measures.items()
            ]
            for start in range(0, len(metrics), 1000):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
            self._sent |= {step for step, _, _ in points}

        if points:
            self._do(action)

    def curves(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log the steps of ``history`` that have not arrived yet, each once, in order."""
        self._points = [
            (row["step"], int(time.time() * 1000), {key: value for key, value in row.items() if key != "step"})
            for row in history
        ]
        self._flush()

    def index(self, index: Index) -> None:
        """Log a finished stage once: facts as metrics or tags, digests and producer as tags.

        It comes last: what is known by its index is not logged again.
        """
        identity = digest_of(index.model_dump(mode="json"))
        # Points of one time, step and value are one point to the server, however often they are sent.
        finished = int(datetime.fromisoformat(index.producer["finished"]).timestamp() * 1000)

        def action() -> None:
            from mlflow.entities import Metric, RunTag

            if self.known_index == identity:
                return
            numbers = {k: v for k, v in _flat(index.facts).items() if isinstance(v, int | float)}
            numbers |= {"seconds": index.seconds, "items": index.items}
            tags = {f"spin.{name}": ref.digest for name, ref in index.outputs.items()}
            tags |= {f"spin.producer.{name}": value for name, value in index.producer.items() if value}
            tags |= {f"spin.{name}": value for name, value in index.facts.items() if isinstance(value, str) and value}
            self._client.log_batch(
                self.run_id,
                metrics=[Metric(key, float(value), finished, index.iteration) for key, value in numbers.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            self._client.log_dict(self.run_id, index.model_dump(mode="json"), "index.json")
            if scores := index.facts.get("metrics"):
                points = [
                    Metric(f"{split}.{name}", estimate["value"], finished, index.iteration)
                    for split, metrics in scores.items()
                    for name, estimate in metrics.items()
                ]
                self._client.log_batch(self.parent_id, metrics=points)
            self._client.set_tag(self.run_id, INDEX, identity)

        self._do(action)

    def report(self, html: str, sheet: Path, iteration: int) -> None:
        """Log the report page and the contact sheet to the parent run, once; step is the iteration."""
        known, digest = f"spin.sheet_digest.{iteration:03d}", digest_of_file(sheet)

        def action() -> None:
            # The parent is asked: the stage's own run is a new one each time where it is injected.
            if self._parent_tags.get(known) == digest:
                return
            from PIL import Image

            self._client.log_text(self.parent_id, html, f"report/iteration-{iteration:03d}.html")
            self._client.log_image(self.parent_id, Image.open(sheet), key="contact_sheet", step=iteration)

        self._do(action)
        self._do(lambda: self._client.set_tag(self.parent_id, known, digest))

    def text(self, text: str, name: str) -> None:
        """Keep a text file with the parent run."""
        self._do(lambda: self._client.log_text(self.parent_id, text, name))

    def failed(self, reason: str) -> None:
        """Mark the stage's run as failed, with the reason as a tag."""
        self._status = "FAILED"
        self._do(lambda: self._client.set_tag(self.run_id, FAILURE, reason[:500]))

    def close(self) -> None:
        """Send what is left and end the run (an injected run is its owner's to end)."""
        self._flush()

        def action() -> None:
            if self._failed_before and self._status == "FINISHED":
                self._client.delete_tag(self.run_id, FAILURE)
            if not self.injected:
                self._client.set_terminated(self.run_id, self._status)

        self._backlog.append(action)
        if not self._drain(force=True):
            logger.warning(
                "MLflow at %s is still out of reach; %s is safe in the store, run the stage again to log it",
                self.place.tracking_uri,
                self.stage,
            )

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Record CPU, memory and accelerator use while a stage works, where MLflow can read them."""
        monitor = None
        if self._drain() and self.run_id:
            try:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
                monitor.start()
            except Exception as error:
                logger.warning("system metrics are not available (%s)", type(error).__name__)
        try:
            yield
        finally:
            if monitor is not None:
                monitor.finish()


@contextmanager
def stage(place: Place, name: str, iteration: int, system_metrics: bool = False) -> Iterator[StageLog]:
    """Open the MLflow run of a stage; an exception inside marks it as failed and passes on."""
    log = StageLog(place, name, iteration)
    log._drain()
    try:
        if system_metrics:
            with log.system_metrics():
                yield log
        else:
            yield log
    except BaseException as error:
        log.failed(str(error) or type(error).__name__)
        raise
    finally:
        log.close()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


class Registry:
    """The model registry of the run's MLflow server.

    Raises:
        SpinError: no server, or it refuses; nothing is lost, the stage can be run again.
    """

    def __init__(self, place: Place):
        if not place.tracking_uri:
            raise SpinError("expected an MLflow server for the registry, got no tracking_uri; set it")
        self.place, self._client = place, _client(place.tracking_uri)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            raise SpinError(
                f"expected the MLflow registry at {self.place.tracking_uri}, got {str(error).splitlines()[0][:200]}; "
                "check tracking_uri and run register-model again"
            ) from None

    def register(self, name: str, uri: str, tags: Mapping[str, str], stage: str) -> str:
        """Return the version of ``name`` that stands for this player; it is created once."""
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                self._client.create_registered_model(name, tags={"spin.kind": "diffusers pipeline folder"})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            same = ("spin.run_key", "spin.iteration", "spin.digest")
            for version in self._client.search_model_versions(f"name = '{name}'"):
                if all(version.tags.get(key) == tags[key] for key in same):
                    return str(version.version)
            experiment = _experiment(self._client, self.place.experiment)
            run = _find_or_create(self._client, self.place, experiment, stage, {})
            made = self._client.create_model_version(name, source=uri, run_id=run.info.run_id, tags=dict(tags))
            return str(made.version)

    def point(self, name: str, alias: str, version: str) -> None:
        """Move ``alias`` to ``version``."""
        with self._errors():
            self._client.set_registered_model_alias(name, alias, version)

    def close_run(self) -> str:
        """Mark the parent run as finished and return its id."""
        with self._errors():
            parent = _parent(self._client, self.place, _experiment(self._client, self.place.experiment))
            self._client.set_terminated(parent.info.run_id, "FINISHED")
            return str(parent.info.run_id)
