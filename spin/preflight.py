"""Preflight: before an accelerator is taken, check what can be checked, and say for each fault what to do."""

import json
import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from spin import cluster, tracking
from spin.budget import passes
from spin.cluster import ACCELERATOR, Need
from spin.config import RunConfig, ScoreConfig
from spin.errors import SpinError
from spin.gate import policy
from spin.presets import resolve, room
from spin.run import Run, whole_iterations
from spin.scorers import BUILT_IN
from spin.stages import Place
from spin.store import Store
from spin.weights import Part

Verdict = Literal["ok", "failed", "skipped"]
MOST_CLOCK_SECONDS = 60.0
OLDEST_MLFLOW = (3, 0)
ROWS_LOOKED_AT = 50
ROWS_FETCHED = 8
MOST_FETCHED = 64 * 2**20
"""Bytes of a file on S3 that are fetched to look at its first rows."""
# SD-1.5 at 512 px, 50 steps with guidance in about a second: the usual figure of an A100 with 80 GB. For orientation.
PASSES_PER_SECOND = 100.0
GIB = 2**30
HUB_MODEL_BYTES = 5 * GIB
# The opponent, the player, and a checkpoint: weights and the optimizer's two moments.
COPIES = 5


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    verdict: Verdict
    found: str
    do: str = ""


@dataclass(frozen=True)
class Site:
    """What pods of one kind of work ask for, as Kubernetes writes amounts, and the nodes that they may go to."""

    cpu: str = "0"
    memory: str = "0"
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Report:
    """All checks, in order, and where pods that train and pods that sample or score go, once the options are right."""

    checks: Sequence[Check]
    train: Site = Site()
    draw: Site = Site()

    @property
    def markdown(self) -> str:
        """The table for the KFP UI."""
        signs = {"ok": "✓ ok", "failed": "✗ failed", "skipped": "skipped"}
        failed = sum(check.verdict == "failed" for check in self.checks)
        rows = [
            f"| {check.name} | {signs[check.verdict]} | {_cell(check.found)} | {_cell(check.do)} |"
            for check in self.checks
        ]
        title = f"{failed} of {len(rows)} checks failed" if failed else "ready"
        return "\n".join([f"# Preflight: {title}", "", "| check | | found | do |", "|---|---|---|---|", *rows, ""])

    @property
    def faults(self) -> str:
        """The failed checks in one line; empty: the run may begin."""
        return " | ".join(
            f"{check.name}: {check.found}; {check.do}" for check in self.checks if check.verdict == "failed"
        )


def refuse(faults: str) -> None:
    """Stop the run before it takes an accelerator.

    Raises:
        SpinError: ``faults`` names some.
    """
    if faults:
        raise SpinError(f"expected a set-up that can run this, got: {faults}")


def try_scorers_keys(store_uri: str, store_endpoint: str) -> None:
    """Put, get and delete with this process's keys where tasks that score do.

    Raises:
        SpinError: the keys may not, or there are none.
    """
    store = Store(store_uri, store_endpoint)
    try:
        store.check()
        store.below("parts").probe()
    except SpinError as error:
        raise SpinError(f"expected keys that may score in the secret score_secret, got: {error}") from None


def _cell(text: str) -> str:
    # Text of others (labels, server answers) may be anything; a cell stays a cell and holds no markup.
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def preflight(
    place: Place,
    preset: str,
    base_model: str = "",
    data_source: str = "",
    overrides: dict[str, Any] | None = None,
    iterations: int = 1,
    gpu_count: int = 0,
    gpu_pool: Mapping[str, Any] | None = None,
    draw_pool: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any] | None = None,
    train_nodes: int = 1,
) -> Report:
    """Return what is in order and what is not; nothing is left behind, in the store or elsewhere.

    Args:
        gpu_pool, draw_pool: Nodes for pods that train, and for those that sample or score; see ``cluster.pool_of``.
        gate: Options of the gate that register-model judges by.
        train_nodes: Nodes that train a player together.
    """
    checks: list[Check] = []

    def check(name: str, function: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, "ok", function()))
        except SpinError as error:
            found, _, do = str(error).rpartition("; ")
            checks.append(Check(name, "failed", found or do, do if found else ""))
        except _Skip as skip:
            checks.append(Check(name, "skipped", str(skip)))
        except Exception as error:
            # What nobody thought of is a row too: the other checks still say what they found.
            found = " ".join(f"{type(error).__name__}: {error}".split())
            checks.append(Check(name, "failed", f"expected an answer, got {found}", "look into what it names"))
        return checks[-1].verdict == "ok"

    config: RunConfig | None = None
    train, draw = Site(), Site()

    def options() -> str:
        nonlocal config, train, draw
        train_pool = cluster.pool_of(gpu_pool or {}, "gpu_pool")
        config = resolve(preset, base_model, data_source, overrides or {})
        asked = room(config)
        train = Site(asked["train"].cpu, asked["train"].memory, *train_pool)
        own = cluster.pool_of(draw_pool, "draw_pool") if draw_pool else train_pool
        draw = Site(asked["draw"].cpu, asked["draw"].memory, *own)
        policy(dict(gate or {}), config.score)
        if train_nodes < 1:
            raise SpinError(f"expected at least 1 node to train on, got {train_nodes}; set train_nodes")
        config.train.check_processes(max(1, int(gpu_count)) * int(train_nodes))
        return f"{preset}, {config.train.objective}, {whole_iterations(iterations)} iteration(s)"

    check("options", options)
    opened: list[tuple[Store, float]] = []
    if check("S3", lambda: _store(place, opened)):
        check("S3 clock", lambda: _clock(opened[0][1]))
    check("MLflow", lambda: _mlflow(place))
    if config:
        plan = config
        store = opened[0][0] if opened else None
        prepared = False

        def run() -> str:
            nonlocal prepared
            if store is None:
                raise _Skip("S3 is out of reach")
            # A prepared run has its base model and data in the store, wherever they came from.
            prepared = Run(store, place.run_key).find("prepare") is not None
            return f"{place.run_key}: {'prepared, will go on' if prepared else 'new'}"

        check("run key", run)
        check("base model", lambda: _base(plan.base_model, store, prepared))
        check("data", lambda: _data(plan, store, prepared))
        check("scorer", lambda: _scorer(plan.score, store))
        check("size of the run", lambda: _size(plan, int(iterations), int(gpu_count)))
        try:
            scratch = _scratch_bytes(plan, store)
        except Exception:
            scratch = 0  # the check of the base model says what is wrong with it
        need = _need(train, int(gpu_count), scratch, "gpu_pool")
        check("nodes", lambda: _nodes(need, int(train_nodes)))
        if draw_pool:
            check("nodes to sample on", lambda: _nodes(_need(draw, int(gpu_count), scratch, "draw_pool"), 1))
        check("quota", lambda: _quota(need, int(train_nodes)))
        if train_nodes > 1:
            check("Kubeflow Trainer", _trainer)
        check("disk", lambda: _disk(scratch))
    return Report(checks, train, draw)


class _Skip(Exception):
    """There is nothing to check, and why."""


def _store(place: Place, opened: list[tuple[Store, float]]) -> str:
    store = Store(place.store_uri, place.store_endpoint)
    store.check()
    opened.append((store, store.probe()))
    return f"{store.uri} at {store.endpoint}: put, get and delete"


def _clock(ahead: float) -> str:
    if abs(ahead) > MOST_CLOCK_SECONDS:
        raise SpinError(
            f"expected clocks that agree within {MOST_CLOCK_SECONDS:.0f} s, got {ahead:+.0f} s; synchronise the clocks "
            "of this node and of the S3 server"
        )
    return f"{ahead:+.0f} s"


def _mlflow(place: Place) -> str:
    if not place.tracking_uri:
        raise _Skip("tracking_uri is empty: no tracking, no registration")
    version, where = tracking.server_version(place.tracking_uri), tracking.without_password(place.tracking_uri)
    parts = version.split(".")
    if (
        len(parts) < 2
        or not all(part.isdigit() for part in parts[:2])
        or ((int(parts[0]), int(parts[1])) < OLDEST_MLFLOW)
    ):
        oldest = ".".join(map(str, OLDEST_MLFLOW))
        raise SpinError(f"expected MLflow {oldest} or newer, got {version} at {where}; upgrade the server")
    return f"{version} at {where}"


def _base(name: str, store: Store | None, prepared: bool) -> str:
    from spin import models

    if prepared:
        raise _Skip("the run is prepared")
    if not name.startswith("s3://"):
        if name == "emoji" or Path(name).exists():
            folder = models.find(name)
            models.check(folder)
        else:
            folder = models.hub_index(name)
        return f"{name}: {models.read_index(folder)[0].pipeline.__name__}"
    if store is None:
        raise _Skip("S3 is out of reach")
    name = name.rstrip("/")
    sizes = store.sizes(name)
    if "model_index.json" not in sizes:
        raise SpinError(f"expected a diffusers pipeline folder with model_index.json, got {name}; check base_model")
    family, index = models.read_index(store.download(f"{name}/model_index.json").parent)
    for part in family.parts_of(index):
        files = [path for path in sizes if path.startswith(f"{part}/")]
        if not files:
            raise SpinError(f"expected the folder {name}/{part}, got none; upload the whole pipeline")
        if pickled := [path for path in files if Path(path).suffix in models.PICKLES]:
            raise SpinError(f"expected safetensors weights, got the pickle {name}/{pickled[0]}; convert and delete it")
    return f"{name}: {family.pipeline.__name__}, {sum(sizes.values()) / GIB:.1f} GiB"


def _data(config: RunConfig, store: Store | None, prepared: bool) -> str:
    if prepared:
        raise _Skip("the run is prepared")
    source = config.data.source
    if source == "emoji":
        return "emoji, in the package"
    if source.startswith("s3://"):
        if store is None:
            raise _Skip("S3 is out of reach")
        sizes = store.sizes(source)
        what = f"{source}, {len(sizes)} file(s), {sum(sizes.values()) / GIB:.2f} GiB"
        with tempfile.TemporaryDirectory(prefix="spin-preflight-") as folder:
            sample = _sample(store, source, sizes, Path(folder))
            if sample is None:
                return f"{what}: too large to look into"
            return _rows(config, what, str(sample))
    return _rows(config, source, source)


def _sample(store: Store, source: str, sizes: Mapping[str, int], folder: Path) -> Path | None:
    """Fetch what the first rows of data on S3 are read from; None: a large table, whose index is at its end."""
    from spin.data.sources import EXTENSIONS

    source = source.rstrip("/")

    def suffix(name: str) -> str:
        return Path(name).suffix.lower()

    def fetch(name: str) -> None:
        path = folder / name
        if ".." in path.parts:
            raise SpinError(f"expected plain file names under {source}, got {name!r}; rename it")
        path.parent.mkdir(parents=True, exist_ok=True)
        if sizes[name]:
            store.begin_of(f"{source}/{name}", MOST_FETCHED, path)
        else:  # which has no beginning
            path.touch()

    if set(sizes) == {""}:
        if suffix(source) not in (".tar", ".parquet"):
            raise SpinError(f"expected a folder, a .tar or a .parquet file, got {source}; convert the data to one")
        if suffix(source) == ".parquet" and sizes[""] > MOST_FETCHED:
            return None
        path = folder / f"data{suffix(source)}"
        store.begin_of(source, MOST_FETCHED, path)
        return path
    images = sorted(name for name in sizes if suffix(name) in EXTENSIONS)
    if "metadata.jsonl" in sizes:
        fetch("metadata.jsonl")
        lines = (folder / "metadata.jsonl").read_bytes().splitlines(keepends=True)[:ROWS_FETCHED]
        (folder / "metadata.jsonl").write_bytes(b"".join(lines))
        named = set(_named(lines))
        for name in [name for name in images if name in named][: 2 * ROWS_FETCHED]:
            fetch(name)
    elif tables := sorted(name for name in sizes if suffix(name) == ".parquet"):
        if sizes[tables[0]] > MOST_FETCHED:
            return None
        fetch(tables[0])
    else:
        for name in images[:ROWS_FETCHED]:
            fetch(name)
            if (caption := str(Path(name).with_suffix(".txt"))) in sizes:
                fetch(caption)
    return folder


def _named(lines: Sequence[bytes]) -> Iterator[str]:
    """Yield the files that lines of metadata.jsonl name."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            names = (record.get("file_name"), record.get("loser")) if isinstance(record, dict) else ()
            yield from (str(PurePosixPath(name)) for name in names if isinstance(name, str))


def _rows(config: RunConfig, what: str, source: str) -> str:
    from spin.data.sources import Rejection, Row, read

    items: list[Row | Rejection] = []
    data = config.data.model_copy(update={"source": source})
    try:
        for item in islice(read(data, config.train.needs_pairs), ROWS_LOOKED_AT):
            items.append(item)
    except SpinError:
        # Of an archive only the beginning may have been fetched.
        if what == source or not any(isinstance(item, Row) for item in items):
            raise
    rows = [item for item in items if isinstance(item, Row)]
    if not rows:
        why = next((item.reason for item in items if isinstance(item, Rejection)), "no rows")
        raise SpinError(f"expected images with captions, got none in the first rows of {what} ({why}); mend the data")
    return f"{what}: {len(rows)} of the first {len(items)} rows are usable"


def _scorer(config: ScoreConfig, store: Store | None) -> str:
    found = []
    for name in config.scorers:
        if name in ("clip_score", "style_share"):
            found.append(_judge(config.clip_model, store))
        elif pin := config.weights.get(name):
            found.append(_weights(pin.source, pin.revision, store, f"score.weights.{name}"))
        elif name == "pickscore":
            from spin.scorers.pickscore import PARTS

            found += [_weights(part.repo, part.revision, store, "score.weights.pickscore") for part in PARTS]
        elif name in BUILT_IN:
            raise SpinError(
                f"expected weights for the scorer {name}, got none; convert its authors' with `python -m spin "
                f"convert-weights {name} FOLDER` and set score.weights.{name}.source"
            )
    return ", ".join(dict.fromkeys(found)) or ", ".join(config.scorers)


def _judge(name: str, store: Store | None) -> str:
    from spin.scorers.clip import Clip

    folder = Path(Clip.find(name))
    if name != "emoji" and not folder.exists() and not name.startswith(("/", ".", "~")):
        source, _, revision = name.partition("@")
        return _weights(source, revision, store, "score.clip_model")
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise SpinError(f"expected a CLIP folder with safetensors, got {name!r}; set score.clip_model")
    return name


def _weights(source: str, revision: str, store: Store | None, named_by: str) -> str:
    """Look a scorer's weights up where they are, without fetching them."""
    if source.startswith("s3://"):
        if store is None:
            raise _Skip("S3 is out of reach")
        store.sizes(source)
    elif not Path(source).expanduser().is_dir():
        Part(source, revision or "main", ("config.json",)).fetch(named_by)
    return source


def _pairs(config: RunConfig) -> int:
    """Return the pairs per iteration where they are known beforehand, else the most that training looks at."""
    return config.data.limit or max(config.train.steps) * config.train.batch_size


def _latent_bytes(config: RunConfig) -> int:
    # Four channels of half precision at an eighth of the resolution: SD-1.x; families with sixteen have four times it.
    return 4 * 2 * math.ceil(config.data.resolution / 8) ** 2


def _scratch_bytes(config: RunConfig, store: Store | None) -> int:
    """Return the bytes that a pod's disk must hold: both sides' latents, opponent, player and a checkpoint."""
    if config.base_model.startswith("s3://"):
        try:
            model = sum(store.sizes(config.base_model).values()) if store else HUB_MODEL_BYTES
        except SpinError:
            model = HUB_MODEL_BYTES  # the check of the base model says what is wrong with it
    elif config.base_model == "emoji" or Path(config.base_model).is_dir():
        from spin import models

        model = sum(path.stat().st_size for path in models.find(config.base_model).rglob("*") if path.is_file())
    else:
        model = HUB_MODEL_BYTES
    return 2 * _pairs(config) * _latent_bytes(config) + COPIES * model


def _size(config: RunConfig, iterations: int, gpu_count: int) -> str:
    pairs = _pairs(config)
    drawn = iterations * pairs if config.train.needs_losers else 0
    drawn += (iterations + 1) * 2 * config.score.max_prompts * config.score.images_per_prompt
    done = passes(config, pairs, iterations)
    said = f"at most {drawn:,} images, {drawn * _latent_bytes(config) / GIB:.2f} GiB of latents, {done:,} passes"
    if gpu_count:
        hours = done * (config.data.resolution / 512) ** 2 / PASSES_PER_SECOND / 3600
        said += f"; about {hours:,.1f} accelerator-hours if SD-1.5 on A100"
    return said


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _need(site: Site, gpu_count: int, scratch: int, pool: str) -> Need:
    amounts = {"cpu": cluster.number(site.cpu), "memory": cluster.number(site.memory)}
    amounts["ephemeral-storage"] = float(scratch)
    if gpu_count:
        amounts[ACCELERATOR] = float(gpu_count)
    return Need(amounts, site.selector, site.tolerations, _architecture(), pool)


def _nodes(need: Need, train_nodes: int) -> str:
    if not cluster.inside():
        raise _Skip("not in a cluster")
    found = cluster.fitting(cluster.Cluster().nodes(), need)
    if (room := cluster.room(found, need)) < train_nodes:
        raise SpinError(
            f"expected room for {train_nodes} pods of {need.pool}, got room for {room} on {len(found)} node(s), e.g. "
            f"{found[0].name}; lower train_nodes, add nodes or change {need.pool}"
        )
    return f"{len(found)} node(s) fit, e.g. {found[0].name}"


def _trainer() -> str:
    if not cluster.inside():
        raise SpinError("expected a cluster for train_nodes above 1, got none; set train_nodes to 1, or KUBECONFIG")
    cluster.Cluster().need_trainer()
    return f"there, with {cluster.RUNTIME}"


def _quota(need: Need, pods: int) -> str:
    if not cluster.inside():
        raise _Skip("not in a cluster")
    wanted = {"pods": float(pods)}
    for name, amount in need.amounts.items():
        wanted[f"requests.{name}"] = pods * amount
    wanted["limits.memory"] = wanted["requests.memory"]
    # A quota may leave the prefix out.
    wanted |= {name: wanted[f"requests.{name}"] for name in ("cpu", "memory")}
    # No pod of a run asks for disk.
    del wanted["requests.ephemeral-storage"]
    where, left = cluster.namespace(), cluster.Cluster().left()
    asked = {name: amount for name, amount in wanted.items() if amount and name in left}
    for name, amount in asked.items():
        if left[name] < amount:
            kind = name.rpartition(".")[2]
            raise SpinError(
                f"expected {cluster.shown(amount, kind)} {name} within the quota of {where}, got "
                f"{cluster.shown(left[name], kind)} left; wait for other runs, lower gpu_count or train_nodes, or "
                "raise the quota"
            )
    if not asked:
        return f"no quota in {where} of what a run asks for"
    kinds = {name: name.rpartition(".")[2] for name in asked}
    said = ", ".join(f"{cluster.shown(left[name], kinds[name])} {name}" for name in asked)
    return f"{said} left in {where}"


def _disk(needed: int) -> str:
    if cluster.inside():
        raise _Skip("each pod's disk is its node's: see nodes")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise SpinError(
            f"expected {needed / GIB:.1f} GiB free in {tempfile.gettempdir()}, got {free / GIB:.1f} GiB; free some or "
            "set TMPDIR"
        )
    return f"{free / GIB:.0f} GiB free, {needed / GIB:.1f} GiB needed"
