"""One iteration of self-play: the player learns to tell the winners from its opponent's losers.

Opponent, reference and starting point are one checkpoint. The trainer knows tensors and a model, nothing of stores.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers.training_utils import EMAModel

from spin import checkpoint
from spin.config import TrainConfig
from spin.data.dataset import Dataset, Latents
from spin.diffusion import Diffusion, Flow, denoising_error, process_of
from spin.errors import SpinError
from spin.families import Conditioning, Denoiser
from spin.losses import Objective, sft_loss, spin_loss
from spin.memory import is_full, room_for
from spin.models import Model
from spin.sampling import autocast
from spin.seeding import generator_of, noise_of, seed_of
from spin.selection import Selection
from spin.sharding import make_whole, shard, whole
from spin.trajectory import chain_of, exact_spin

FEWER = "set train.lora_rank, or lower it, under a new run key,"
"""What takes less memory where even the weights, with what is kept for each of them, do not fit."""
logger = logging.getLogger("spin")
Done = TypeVar("Done")

LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    # The text's side of a transformer's joint attention; a UNet has none.
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
]


class Diverged(SpinError):
    """The winner's error climbed past its bound, or a measure is no number; the weights are of no use."""


class Stopped(Exception):
    """Training was asked to stop and has left a checkpoint of its last whole step."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B pairs on the device: latents and noise [B, C, H, W], timestep [B] (int64, a flow's float32).

    ``noise`` is both sides', unless ``loser_noise`` differs. For trajectories of N steps, it is [N + 1, B, C, H, W].
    """

    winner: torch.Tensor
    loser: torch.Tensor | None
    noise: torch.Tensor
    loser_noise: torch.Tensor
    timestep: torch.Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class Drawn:
    """What a ``Batch`` is made of, in main memory."""

    winner: torch.Tensor
    loser: torch.Tensor | None
    noise: torch.Tensor
    loser_noise: torch.Tensor | None
    timestep: torch.Tensor
    prompts: list[str]


def process_for(config: TrainConfig, scheduler_config: Mapping[str, Any]) -> Diffusion | Flow:
    """Return the process of a model that is to be trained so.

    Raises:
        SpinError: what is asked for needs a diffusion model, and this is a flow model.
    """
    process = process_of(scheduler_config)
    if isinstance(process, Flow):
        if config.objective == "exact-spin":
            raise SpinError("expected a diffusion model for exact-spin, got a flow model; use train.objective spin")
        if config.min_snr:
            raise SpinError(
                f"expected train.min_snr 0 for a flow model, got {config.min_snr:g}; it weighs diffusion models alone"
            )
    return process


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor`` on ``device``; a GPU's queue is not waited for, as it would be for memory that can move."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def round_weights(network: torch.nn.Module) -> None:
    """Keep the weights of a frozen network's products in bfloat16, which autocast would make of them in every pass.

    Norms compute in float32 and keep theirs.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of 0-based ``step``: linear warm-up, then constant or linear decay to 0 at ``decay_steps``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if not config.decay_steps:
        return config.learning_rate
    left = (config.decay_steps - step) / max(1, config.decay_steps - config.warmup_steps)
    return config.learning_rate * min(1.0, max(0.0, left))


def order(ids: Sequence[str], seed: int, iteration: int, start: int, count: int) -> list[tuple[int, int]]:
    """Return ``count`` (epoch, row) from position ``start`` on: every epoch visits each pair once, in its own order."""
    places, n, known = [], len(ids), {}
    for position in range(start, start + count):
        epoch = position // n
        if epoch not in known:
            known = {epoch: torch.randperm(n, generator=generator_of("order", seed, iteration, epoch)).tolist()}
        places.append((epoch, known[epoch][position % n]))
    return places


def consumed(ids: Sequence[str], config: TrainConfig, iteration: int) -> set[int]:
    """Return the rows whose losers ``iteration``'s opponent has to draw: those that are trained on, at most.

    Where the next iteration takes some of its losers from this one, these rows are among them.
    """

    def visited(by: int, count: int) -> list[tuple[int, int]]:
        return order(ids, config.seed, by, 0, count)

    rows = {row for _, row in visited(iteration, min(len(ids), config.consumes(iteration)))}
    if config.previous_share and len(rows) < len(ids):
        following = visited(iteration + 1, config.consumes(iteration + 1))
        older = from_previous(ids, following, config, iteration + 1)
        rows |= {row for (_, row), old in zip(following, older, strict=True) if old}
    return rows


def from_previous(
    ids: Sequence[str], places: Sequence[tuple[int, int]], config: TrainConfig, iteration: int
) -> list[bool]:
    """Return for (epoch, row) ``places`` whether the loser is the previous iteration's."""
    name = ("previous", config.seed, iteration)
    draws = [float(torch.rand(1, generator=generator_of(*name, epoch, ids[row]))) for epoch, row in places]
    return [draw < config.previous_share for draw in draws]


def _measures(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "seconds")}


class Trainer:
    """Trains ``model.denoiser`` in place for one iteration.

    The learning state is (weights, moments, step): the order of pairs, their timesteps and noise follow from the
    step, so a resumed run equals an uninterrupted one.

    Args:
        model: the opponent; its denoiser becomes the player.
        winners: the data set; its train rows are the pairs.
        losers: the opponent's images of the same prompts; ``None`` where the objective needs none.
        iteration: 1-based; chooses beta and steps.
        previous: the losers of the iteration before, where some are to be mixed in.
        best: winners that were drawn too, in the real images' place.
        compiled: compile the player's and the reference's forward and backward passes.

    Raises:
        SpinError: fewer pairs than one batch, or a loser is missing.
    """

    def __init__(
        self,
        model: Model,
        winners: Dataset,
        losers: Latents | None,
        config: TrainConfig,
        iteration: int,
        precision: str,
        previous: Latents | None = None,
        best: Latents | None = None,
        compiled: bool = False,
    ):
        self.previous, self.best = previous, best
        self.model, self.winners, self.losers, self.config, self.iteration = model, winners, losers, config, iteration
        self.precision = precision if config.mixed_precision == "bf16" else "fp32"
        self.beta, self.steps = config.of(iteration)
        if len(winners) < config.batch_size:
            raise SpinError(
                f"expected at least one batch of pairs ({config.batch_size}), got {len(winners)} in the data set; "
                "lower train.batch_size or add images"
            )
        if missing := self._missing():
            raise SpinError(
                f"expected a loser for every pair, got none for {len(missing)}, e.g. {missing[0]}; generate"
            )
        self.process = process_for(config, model.scheduler_config).to(model.device)
        self.accelerator = Accelerator(mixed_precision="no", cpu=model.device.type == "cpu")
        config.check_processes(self.accelerator.num_processes)
        self.micro_batch_size = config.micro_batch_size
        """Pairs per forward pass: those asked for, or as many as memory holds."""
        self.sharded = config.sharding == "fsdp" and self.accelerator.num_processes > 1
        with room_for("player and opponent", FEWER):
            self._make_players(compiled)
        self.step, self.drift = 0, 0.0
        self._vote: torch.Tensor | None = None
        self._coming: tuple[list[tuple[int, int]], Future[Drawn]] | None = None
        self.history: list[dict[str, float]] = []

    @property
    def accumulation(self) -> int:
        """Micro-batches of each process per optimizer step."""
        return self.config.batch_size // (self.micro_batch_size * self.accelerator.num_processes)

    def _missing(self) -> list[str]:
        """Return the pairs that will be trained on but have no loser."""
        ids, config = self.winners.ids, self.config
        visited = order(ids, config.seed, self.iteration, 0, config.consumes(self.iteration))
        older = from_previous(ids, visited, config, self.iteration) if self.previous else [False] * len(visited)
        sides = [(self.previous if old else self.losers, self.best) for old in older]
        return sorted({
            ids[row]
            for (_, row), pair in zip(visited, sides, strict=True)
            if any(side is not None and ids[row] not in side for side in pair)
        })  # fmt: skip

    def _make_players(self, compiled: bool) -> None:
        denoiser, device = self.model.denoiser, self.model.device
        if self.sharded:
            # What is shared out must lie in the plain layout.
            denoiser.cpu().to(memory_format=torch.contiguous_format)
        if self.config.lora_rank:
            from peft import LoraConfig

            # Adapters start at zero and the frozen weights are the opponent's: with the adapters off, the player is
            # its own reference, in every iteration, since each one's adapters are merged at its end.
            torch.manual_seed(seed_of("lora", self.config.seed, self.iteration))
            denoiser.add_adapter(
                LoraConfig(
                    r=self.config.lora_rank,
                    lora_alpha=self.config.lora_rank,
                    target_modules=LORA_TARGETS,
                    init_lora_weights="gaussian",
                )
            )
            self.reference: Denoiser = denoiser
        else:
            self.reference = denoiser if self.config.objective == "sft" else copy.deepcopy(denoiser)
            denoiser.requires_grad_(True)
        denoiser.train()
        if self.config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if self.sharded:
            shard(denoiser, device, self.precision)
            if self.reference is not denoiser:
                shard(self.reference, device, self.precision)
        elif self.precision == "bf16" and self.reference is not denoiser:
            round_weights(self.reference)
        if compiled and not self.sharded:
            for network in {denoiser, self.reference}:
                network.compile(dynamic=False)
        optimizer = torch.optim.AdamW(
            checkpoint.trained(denoiser).values(),
            fused=True,
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_epsilon,
        )
        self.optimizer = self.accelerator.prepare(optimizer)
        self.player = denoiser if self.sharded else self.accelerator.prepare(denoiser)
        decay = self.config.ema_decay
        self.average = EMAModel(list(checkpoint.trained(denoiser).values()), decay=decay) if decay else None

    def batch(self, places: Sequence[tuple[int, int]]) -> Batch:
        """Return the micro-batch of (epoch, row) ``places``, which may have been drawn ahead."""
        device, drawn = self.model.device, self._drawn(places)
        noise = sent(drawn.noise, device)
        return Batch(
            sent(drawn.winner, device),
            None if drawn.loser is None else sent(drawn.loser, device),
            noise,
            noise if drawn.loser_noise is None else sent(drawn.loser_noise, device),
            sent(drawn.timestep, device),
            # A dropped prompt must become what guidance will compare with, or the player's empty half stays untrained.
            self.embed(drawn.prompts),
        )

    def draw(self, places: Sequence[tuple[int, int]]) -> Drawn:
        """Read and draw what a micro-batch is made of; each pair has one timestep and one noise."""
        ids = [self.winners.ids[row] for _, row in places]
        name = ("train", self.config.seed, self.iteration)
        shape: tuple[int, ...] = self.winners.latents_shape
        if self.config.objective == "exact-spin":
            shape = (self.config.trajectory_steps + 1, *shape)

        def noise_for(*kind: str) -> torch.Tensor:
            rows = [noise_of(shape, *kind, *name, epoch, id) for (epoch, _), id in zip(places, ids, strict=True)]
            return torch.stack(rows, dim=len(shape) - len(self.winners.latents_shape))

        noise = noise_for()
        draws = [generator_of("timestep", *name, epoch, id) for (epoch, _), id in zip(places, ids, strict=True)]
        timestep = torch.cat([self.process.draw(draw) for draw in draws])
        dropped = torch.cat([torch.rand(1, generator=draw) for draw in draws]) < self.config.prompt_dropout
        return Drawn(
            self.winners.winners(ids) if self.best is None else self.best.of(ids),
            None if self.losers is None else self.losers_of(places),
            noise,
            None if self.config.shared_noise else noise_for("loser"),
            timestep,
            ["" if drop else self.winners.prompts[row] for drop, (_, row) in zip(dropped, places, strict=True)],
        )

    def draw_ahead(self, places: Sequence[tuple[int, int]]) -> None:
        """Begin to draw a micro-batch beside what computes, in a thread that ends with it."""
        worker = ThreadPoolExecutor(1)
        self._coming = list(places), worker.submit(self.draw, places)
        worker.shutdown(wait=False)

    def _drawn(self, places: Sequence[tuple[int, int]]) -> Drawn:
        coming, self._coming = self._coming, None
        if coming and coming[0] == list(places):
            return coming[1].result()
        if coming:
            wait([coming[1]])
        return self.draw(places)

    def embed(self, prompts: list[str]) -> Conditioning:
        """Return what the denoiser hears of ``prompts``."""
        with autocast(self.model.device, self.precision):
            return self.model.embed(prompts)

    def losers_of(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the losers' latents of (epoch, row) ``places``; some may be the previous iteration's."""
        assert self.losers is not None
        ids = [self.winners.ids[row] for _, row in places]
        if self.previous is None:
            return self.losers.of(ids)
        older = from_previous(self.winners.ids, places, self.config, self.iteration)
        sides = (self.previous if old else self.losers for old in older)
        return torch.cat([side.of([id]) for side, id in zip(sides, ids, strict=True)])

    def errors(self, denoiser: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the denoising errors [B] of winners and losers; both go through the denoiser as one batch."""
        sides = [batch.winner] if batch.loser is None else [batch.winner, batch.loser]
        n = len(sides)
        noise, timestep = torch.cat([batch.noise, batch.loser_noise][:n]), batch.timestep.repeat(n)
        latents = torch.cat(sides)
        noisy = self.process.noisy(latents, noise, timestep)
        with autocast(self.model.device, self.precision):
            prediction = self.model.predict(denoiser, noisy, timestep, batch.conditioning.repeat(n))
        error = denoising_error(prediction, self.process.target(latents, noise, timestep))
        if self.config.min_snr:
            assert isinstance(self.process, Diffusion)
            error = error * self.process.min_snr_weight(timestep, self.config.min_snr)
        winner, loser = error[: len(batch.winner)], error[len(batch.winner) :]
        return winner, loser if n == 2 else None

    @contextmanager
    def as_reference(self) -> Iterator[Denoiser]:
        """Give the opponent's network: the frozen copy, or the player's own with its adapters off."""
        denoiser = self.accelerator.unwrap_model(self.player)
        if self.config.lora_rank:
            denoiser.disable_adapters()
        try:
            with torch.no_grad():
                yield self.reference
        finally:
            if self.config.lora_rank:
                denoiser.enable_adapters()

    def reference_errors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the opponent's errors [B] of winners and losers."""
        with self.as_reference() as denoiser:
            winner, loser = self.errors(denoiser, batch)
        assert loser is not None
        return winner, loser

    def learn(self, batch: Batch, last: bool) -> Objective:
        """Go backward through the configured objective on a micro-batch; gradients are shared after the ``last``."""
        if self.config.objective == "exact-spin":
            return self._learn_exactly(batch, last)
        with self._shared(last):
            objective = self.objective(batch)
            self.accelerator.backward(objective.loss / self.accumulation)
        return objective

    @contextmanager
    def _shared(self, last: bool) -> Iterator[None]:
        """Let the processes share what gradients have come together, after the ``last`` pass of a step alone."""
        if self.sharded:
            self.player.set_requires_gradient_sync(last)
        if last or self.sharded:
            yield
        else:
            with self.accelerator.no_sync(self.player):
                yield

    def _learn_exactly(self, batch: Batch, last: bool) -> Objective:
        conditioning, process = batch.conditioning.repeat(2), self.process
        assert isinstance(process, Diffusion)

        def denoise(denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with autocast(self.model.device, self.precision):
                prediction = self.model.predict(denoiser, latents, timestep, conditioning)
            return process.noise_in(prediction.float(), latents, timestep)

        def reference(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with self.as_reference() as denoiser:
                return denoise(denoiser, latents, timestep)

        def accumulate(share: Callable[[], torch.Tensor], last_step: bool) -> None:
            with self._shared(last and last_step):
                self.accelerator.backward(share() / self.accumulation)

        return exact_spin(
            partial(denoise, self.player),
            reference,
            batch.winner,
            batch.noise,
            chain_of(process.alphas_cumprod, self.config.trajectory_steps),
            self.config.trajectory_scale,
            self.config.link,
            accumulate,
        )

    def objective(self, batch: Batch) -> Objective:
        """Return an objective of single timesteps on a micro-batch."""
        if self.config.objective == "sft":
            return sft_loss(self.errors(self.player, batch)[0])
        reference = self.reference_errors(batch)
        winner, loser = self.errors(self.player, batch)
        assert loser is not None
        return spin_loss(winner, loser, *reference, self.beta, self.config.link, self.config.loser_gradient_scale)

    def fitting(self, work: Callable[[], Done]) -> Done:
        """Return what ``work`` returns; when memory runs out, it is begun anew with smaller micro-batches.

        The batch stays what it is, so the same steps follow, but for rounding.

        Raises:
            SpinError: it runs out for a single pair, or in one of several processes: the others may be waiting for
                its gradients, and cannot be told.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_full(error):
                    raise
            # Not while the error is at hand: it holds on to the tensors of the pass that failed.
            self.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self._halve()

    def _halve(self) -> None:
        """Make micro-batches at most half as large, so that whole ones make up the batch as before."""
        size, batch = self.micro_batch_size, self.config.batch_size
        if self.accelerator.num_processes > 1:
            raise SpinError(
                f"expected memory for train.micro_batch_size {size} in each process, got none left at step "
                f"{self.step + 1} of iteration {self.iteration}; lower it, under a new run key"
            )
        if size == 1:
            raise SpinError(
                f"expected memory for a single pair, got none left at step {self.step + 1} of iteration "
                f"{self.iteration}; set train.gradient_checkpointing or train.lora_rank, under a new run key, or use a "
                "larger accelerator"
            )
        self.micro_batch_size = max(n for n in range(1, size // 2 + 1) if batch % n == 0)
        logger.warning(
            "iteration %d: no memory for micro-batches of %d pairs, going on with %d; the batch stays at %d",
            self.iteration, size, self.micro_batch_size, batch,
        )  # fmt: skip

    def train_step(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Do one optimizer step and return its measures.

        Raises:
            Stopped: ``stop`` said so between two micro-batches; the weights are those of the step before.
            SpinError: see ``fitting``.
        """
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self.fitting(partial(self._accumulate, stop))
        norm = self.accelerator.clip_grad_norm_(checkpoint.trained(self.player).values(), config.max_grad_norm)
        # The first step makes Adam's moments, which may be what does not fit.
        with room_for("the optimizer's moments", FEWER):
            self.optimizer.step()
        if self.average is not None:
            self.average.step(self.weights().values())
        self.optimizer.zero_grad(set_to_none=True)
        # The step's only wait for the device.
        told = self.accelerator.reduce(
            torch.stack([*sums.values(), whole(norm).to(self.model.device)]), "mean"
        ).tolist()
        self.step += 1
        return dict(zip([*sums, "grad_norm"], told, strict=True)) | {"learning_rate": rate}

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Return this process's share of a step's batch, as (epoch, row)."""
        size = self.config.batch_size
        places = order(self.winners.ids, self.config.seed, self.iteration, step * size, size)
        return places[self.accelerator.process_index :: self.accelerator.num_processes]

    def _accumulate(self, stop: Callable[[], bool]) -> dict[str, torch.Tensor]:
        """Sum up the gradients of this process's share of a batch; return its mean measures."""
        size, sums, places = self.micro_batch_size, dict[str, torch.Tensor](), self._places(self.step)
        following = self._places(self.step + 1) if self.step + 1 < self.steps else []
        for micro in range(self.accumulation):
            if self._asked(stop):
                self.optimizer.zero_grad(set_to_none=True)
                raise Stopped
            batch = self.batch(places[micro * size : (micro + 1) * size])
            last = micro == self.accumulation - 1
            if coming := following[:size] if last else places[(micro + 1) * size : (micro + 2) * size]:
                self.draw_ahead(coming)
            objective = self.learn(batch, last=last)
            for name, value in objective.measures.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / self.accumulation
        return sums

    def watch(self, measures: dict[str, float]) -> None:
        """Stop a run that ruins real images.

        Raises:
            Diverged: a measure is not finite, or the smoothed ``winner_drift`` exceeds ``max_winner_drift`` of the
                reference's error.
        """
        if broken := [name for name, value in measures.items() if not math.isfinite(value)]:
            raise Diverged(
                f"expected finite measures, got {broken[0]} {measures[broken[0]]} at step {self.step} of iteration "
                f"{self.iteration}; lower train.learning_rate, under a new run key"
            )
        if "winner_drift" in measures:
            drift = measures["winner_drift"] / measures["reference_error_winner"]
            self.drift = drift if self.step == 1 else 0.8 * self.drift + 0.2 * drift
            if self.drift > self.config.max_winner_drift:
                raise Diverged(
                    f"expected the winners' error to stay within {self.config.max_winner_drift:.0%} of the opponent's, "
                    f"got {self.drift:+.1%} at step {self.step} of iteration {self.iteration}; raise train.beta or "
                    "lower train.learning_rate, under a new run key"
                )

    def run(
        self,
        on_step: Callable[[int, dict[str, float]], None],
        on_checkpoint: Callable[[Path], None],
        work: Path,
        resume_from: Path | None = None,
        stop: Callable[[], bool] = lambda: False,
        selection: Selection | None = None,
    ) -> None:
        """Train up to the iteration's number of steps, or until ``selection`` is over.

        The player ends as its moving average, where one is kept, or as the best one of the selection.

        Args:
            on_step: called with the 1-based step and its measures.
            on_checkpoint: called with a checkpoint folder every ``checkpoint_every`` steps and after the last, while
                the run is healthy.
            work: scratch folder for checkpoints.
            resume_from: a checkpoint folder to go on from.
            stop: asked before every micro-batch; several processes agree one micro-batch later.
            selection: chooses the player by a held-out score. It is asked after a checkpoint of the same step, and may
                raise ``Stopped`` too.

        Raises:
            Stopped: ``stop`` said so; the last whole step went to ``on_checkpoint``.
            Diverged: see ``watch``.
        """
        if resume_from is not None:
            denoiser = self.accelerator.unwrap_model(self.player)
            with room_for("the optimizer's moments", FEWER):
                state = checkpoint.load(resume_from, denoiser, self.optimizer.optimizer, self.average)
            self.step, self.history, self.drift = state["step"], state["history"], state["drift"]
            if selection:
                selection.load(resume_from)
        elif selection:
            selection.consider(0, self.weights())
        started, before = time.monotonic(), self.history[-1]["seconds"] if self.history else 0.0
        kept = self.step
        try:
            while True:
                # Also after a checkpoint that was stored before its step's validation.
                if selection and self._unscored(selection):
                    with self.as_average():
                        self.history[-1]["validation_score"] = selection.consider(self.step, self.weights())
                    self.history[-1]["seconds"] = before + time.monotonic() - started
                    on_step(self.step, _measures(self.history[-1]))
                if self.step >= self.steps or (selection and selection.over):
                    break
                measures = self.train_step(stop)
                try:
                    self.watch(measures)
                except Diverged:
                    if selection and selection.best_step:
                        break  # The best player was well.
                    raise
                self.history.append({"step": self.step, **measures, "seconds": before + time.monotonic() - started})
                if not (selection and self._unscored(selection)):
                    on_step(self.step, measures)
                if self.step % self.config.checkpoint_every == 0:
                    self._checkpoint(work, on_checkpoint, selection)
                    kept = self.step
        except Stopped:
            if self.step > kept:
                self._checkpoint(work, on_checkpoint, selection)
            raise
        if self.history and self.history[-1]["step"] == self.step > kept:
            # What follows, measuring, exporting and storing the player, may take longer than an eviction grants.
            self._checkpoint(work, on_checkpoint, selection)
        self.stop_if_asked(stop)
        if selection:
            selection.restore(self.weights())
        elif self.average is not None:
            self.average.copy_to(self.weights().values())

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the player's weights that are trained, by name."""
        return checkpoint.trained(self.accelerator.unwrap_model(self.player))

    @contextmanager
    def as_average(self) -> Iterator[None]:
        """Give the player its moving average's weights for a while, where one is kept."""
        if self.average is not None:
            self.average.store(self.weights().values())
            self.average.copy_to(self.weights().values())
        try:
            yield
        finally:
            if self.average is not None:
                self.average.restore(self.weights().values())

    def _checkpoint(self, work: Path, on_checkpoint: Callable[[Path], None], selection: Selection | None) -> None:
        folder = work / f"checkpoint-{self.step:06d}"
        if self.accelerator.is_main_process or self.sharded:
            state = {"step": self.step, "history": self.history, "drift": self.drift}
            denoiser = self.accelerator.unwrap_model(self.player)
            checkpoint.save(folder, denoiser, self.optimizer.optimizer, state, self.average)
        if self.accelerator.is_main_process:
            if selection:
                selection.save(folder)
            on_checkpoint(folder)
        self.accelerator.wait_for_everyone()

    def _unscored(self, selection: Selection) -> bool:
        """Return whether the last step's player is to be asked about, and has not been."""
        last = self.history[-1] if self.history else {}
        return last.get("step") == self.step and "validation_score" not in last and selection.due(self.step, self.steps)

    def stop_if_asked(self, stop: Callable[[], bool]) -> None:
        """Have all processes stop where one of them is asked to.

        Raises:
            Stopped: one is.
        """
        if self._asked(stop, now=True):
            raise Stopped

    def _asked(self, stop: Callable[[], bool], now: bool = False) -> bool:
        """Return whether to stop; several processes agree on it.

        Unless ``now``, on what they said when they last asked: an accelerator has done all that came before that
        question while it is busy with what came after, so nobody waits for it.
        """
        if self.accelerator.num_processes == 1:
            return stop()
        said = self.accelerator.reduce(torch.full((1,), float(stop()), device=self.model.device), "sum")
        heard, self._vote = self._vote, said
        return bool((said if now or heard is None else heard) > 0)

    def player_denoiser(self) -> Denoiser:
        """Return the trained denoiser without wrappers, adapters merged; of a sharded one, the first process gets it.

        Every process must ask, and may ask once, at the end.
        """
        denoiser: Denoiser = self.accelerator.unwrap_model(self.player)
        if self.sharded:
            make_whole(denoiser)
            if not self.accelerator.is_main_process:
                return denoiser
        if self.config.lora_rank:
            denoiser.fuse_lora()
            denoiser.unload_lora()
        return denoiser
