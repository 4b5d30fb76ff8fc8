"""spin-train: one iteration of self-play on winners and losers; checkpoints, player and verdict go to the store."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from spin import tracking
from spin.config import RunConfig
from spin.disk import scratch
from spin.errors import SpinError
from spin.processes import joined, node_count, rank, spread
from spin.progress import Progress, forget
from spin.run import Clock, Index, Run, iteration_stage, producer, whole_iteration, whole_shards
from spin.stages import Place, logger
from spin.stages.generate import opponent_of, shard_stage
from spin.store import Ref

SECONDS_BETWEEN_LINES = 5.0


def train(
    place: Place, iteration: int, shards: int = 1, processes: int = 0, elsewhere: Callable[[], None] | None = None
) -> Index:
    """Train the player of ``iteration`` and store it as a diffusers folder.

    ``processes`` share each batch; 0: one per promised accelerator. ``elsewhere`` is what trains in this pod's place,
    by this very function, where training is not complete.

    Returns:
        The index: outputs ``model`` (folder) and ``history`` (JSON lines, one per step); facts with the last measures,
        those on held-out pairs (``held_out``), and the ``verdict`` with its ``reason``. After ``diverged`` the model is
        the opponent, unchanged, and the output ``rejected`` is what training came to, where it came to an end.

    Raises:
        SpinError: a predecessor is incomplete.
    """
    iteration, shards = whole_iteration(iteration, 1), whole_shards(shards)
    run = place.open()
    config, clock = run.config(), Clock()
    stage = iteration_stage(iteration, "train")
    opponent = opponent_of(run, iteration, stage)
    dataset = run.need("prepare", stage).outputs["dataset"]

    def drawn(by: int, side: str = "losers") -> list[Ref]:
        return [run.need(shard_stage(by, shard, shards), stage).outputs[side] for shard in range(shards)]

    losers = drawn(iteration) if config.train.needs_losers else []
    previous = drawn(iteration - 1) if losers and config.train.previous_share and iteration > 1 else []
    best = drawn(iteration, "winners") if config.train.ranks else []
    beta, steps = config.train.of(iteration)
    inputs = {
        "opponent": opponent.digest,
        "dataset": dataset.digest,
        "losers": [ref.digest for ref in losers],
        "previous": [ref.digest for ref in previous],
        "config": config.train.model_dump(mode="json"),
        "beta": beta,
        "steps": steps,
    }
    if best:
        inputs["winners"] = [ref.digest for ref in best]
    if config.train.validate_every:
        # The player is chosen by what it draws and how that is judged.
        inputs |= {"generate": config.generate.model_dump(mode="json"), "score": config.score.model_dump(mode="json")}
    index = run.find(stage, inputs)
    processes = processes or max(1, place.accelerators)
    if index:
        forget(run, stage)
        logger.info("iteration %d: training complete, player %s", iteration, index.outputs["model"].digest[:12])
    elif elsewhere:
        try:
            elsewhere()
        except SpinError:
            # Where no node has started, nobody else tells.
            with tracking.stage(place, stage, iteration):
                raise
        index = run.need(stage, "the end of training")
    elif processes * node_count() > 1 and not joined():
        spread(processes, train, place, iteration, shards, processes)
        index = run.need(stage, "the end of training")
    if rank():
        # The first process speaks for all.
        place = replace(place, tracking_uri="")
    with tracking.stage(place, stage, iteration, system_metrics=index is None) as log:
        if index is None:
            accelerators = max(place.accelerators, processes) * node_count()
            sides = losers, previous, best
            index = _train(run, config, iteration, stage, opponent, dataset, *sides, inputs, clock, log, accelerators)
        logger.info("iteration %d: %s, %s", iteration, *verdict_of(index))
        history = run.store.get(index.outputs["history"]).read_text().splitlines()
        log.curves([json.loads(line) for line in history])
        log.index(index)
    return index


def _train(
    run: Run,
    config: RunConfig,
    iteration: int,
    stage: str,
    opponent: Ref,
    dataset: Ref,
    losers: list[Ref],
    previous: list[Ref],
    best: list[Ref],
    inputs: dict[str, Any],
    clock: Clock,
    log: tracking.StageLog,
    accelerators: int,
) -> Index:
    beta = config.train.of(iteration)[0]
    from spin import models
    from spin.accounting import cost, flops_per_pair, peak
    from spin.data.dataset import Dataset, Latents
    from spin.instruments import errors_on_grid, gradient_snr, measure, verdict
    from spin.sampling import fast_precision
    from spin.selection import Selection
    from spin.training import Diverged, Stopped, Trainer

    folder = run.store.get(opponent)
    model = models.load(folder)

    def latents(refs: list[Ref], side: str = "losers") -> Latents | None:
        return Latents.under([run.store.get(ref) for ref in refs], side) if refs else None

    winners = Dataset(run.store.get(dataset))
    flops = flops_per_pair(model, winners.latents_shape, config.train)
    trainer = Trainer(
        model,
        winners,
        winners.losers() if config.train.needs_pairs else latents(losers),
        config.train,
        iteration,
        fast_precision(model.device),
        latents(previous),
        latents(best, "winners"),
        models.compiles(config.compile, model.device, config.train.consumes(iteration)),
    )
    progress = Progress(run, stage, inputs)
    resume, before = next(iter(progress.folders), None), progress.seconds
    if resume:
        logger.info("iteration %d: resuming from step %d", iteration, progress.facts["step"])
    spoken = 0.0

    def on_step(step: int, measures: dict[str, float]) -> None:
        nonlocal spoken, resume
        if resume:
            # What the interrupted attempt did not get to tell comes before what follows.
            log.curves(told(trainer.history[:-1]))
            resume = None
        log.step(step, measures)
        scored = "validation_score" in measures
        if scored or time.monotonic() - spoken > SECONDS_BETWEEN_LINES or step == trainer.steps:
            spoken = time.monotonic()
            shown = "  ".join(
                f"{name} {measures[name]:.4g}"
                for name in ("loss", "implicit_accuracy", "winner_drift", "validation_score")
                if name in measures
            )
            logger.info("iteration %d: step %d of %d  %s", iteration, step, trainer.steps, shown)

    def store_checkpoint(path: Path, step: int, seconds: float) -> None:
        progress.replace(path, seconds, step=step)
        shutil.rmtree(path)

    upload: Future[None] | None = None

    def on_checkpoint(path: Path) -> None:
        # Training goes on beside the upload; it waits only where the one before has not ended.
        nonlocal upload
        if upload:
            upload.result()
        upload = uploads.submit(store_checkpoint, path, trainer.step, before + clock.seconds)

    # Before the first step, and before a checkpoint is loaded, the player is its opponent.
    before_training = trainer.fitting(partial(errors_on_grid, trainer))
    snr = trainer.fitting(partial(gradient_snr, trainer))
    facts: dict[str, Any] = {"beta": beta}
    selection = None
    outputs = {"model": opponent}
    with scratch() as work, ThreadPoolExecutor(1) as uploads:
        try:
            with asked_to_stop() as stop:
                if config.train.validate_every:
                    from spin.scoring import validation_score

                    between = partial(trainer.stop_if_asked, stop)
                    score = validation_score(model, config, winners, trainer.accelerator, run.store.download, between)
                    selection = Selection(score, config.train.validate_every, config.train.patience)
                try:
                    trainer.run(on_step, on_checkpoint, work, resume, stop, selection)
                finally:
                    if upload:
                        upload.result()
            after_training = trainer.fitting(partial(errors_on_grid, trainer))
            held_out = measure(before_training, after_training) | {"gradient_snr": snr}
            word, reason = verdict(held_out, selection.best_step if selection else None)
            facts["held_out"] = held_out
        except Stopped:
            kept_step = f"step {trainer.step} is kept" if trainer.step else "no step was finished"
            logger.info("iteration %d: asked to stop, %s; run again to go on", iteration, kept_step)
            raise SystemExit(128 + signal.SIGTERM) from None
        except Diverged as error:
            word, reason = "diverged", str(error)
        player = trainer.player_denoiser() if "held_out" in facts else None
        if rank():
            trainer.accelerator.wait_for_everyone()
            return run.need(stage, "the end of training")
        if player is not None:
            models.export(folder, player, work / "model")
            outputs["rejected" if word == "diverged" else "model"] = run.store.put_folder(work / "model")
        path = work / "history.jsonl"
        rows = told(trainer.history)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        outputs["history"] = run.store.put_file(path)
    facts |= {"steps": trainer.step, "micro_batch_size": trainer.micro_batch_size}
    if selection:
        facts |= {"best_step": selection.best_step, "validation_score": selection.best_score}
    if rows:
        facts["first_loss"] = rows[0]["loss"]
        facts |= {f"final_{name}": value for name, value in rows[-1].items() if name != "step"}
    seconds, items = round(before + clock.seconds, 2), trainer.step * config.train.batch_size
    index = run.finish(
        Index(
            stage=stage,
            iteration=iteration,
            inputs=inputs,
            outputs=outputs,
            facts=facts | {"verdict": word, "reason": reason},
            seconds=seconds,
            items=items,
            cost=cost(peak(model.device.type, trainer.precision), flops, items, seconds, accelerators),
            producer=producer(),
        )
    )
    forget(run, stage)
    trainer.accelerator.wait_for_everyone()
    return index


def told(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return a history without the seconds, which differ from run to run; its digest should not."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@contextmanager
def asked_to_stop() -> Iterator[Callable[..., bool]]:
    """Give a function that tells whether SIGTERM has come: a pod is being evicted. Outside a main thread it never has.

    Its argument is the seconds to wait for the signal, by default 0; when it comes, they are over.

    The signal must reach this process: a launcher in between that dies of it takes its children along, and then
    ``checkpoint_every`` is what bounds the loss. How long stopping takes: docs/operations.md.
    """
    # Not an Event: a handler that comes while its lock is held, by this very thread, would wait for ever.
    signals: SimpleQueue[int] = SimpleQueue()
    asked = False

    def stop(seconds: float = 0) -> bool:
        nonlocal asked
        if not asked:
            with suppress(Empty):
                asked = bool(signals.get(timeout=seconds))
        return asked

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.put(number))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def verdict_of(index: Index) -> tuple[str, str]:
    """Return verdict and reason of a training stage."""
    return index.facts["verdict"], index.facts["reason"]


def metadata_of(index: Index) -> dict[str, Any]:
    """Return what a player's artifact says of it: where its model is, and the verdict on its iteration."""
    verdict, reason = verdict_of(index)
    return index.outputs["model"].model_dump() | {"iteration": index.iteration, "verdict": verdict, "reason": reason}


def measures_of(index: Index) -> dict[str, float]:
    """Return the last step's measures, the change of the error on held-out real images, and the seconds."""
    names = ("first_loss", "final_loss", "final_implicit_accuracy", "final_margin", "final_winner_drift")
    found = {name: index.facts[name] for name in names if name in index.facts}
    if held_out := index.facts.get("held_out"):
        found["held_out_error_change"] = held_out["error_change"]["value"]
    return found | {"seconds": index.seconds}


def is_last(run: Run, index: Index) -> bool:
    """Return whether no further iteration is worth playing after this training stage."""
    word = index.facts["verdict"]
    return word == "diverged" or (word == "converged" and run.config().train.stop_when_converged)


def played(run: Run, iterations: int, for_what: str) -> list[Index]:
    """Return the training stages of the first ``iterations``; those not worth playing may be absent.

    Raises:
        SpinError: one of them is incomplete.
    """
    stages: list[Index] = []
    for k in range(1, iterations + 1):
        stage = iteration_stage(k, "train")
        if stages and is_last(run, stages[-1]) and run.find(stage) is None:
            break
        stages.append(run.need(stage, for_what))
    return stages


def goes_on(place: Place, iteration: int) -> bool:
    """Return whether ``iteration`` is to be played: the verdicts on all before it say so.

    Raises:
        SpinError: an earlier iteration is incomplete.
    """
    run, iteration = place.open(), whole_iteration(iteration, 1)
    before = played(run, iteration - 1, iteration_stage(iteration, "train"))
    if before and is_last(run, before[-1]):
        logger.info("iteration %d is not played; iteration %d: %s, %s", iteration, len(before), *verdict_of(before[-1]))
        return False
    return True
