"""Named full configurations; ``preset`` in the KFP form is one of ``PRESETS``."""

from dataclasses import dataclass
from typing import Any

from spin.config import DataConfig, GenerateConfig, RunConfig, ScoreConfig, TrainConfig, nearest, override
from spin.errors import SpinError


def emoji_cpu() -> RunConfig:
    """The embedded small world: OpenMoji winners, the base and judge of the package, minutes on two CPU cores."""
    return RunConfig(
        preset="emoji-cpu",
        base_model="emoji",
        data=DataConfig(source="emoji", resolution=64, min_size=32, encode_batch=64),
        generate=GenerateConfig(guidance_scale=3.5, roundtrip=True),
        train=TrainConfig(
            # Losers that pull less: with their whole pull the second player is worse than the first (docs/results.md).
            beta=(300.0,),
            loser_gradient_scale=0.3,
            steps=(80,),
            batch_size=32,
            micro_batch_size=32,
            learning_rate=6e-5,
            warmup_steps=5,
            decay_steps=0,
            checkpoint_every=20,
        ),
        score=ScoreConfig(
            scorers=("clip_score", "style_share"),
            images_per_prompt=1,
            clip_model="emoji",
            template="{prompt}, openmoji style",
            styles=("openmoji", "noto", "twemoji", "fluent"),
        ),
    )


def sd15_paper() -> RunConfig:
    """The paper's SD-1.5 run: 512 px, batch 2048, lr 2e-5 with its schedule, beta 2000 then 5000, CFG 7.5."""
    return RunConfig(
        preset="sd15-paper",
        data=DataConfig(source="hf:yuvalkirstain/pickapic_v2", resolution=512, min_size=256),
    )


def sd15_lora() -> RunConfig:
    """SD-1.5 on one GPU: as the paper, but rank-64 adapters, batch 256, lr 1e-4, 500 steps of which 50 warm up."""
    paper = sd15_paper()
    return paper.model_copy(
        update={
            "preset": "sd15-lora",
            "train": paper.train.model_copy(
                update={
                    "lora_rank": 64,
                    "batch_size": 256,
                    "learning_rate": 1e-4,
                    "steps": (500,),
                    "warmup_steps": 50,
                }
            ),
        }
    )


PRESETS = {"emoji-cpu": emoji_cpu, "sd15-paper": sd15_paper, "sd15-lora": sd15_lora}


@dataclass(frozen=True)
class Room:
    """What a pod asks of its node, as Kubernetes writes amounts; its memory is also its limit."""

    cpu: str
    memory: str


# By work: "draw" is to prepare data, to sample and to score. The demo's processes hold at most 1.4 GiB (measured).
ROOM = {
    "emoji-cpu": {"draw": Room("1", "2Gi"), "train": Room("1", "2Gi")},
    "sd15-paper": {"draw": Room("4", "32Gi"), "train": Room("8", "64Gi")},
    "sd15-lora": {"draw": Room("4", "32Gi"), "train": Room("8", "64Gi")},
}


def room(config: RunConfig) -> dict[str, Room]:
    """Return what the pods of a run ask for, by work; another base model or judge than the preset's counts as large."""
    own = preset(config.preset)
    known = (config.base_model, config.score.clip_model) == (own.base_model, own.score.clip_model)
    return ROOM[config.preset if known else "sd15-paper"]


def preset(name: str) -> RunConfig:
    """Return the preset ``name``; an unknown name is refused with the nearest right one."""
    if name not in PRESETS:
        raise SpinError(f"expected a preset, got {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name]()


def resolve(name: str, base_model: str, data_source: str, overrides: dict[str, Any]) -> RunConfig:
    """Return the run's config: a preset, then the named options, then the overrides."""
    config = preset(name)
    named_options: dict[str, Any] = {}
    if base_model:
        named_options["base_model"] = base_model
    if data_source:
        named_options["data"] = {"source": data_source}
    data = overrides.get("data") if isinstance(overrides, dict) else None
    source = (data.get("source") if isinstance(data, dict) else None) or data_source
    if source and source != config.data.source:
        # The preset's wording of the prompts, its styles and its judges know its own data alone.
        general = ScoreConfig().model_dump(include={"template", "styles", "clip_model", "frechet_model"})
        scorers = [name for name in config.score.scorers if name != "style_share"]
        named_options["score"] = {**general, "scorers": scorers}
    return override(override(config, named_options), overrides)
