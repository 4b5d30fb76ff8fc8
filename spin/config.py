"""Every setting of a run: frozen models that refuse unknown keys, one per stage.

A run is one ``RunConfig``. It starts as a preset (``spin/presets.py``), takes overrides as nested mappings, and is
written into the store by ``prepare``; the later stages read it from there, so all of them see the same numbers.
"""

import difflib
import math
import re
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spin.errors import SpinError, brief, printable
from spin.scorers import names

# Every number has an upper bound far above any use: what would end in no memory, or never, is refused at once.
Positive = Annotated[int, Field(gt=0, le=10**4)]
Many = Annotated[int, Field(gt=0, le=10**6)]
Steps = Annotated[int, Field(gt=0, le=10**7)]
StepsOrNone = Annotated[int, Field(ge=0, le=10**7)]
# Whole numbers survive JSON, which makes doubles of them in KFP, up to here.
Seed = Annotated[int, Field(ge=0, le=2**53)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
MOST_GUIDANCE = 1000
MAX_YAML = 100_000
"""Characters of options and parameters."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class DataConfig(_Config):
    """Where the winners (real images) come from and how they are cut."""

    source: str = "emoji"
    """``emoji``; a folder (imagefolder with metadata.jsonl); a .tar (WebDataset); a .parquet file; any of these on the
    run's S3 server as ``s3://bucket/path``; ``hf:NAME``."""
    split: str = "train"
    """Split to read where the source has several (``hf:``)."""
    resolution: Positive = 512
    """Side of the square training images, in pixels; a multiple of the autoencoder's factor and the denoiser's."""
    min_size: Positive = 64
    """Rows whose shorter side has fewer pixels are rejected."""
    limit: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Read at most this many accepted rows."""
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of prompts kept out of training, half of them for validation, half for test (chosen by the prompt's
    hash); ``emoji`` has its own fixed split."""
    encode_batch: Positive = 32
    """Images per autoencoder forward pass."""


class GenerateConfig(_Config):
    """How the opponent draws the losers (and how the player is drawn for scoring)."""

    solver: Literal["auto", "dpm-solver++", "ddim", "pndm", "unipc", "deis", "euler", "edm"] = "auto"
    """``auto``: DPM-Solver++, Euler for a flow model (its only one). ``edm`` is Karras et al.'s
    Heun sampler, which looks twice at a step; ``euler`` is DDIM in other variables."""
    num_inference_steps: Positive = 20
    """Steps of the solver: DPM-Solver++'s 20 exceed PNDM's 50 in the paper's rebuttal."""
    guidance_scale: Annotated[float, Field(ge=1, le=MOST_GUIDANCE, allow_inf_nan=False)] = 7.5
    """Classifier-free guidance; 1 turns it off. The paper's SD-1.5 setting."""
    opponent_guidance: Annotated[float, Field(ge=0, le=MOST_GUIDANCE, allow_inf_nan=False)] = 0.0
    """Guidance of the losers; 0: ``guidance_scale``, as in the paper. Guided losers are not quite the opponent's own
    distribution, whose unguided denoiser the loss compares; 1 draws that (method: the fixed point is then the data)."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Guidance acts from the first to the second share of the steps; outside, half the work (Kynkäänniemi et al.
    2024). The paper's, and the images compared with it, are guided throughout."""
    batch_size: Positive = 64
    """Images per denoiser call (doubled inside by guidance); compiled, one padded shape serves all batches."""
    seed: Seed = 0
    roundtrip: bool = False
    """Decode and re-encode the losers, so that both sides of a pair carry the autoencoder's signature."""

    @model_validator(mode="after")
    def _guidance_or_none(self) -> Self:
        if 0 < self.opponent_guidance < 1:
            raise ValueError(
                f"expected opponent_guidance of at least 1, or 0 for guidance_scale, got {self.opponent_guidance}"
            )
        return self

    @model_validator(mode="after")
    def _interval_in_order(self) -> Self:
        first, last = self.guidance_interval
        if first > last:
            raise ValueError(f"expected guidance_interval as (from, to), got ({first:g}, {last:g})")
        return self

    def guided(self, calls: int) -> list[bool]:
        """Return for each of the denoiser's ``calls`` whether it is guided, which doubles its work."""
        first, last = self.guidance_interval
        return [self.guidance_scale > 1 and first <= call / calls < last for call in range(calls)]

    @property
    def of_losers(self) -> Self:
        """How the losers are drawn."""
        return self.model_copy(update={"guidance_scale": self.opponent_guidance or self.guidance_scale})


def foreign_to(objective: str, pairs: str) -> set[str]:
    """Return the options of training that an objective does not read."""
    trajectories = {"trajectory_steps", "trajectory_scale"}
    return {
        "spin": {"pairs", "ranked_draws", *trajectories},
        "exact-spin": {"pairs", "ranked_draws", "beta", "shared_noise", "min_snr", "loser_gradient_scale",
                       "previous_share"},
        "sft": {"pairs", "ranked_draws", "beta", "shared_noise", "loser_gradient_scale", "previous_share", "link",
                "max_winner_drift", *trajectories},
        "dpo": {"previous_share", *trajectories} | ({"ranked_draws"} if pairs != "ranked" else set()),
    }.get(objective, set())  # fmt: skip


class TrainConfig(_Config):
    """How the player learns. Defaults are those of the paper's SD-1.5 runs (method section 5.1, rebuttal B.1)."""

    objective: Literal["spin", "exact-spin", "sft", "dpo"] = "spin"
    """``spin``: approximate SPIN, Eq. 3.9; ``exact-spin``: on whole trajectories, Eq. 3.8, drawn while training
    (diffusion models alone); ``sft``: denoising loss on the winners alone; ``dpo``: Diffusion-DPO, the same loss as
    SPIN's on ``pairs`` (one iteration: its reference is the base model)."""
    pairs: Literal["given", "ranked"] = "given"
    """``dpo``: pairs are the data's own, or, where it has winners alone, drawn by the base model: of
    ``ranked_draws`` images per prompt the one with the best primary score is the winner, the worst the loser. That
    learns from a judge, which self-play does not, and from the one that later tells who has won."""
    ranked_draws: Annotated[int, Field(ge=2, le=1000)] = 4
    link: Literal["logistic", "hinge", "correlation", "exponential"] = "logistic"
    """Decreasing convex function of the advantage: see ``spin.losses``. The paper trains with the logistic one."""
    beta: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=1000)] = (2000.0, 5000.0)
    """Strength per iteration, the last one repeated; a number is that of all. It multiplies 1/2 of the difference of
    the *mean*-reduced (over C, H, W) errors: see ``spin.losses.spin_loss``."""
    trajectory_steps: Annotated[int, Field(gt=0, lt=1000)] = 20
    """``exact-spin``: steps of the reverse process."""
    trajectory_scale: PositiveFloat = 0.01
    """``exact-spin``: lambda of Eq. 3.8, in place of beta."""
    steps: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=1000)] = (50, 500, 300)
    """Optimizer steps per iteration, the last one repeated; a number is that of all."""
    batch_size: Many = 2048
    """Pairs per optimizer step, over all processes and micro-batches."""
    micro_batch_size: Positive = 8
    """Pairs per forward pass and process."""
    learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 2e-5
    warmup_steps: StepsOrNone = 200
    """Linear warm-up. The paper's 200 exceed its first iteration, which never reaches the peak."""
    decay_steps: StepsOrNone = 500
    """Linear decay from the peak to 0 at this step (the paper's schedule); 0: constant."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    max_grad_norm: PositiveFloat = 1.0
    lora_rank: Annotated[int, Field(ge=0, le=10**4)] = 0
    """0 trains the whole denoiser; above 0, adapters of this rank that are merged at the end of the iteration."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Compute type of the denoiser, ``bf16`` where the hardware multiplies it natively; weights and errors stay
    float32."""
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp`` spreads player, opponent and moments over all processes (FSDP2), for models that do not fit
    one accelerator; slower than ``none``, where each process holds all of them. One process alone has nothing to
    spread."""
    shared_noise: bool = True
    """Winner and loser of a pair get the same noise (as in Diffusion-DPO's code): less variance, the same bound."""
    min_snr: NonNegativeFloat = 0.0
    """Above 0, errors are weighted by min(SNR, this) / SNR, which plays down the nearly clean timesteps (Hang et al.
    2023, usually 5); 0: the paper's constant weight, and a flow model's only choice."""
    loser_gradient_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1, the loser's error pulls less than the winner's: a guard for runs whose winners drift (Diffusion-SDPO
    uses 0.93 for SD-1.5). The loss keeps its value."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Above 0, the player that leaves the iteration is the moving average of its weights over steps (0.999, say);
    0: the last weights, as in the paper, whose iterations are too short for an average to forget its start."""
    previous_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pairs whose loser is the previous iteration's, from iteration 2 on (SPIN for language models mixes
    both); the paper draws all of them anew."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pairs trained with the empty prompt, as guidance hears it (Diffusion-DPO uses 0.2)."""
    max_winner_drift: PositiveFloat = 0.1
    """Training stops when the winner's error exceeds the reference's by this share (smoothed over steps)."""
    validate_every: StepsOrNone = 0
    """Above 0, the player draws and scores the validation prompts every so many steps; the iteration ends with the best
    one so far when ``patience`` scores in a row were no better, at the latest after ``steps``. 0: the paper's fixed
    steps, which its authors chose on validation results by hand."""
    patience: Steps = 3
    stop_when_converged: bool = True
    """The pipeline plays no further iteration after one with the verdict ``converged`` (see ``spin.instruments``);
    after ``diverged`` it never does."""
    checkpoint_every: Steps = 50
    """Steps between resumable checkpoints."""
    seed: Seed = 0

    @field_validator("beta", "steps", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def needs_losers(self) -> bool:
        """Whether the opponent's images must be drawn before training."""
        return self.objective == "spin" or self.ranks

    @property
    def ranks(self) -> bool:
        """Whether a scorer makes pairs of several draws per prompt."""
        return self.objective == "dpo" and self.pairs == "ranked"

    @property
    def needs_pairs(self) -> bool:
        """Whether the data must hold a loser beside each winner."""
        return self.objective == "dpo" and not self.ranks

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"expected batch_size to be a multiple of micro_batch_size, got {self.batch_size} and "
                f"{self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _options_of_the_objective(self) -> Self:
        plain = type(self).model_fields
        for name in sorted(foreign_to(self.objective, self.pairs)):
            if (value := getattr(self, name)) != plain[name].default:
                raise ValueError(
                    f"expected {name} as it is for objective {self.objective}, got {value!r}; it has no use"
                )
        return self

    @model_validator(mode="after")
    def _rate_above_zero(self) -> Self:
        if self.decay_steps and max(self.steps) > self.decay_steps:
            raise ValueError(
                f"expected decay_steps of at least the longest iteration's steps ({max(self.steps)}), got "
                f"{self.decay_steps}; later steps would train at rate 0: raise it, or set 0 for a constant rate"
            )
        return self

    def of(self, iteration: int) -> tuple[float, int]:
        """Return (beta, steps) of 1-based ``iteration``."""
        last = iteration - 1
        return self.beta[min(last, len(self.beta) - 1)], self.steps[min(last, len(self.steps) - 1)]

    def check_processes(self, processes: int) -> None:
        """See that so many processes can share a batch.

        Raises:
            SpinError: they can't do so evenly.
        """
        share = self.micro_batch_size * processes
        if self.batch_size % share:
            raise SpinError(
                f"expected train.batch_size to be a multiple of micro_batch_size x processes ({share}), got "
                f"{self.batch_size}; change one of them"
            )

    def consumes(self, iteration: int) -> int:
        """Return how many pairs ``iteration`` trains on at most, repetitions included."""
        return self.of(iteration)[1] * self.batch_size


class WeightsConfig(_Config):
    """Where a scorer's weights are."""

    source: str
    """Folder, one on the run's S3 server (``s3://bucket/path``), or hub name; with ``model.safetensors`` and what
    belongs to it."""
    revision: str = ""
    """Commit of a hub name; empty: the newest."""
    digest: str = ""
    """SHA-256 that ``convert-weights`` prints and every score stage records; other weights are refused."""


class ScoreConfig(_Config):
    """What is measured on held-out prompts, and with which judge."""

    scorers: Annotated[tuple[str, ...], Field(min_length=1, max_length=100)] = ("clip_score",)
    """Names of scorers (``spin.scorers``); the first is the primary one: it decides wins and picks the best player."""
    weights: dict[str, WeightsConfig] = {}
    """Weights by scorer, where they are not what the scorer loads by itself (which ``pickscore`` alone can)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which the scorers' networks compute; CLIP score and style share are always float32."""
    prompts: str = ""
    """Prompts of the test split in place of the data set's: ``pickapic-test``, ``partiprompts``, ``hpsv2-benchmark``,
    or a file (.txt, .csv, .tsv, .json, .jsonl, .parquet), also on the run's S3 server. All of them are drawn."""
    clip_model: str = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
    """CLIP folder, one on the run's S3 server (``s3://bucket/path``), or hub name, possibly with ``@revision``;
    ``emoji`` is the judge that ships with the package."""
    frechet_model: str = ""
    """Image model in whose features the Fréchet distance to the held-out real images is measured, one image per prompt;
    empty: it is not. Named as ``clip_model`` is; ``emoji`` is the one that ships with the package."""
    template: str = "{prompt}"
    """Text given to the CLIP scorer; ``{prompt}`` stands for the prompt."""
    styles: Annotated[tuple[str, ...], Field(max_length=1000)] = ()
    """Styles told apart by the style share, the wanted one first."""
    max_prompts: Many = 500
    """At most this many held-out prompts of each split (validation, test) are drawn."""
    images_per_prompt: Positive = 5
    """Images per prompt; the best of them is measured too, which is what the paper's tables show of five."""
    seed: Seed = 1000
    bootstrap: Annotated[int, Field(gt=0, le=10**5)] = 2000
    """Resamples of the paired bootstrap over prompts."""
    sheet_prompts: Positive = 12
    """Prompts on the contact sheet and in the report; of many, as many as there is room for."""

    @field_validator("template")
    @classmethod
    def _names_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("expected a template with {prompt}")
        return value

    @model_validator(mode="after")
    def _known_scorers(self) -> Self:
        known = names()
        for name in (*self.scorers, *self.weights):
            if name not in known:
                raise ValueError(f"expected a scorer, got {brief(name)}; {nearest(name, known)}")
        if len({*self.scorers}) < len(self.scorers):
            raise ValueError(f"expected each scorer once, got {brief(self.scorers)}")
        if "style_share" in self.scorers and not self.styles:
            raise ValueError("expected score.styles for style_share, got none; name them or leave the scorer out")
        return self

    @property
    def primary(self) -> str:
        """The score that decides wins, picks the best player and ranks draws."""
        return self.scorers[0]


class RunConfig(_Config):
    """The whole of a run; equal configs give equal results, so the config is part of the run's identity."""

    preset: str
    base_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Diffusers folder, one on the run's S3 server (``s3://bucket/path``), or hub name; ``emoji`` is in the package."""
    data: DataConfig = DataConfig()
    generate: GenerateConfig = GenerateConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the denoiser is compiled (torch.compile); ``auto``: on CUDA, where a stage has enough work to repay it.
    The results differ by rounding."""

    @field_validator("base_model")
    @classmethod
    def _can_be_found(cls, value: str) -> str:
        if "://" in value and not value.startswith("s3://"):
            raise ValueError("expected a model folder, its s3:// address or a hub name")
        return value


def nearest(word: str, known: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, else the list of known words."""
    match = difflib.get_close_matches(word[:200], known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def _fields_at(path: tuple[str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        # In a mapping of sections, any name leads to the same options.
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else get_args(model)[1]
    return list(model.model_fields)


def _readable(error: ValidationError) -> str:
    first = error.errors()[0]
    path = tuple(part if isinstance(part, str) else brief(part) for part in first["loc"])
    where = printable(".".join(path)) or "every name"
    if first["type"] == "extra_forbidden":
        return f"expected a known option, got {where!r}; {nearest(path[-1], _fields_at(path[:-1]))}"
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    shown = "" if isinstance(got, dict | BaseModel) else f", got {brief(got)}"
    if should := re.match(r"(?:Input|Tuple) should (.+?)(?: after validation, .*)?$", message):
        return f"expected {where} to {should[1].replace('a valid tuple', 'a list')}{shown}; change it"
    return f"{where}: {message}{shown}" if where else message


def merge(base: dict[str, Any], overrides: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Return ``base`` with nested ``overrides`` laid over it; a section replaced by a plain value is an error."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(merged.get(key), dict):
            if not isinstance(value, dict):
                raise SpinError(f"expected a mapping of options under {where}{key}, got {brief(value)}; nest it")
            merged[key] = merge(merged[key], value, f"{where}{key}.")
        else:
            merged[key] = value
    return merged


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which can make gigabytes of a line, and tags, which ask for other types."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag or isinstance(event, yaml.AliasEvent):
            fault = f"could not determine a constructor for the tag {tag!r}" if tag else "found an alias"
            raise yaml.composer.ComposerError(None, None, fault, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def plain_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text that a user gave.

    Raises:
        YAMLError: it is none, or has aliases or tags.
        ValueError: it is long or deep beyond all use, or holds a number or a date that is none.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"more than {MAX_YAML} characters")
    try:
        return _Plain(text).get_single_data()
    except RecursionError:
        raise ValueError("lists or mappings nested too deeply") from None


def integral(value: Any) -> Any:
    """Undo what JSON transports do to whole numbers (KFP turns ``50`` inside a mapping into ``50.0``)."""
    if isinstance(value, dict):
        return {key: integral(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [integral(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def override(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """Return ``config`` with ``overrides`` such as ``{"train": {"beta": [3000]}}`` applied and checked.

    With another objective, options that it does not read are no longer the config's own, but the defaults.

    Raises:
        SpinError: an unknown key (the nearest right name is offered) or a value outside its range.
    """
    if not isinstance(overrides, dict):
        raise SpinError(
            f"expected overrides as a mapping like {{'train': {{'beta': [3000]}}}}, got {brief(overrides)}; nest them"
        )
    try:
        merged = merge(config.model_dump(mode="json"), integral(overrides))
        train = merged["train"]
        if isinstance(train.get("objective"), str) and train["objective"] != config.train.objective:
            for name in foreign_to(train["objective"], train["pairs"]) - overrides["train"].keys():
                train[name] = TrainConfig.model_fields[name].default
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise SpinError(f"{_readable(error)} (in overrides)") from None
    except RecursionError:
        raise SpinError("expected sections of options, got them nested too deeply (in overrides); mend them") from None
