"""spin-train on several nodes: a TrainJob is made and followed, with its first node's log, and what failed is told."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from spin.cluster import Cluster, ClusterAwayError, inside, namespace
from spin.errors import SpinError
from spin.processes import LOOK_ABOVE
from spin.run import Index, whole_iteration, whole_shards
from spin.stages import Place, logger
from spin.stages.train import asked_to_stop, train
from spin.trainjob import CONTAINER, PodSettings, document, failure, goes_on, name_of, node_of, owners, state, waiting

SECONDS_BETWEEN_LOOKS = 3.0
SECONDS_TO_GO = 300.0
"""A TrainJob is gone when its pods are; they have 30 s to write a checkpoint."""
SECONDS_AWAY = 600.0
"""An API server may be upgraded meanwhile: training does not need it."""
LINES_SHOWN = 30


def train_on_nodes(
    place: Place, iteration: int, shards: int, nodes: int, accelerators: int, settings: PodSettings
) -> Index:
    """Train the player of ``iteration`` on ``nodes`` nodes, each with ``accelerators``; this pod needs none.

    Returns:
        What ``train`` does.

    Raises:
        SpinError: there is no Kubernetes or no Kubeflow Trainer, or training failed; why, in the words of the node
            that failed first.
        SystemExit: this process was told to terminate; the nodes were too.
    """
    elsewhere = partial(launch, place, iteration, shards, nodes, accelerators, settings)
    return train(place, iteration, shards, elsewhere=elsewhere)


def launch(place: Place, iteration: int, shards: int, nodes: int, accelerators: int, settings: PodSettings) -> None:
    """Have several nodes train, and wait for them; the TrainJob is gone when they have ended, however they did.

    Raises:
        SpinError, SystemExit: as ``train_on_nodes``.
    """
    iteration, shards = whole_iteration(iteration, 1), whole_shards(shards)
    nodes, accelerators = int(nodes), int(accelerators)
    if not inside() or not settings.resources:
        raise SpinError(
            f"expected Kubeflow Pipelines 2.15 or newer to tell what pods on {nodes} nodes are to have, got no such "
            "settings; set train_nodes to 1"
        )
    options = {
        "run-key": place.run_key,
        "store-uri": place.store_uri,
        "store-endpoint": place.store_endpoint,
        "tracking-uri": place.tracking_uri,
        "experiment": place.experiment,
        "iteration": iteration,
        "shards": shards,
        "accelerators": accelerators,
    }
    command = ["python3", "-m", "spin", "train", *(f"--{name}={value}" for name, value in options.items())]
    cluster = Cluster()
    launcher = cluster.this_pod()
    name = name_of(place.store_uri, place.run_key, iteration)
    wanted = document(name, command, nodes, settings, launcher)
    with asked_to_stop() as stop:
        _begin(cluster, wanted, launcher, stop)
        _follow(cluster, name, nodes, stop)


def _begin(cluster: Cluster, wanted: dict[str, Any], launcher: dict[str, Any], stop: Callable[..., bool]) -> None:
    """Create the TrainJob, unless one is on its way; one that has ended, or is another, goes first."""
    name, nodes = wanted["metadata"]["name"], wanted["spec"]["trainer"]["numNodes"]
    until = time.monotonic() + SECONDS_TO_GO
    # Kubeflow Pipelines kills a task without a signal that reaches this process, and keeps the pod that owns the nodes.
    end = f"if it outlives its task: kubectl -n {namespace()} delete trainjob {name}"
    while time.monotonic() < until:
        if stop():
            raise SystemExit(128 + signal.SIGTERM)
        if cluster.create_train_job(wanted):
            logger.info("TrainJob %s: created, %d nodes; %s", name, nodes, end)
            return
        found = cluster.train_job(name)
        if found and goes_on(found, wanted):
            cluster.own_train_job(name, owners(launcher))
            logger.info("TrainJob %s: found under way, %d nodes; %s", name, nodes, end)
            return
        if found and "deletionTimestamp" not in found["metadata"]:
            cluster.delete_train_job(name)
        stop(SECONDS_BETWEEN_LOOKS)
    raise SpinError(
        f"expected the TrainJob {name} of an earlier attempt to go within {SECONDS_TO_GO:.0f} s, got it still there; "
        "see what holds its pods"
    )


@dataclass
class _Told:
    """What of a TrainJob has been said already."""

    state: str = ""
    waiting: dict[int, str] = field(default_factory=dict)
    lines_until: dict[str, str] = field(default_factory=dict)
    heard: float = 0.0
    """When lines were last read, by the monotonic clock."""
    failures: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why a pod's log could not be read."""


def _follow(cluster: Cluster, name: str, nodes: int, stop: Callable[..., bool]) -> None:
    told, seen = _Told(), time.monotonic()
    while True:
        if stop():
            cluster.delete_train_job(name)
            logger.info("TrainJob %s: asked to stop, deleted; the nodes keep their last step, run again to go on", name)
            raise SystemExit(128 + signal.SIGTERM)
        try:
            job = cluster.train_job(name)
            if job is None or "deletionTimestamp" in job["metadata"]:
                raise SpinError(
                    f"expected the TrainJob {name} to end, got it deleted by somebody else; run again to go on from "
                    "its last checkpoint"
                )
            word, why = state(job)
            if word != told.state:
                told.state = word
                logger.info("TrainJob %s: %s", name, f"{word}, {why}" if why else word)
            pods = sorted(cluster.pods_of(name), key=lambda pod: pod["metadata"]["creationTimestamp"])
            _tell(cluster, pods, told)
        except ClusterAwayError as error:
            if time.monotonic() - seen > SECONDS_AWAY:
                raise
            logger.info("TrainJob %s: %s", name, error)
            stop(SECONDS_BETWEEN_LOOKS)
            continue
        seen = time.monotonic()
        if word in ("Complete", "Failed"):
            cluster.delete_train_job(name)
            if word == "Complete":
                return
            raise SpinError(_reason(name, nodes, why, told))
        stop(SECONDS_BETWEEN_LOOKS)


def _tell(cluster: Cluster, pods: list[dict[str, Any]], told: _Told) -> None:
    """Print what is new in the first node's log, and say which nodes wait or have failed."""
    firsts = [pod for pod in pods if node_of(pod) == 0]
    if firsts and firsts[-1].get("status", {}).get("phase") in ("Running", "Succeeded", "Failed"):
        pod = firsts[-1]["metadata"]["name"]
        last = told.lines_until.get(pod, "")
        # Some seconds more, for clocks that differ; what has been printed is left out by its time.
        began = time.monotonic()
        lines = _log(cluster, pod, told, seconds=int(began - told.heard) + 60 if last else 0)
        if lines:
            told.heard = began
        for line in lines:
            when, _, text = line.partition(" ")
            if when > last:
                print(text, flush=True)
                told.lines_until[pod] = when
    for pod in pods:
        node, name = node_of(pod), pod["metadata"]["name"]
        why = waiting(pod)
        if why != told.waiting.get(node, ""):
            told.waiting[node] = why
            logger.info("node %d: %s", node, f"waits, {why}" if why else "has started")
        if (fault := failure(pod)) and name not in told.failures:
            lines = [line.partition(" ")[2] for line in _log(cluster, name, told, lines=200)]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            told.failures[name] = f"node {node}: {errors[-1] if errors else fault}"
            logger.info("node %d: failed, %s", node, fault)
            if node:
                # The first node's lines have been printed already.
                sys.stdout.writelines(f"node {node}: {line}\n" for line in lines[-LINES_SHOWN:])


def _log(cluster: Cluster, pod: str, told: _Told, **options: int) -> list[str]:
    """Return a node's log as ``Cluster.log`` does; none where it cannot be read: its end is told all the same."""
    try:
        return cluster.log(pod, CONTAINER, **options)
    except SpinError as error:
        if told.unreadable.get(pod) != str(error):
            told.unreadable[pod] = str(error)
            logger.info("%s: %s", pod, error)
        return []


def _reason(name: str, nodes: int, why: str, told: _Told) -> str:
    """Return why a TrainJob has failed, in one line: the node's own words, else what Kubernetes says."""
    # A node whose fellow has died only says that its processes did.
    found = sorted(told.failures.values(), key=lambda text: LOOK_ABOVE in text)
    found = found or [f"node {node} has not started: {text}" for node, text in sorted(told.waiting.items()) if text]
    if not found:
        found = [why or "no reason given"]
    do = "" if "; " in found[0] else "; read the lines above, and run again to go on from the last checkpoint"
    return f"expected the {nodes} nodes of the TrainJob {name} to finish, got {found[0]}{do}"
