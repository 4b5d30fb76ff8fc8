"""Settings: what is wrong is refused in one line that says what was meant; presets hold the published numbers."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from yaml import YAMLError

from spin.config import RunConfig, ScoreConfig, TrainConfig, integral, merge, nearest, override, plain_yaml
from spin.errors import SpinError
from spin.presets import PRESETS, preset, resolve


def refusal(overrides: Any) -> str:
    with pytest.raises(SpinError) as caught:
        override(preset("emoji-cpu"), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train": {"lerning_rate": 1e-5}},
            "expected a known option, got 'train.lerning_rate'; did you mean 'learning_rate'? (in overrides)",
        ),
        ({"trian": {"beta": [1]}}, "expected a known option, got 'trian'; did you mean 'train'? (in overrides)"),
        (
            {"generate": {"qqqq": 1}},
            "expected a known option, got 'generate.qqqq'; known: batch_size, guidance_interval, guidance_scale, "
            "num_inference_steps, opponent_guidance, roundtrip, seed, solver (in overrides)",
        ),
    ],
)
def test_unknown_options_name_the_nearest(overrides: dict[str, Any], message: str) -> None:
    assert refusal(overrides) == message


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"train": {"learning_rate": math.nan}}, "train.learning_rate"),
        ({"train": {"beta": [2000, math.inf]}}, "train.beta.1"),
        ({"train": {"weight_decay": -math.inf}}, "train.weight_decay"),
        ({"generate": {"guidance_scale": math.inf}}, "generate.guidance_scale"),
        ({"train": {"steps": [math.nan]}}, "train.steps.0"),
        ({"train": {"steps": [0]}}, "train.steps.0"),
        ({"train": {"steps": []}}, "train.steps"),
        ({"train": {"beta": []}}, "train.beta"),
        ({"train": {"beta": -3000}}, "train.beta.0"),
        ({"train": {"beta": "many"}}, "train.beta"),
        ({"train": {"steps": True}}, "train.steps"),
        ({"train": {1: 2}}, "train.1"),
        ({"base_model": {"name": "x"}}, "base_model"),
        ({"train": {"batch_size": 32.5}}, "train.batch_size"),
        ({"train": {"prompt_dropout": 1}}, "train.prompt_dropout"),
        ({"train": {"objective": "ppo"}}, "train.objective"),
        ({"generate": {"guidance_scale": 0.5}}, "generate.guidance_scale"),
        ({"generate": {"opponent_guidance": 0.5}}, "generate"),
        ({"data": {"held_out_share": 1.0}}, "data.held_out_share"),
        ({"score": {"seed": -1}}, "score.seed"),
        ({"score": {"template": "a picture"}}, "score.template"),
        ({"base_model": None}, "base_model"),
    ],
)
def test_values_out_of_range_name_their_place(overrides: dict[str, Any], where: str) -> None:
    message = refusal(overrides)
    assert message.startswith((f"expected {where} to ", f"{where}: ")), message


def numbers(schema: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every number and list in a JSON schema, with the name of its option."""
    if schema.get("type") in ("integer", "number", "array"):
        yield name, schema
    for key, inner in schema.get("properties", {}).items():
        yield from numbers(inner, key)
    for inner in schema.get("$defs", {}).values():
        yield from numbers(inner)
    for inner in (*schema.get("anyOf", ()), *schema.get("prefixItems", ()), *filter(None, [schema.get("items")])):
        yield from numbers(inner, name)


def test_every_number_and_list_has_an_upper_bound() -> None:
    found = list(numbers(RunConfig.model_json_schema()))
    assert len(found) > 40
    bounds = {"maximum", "exclusiveMaximum", "maxItems"}
    assert [name for name, schema in found if not bounds & schema.keys()] == []


def test_bounds_are_those_of_use() -> None:
    message = refusal({"score": {"bootstrap": 10**12}})
    assert message == (
        "expected score.bootstrap to be less than or equal to 100000, got 1000000000000; change it (in overrides)"
    )
    assert refusal({"train": {"seed": int("f" * 5000, 16)}}) == (
        "expected train.seed to be less than or equal to 9007199254740992, got a value of type int that is too long to "
        "show; change it (in overrides)"
    )


def test_what_was_got_is_shown_in_one_bounded_line() -> None:
    message = refusal({"score": {"weights": {"a\nb\x1b[31m": 1}}})
    assert message.startswith("expected score.weights.a\\nb\\x1b[31m to be ")
    assert len(refusal({"train": {"link": "x" * 10**6}})) < 500
    assert len(refusal({"x" * 10**6: 1})) < 500


@pytest.mark.parametrize("text", ["a: &a 1\nb: *a", "!!int ''", "!!python/name:os.system", "!x 1"])
def test_yaml_has_no_aliases_or_tags(text: str) -> None:
    with pytest.raises(YAMLError, match=r"found an alias|could not determine a constructor for the tag"):
        plain_yaml(text)


def test_yaml_is_short_and_flat() -> None:
    assert plain_yaml('{train: {beta: [3000, 1.5], "link": hinge}}') == {
        "train": {"beta": [3000, 1.5], "link": "hinge"}
    }
    with pytest.raises(ValueError, match="nested too deeply"):
        plain_yaml("[" * 3000)
    with pytest.raises(ValueError, match="more than 100000 characters"):
        plain_yaml(b" " * 100_001)


def test_what_was_got_is_shown() -> None:
    wanted = "expected train.batch_size to be greater than 0, got -8; change it (in overrides)"
    assert refusal({"train": {"batch_size": -8}}) == wanted


@pytest.mark.parametrize("overrides", [[], "train.beta=1", None, 3, [{"train": {}}]])
def test_overrides_must_be_a_mapping(overrides: Any) -> None:
    assert refusal(overrides).startswith("expected overrides as a mapping like {'train': {'beta': [3000]}}, got ")


@pytest.mark.parametrize("value", [5, None, "beta", [1]])
def test_a_section_is_not_replaced_by_a_value(value: Any) -> None:
    assert refusal({"train": value}) == f"expected a mapping of options under train, got {value!r}; nest it"


def test_micro_batches_must_fill_the_batch() -> None:
    message = refusal({"train": {"batch_size": 32, "micro_batch_size": 5}})
    assert "expected batch_size to be a multiple of micro_batch_size, got 32 and 5" in message


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "exact-spin", "min_snr": 5},
        {"objective": "exact-spin", "beta": [3000]},
        {"objective": "sft", "beta": [3000]},
        {"objective": "sft", "max_winner_drift": 0.2},
        {"objective": "sft", "trajectory_steps": 5},
        {"objective": "spin", "trajectory_steps": 5},
        {"objective": "spin", "trajectory_scale": 0.02},
        {"objective": "dpo", "trajectory_scale": 0.02},
        {"objective": "sft", "shared_noise": False},
        {"objective": "sft", "link": "hinge"},
        {"objective": "dpo", "previous_share": 0.5},
        {"objective": "dpo", "ranked_draws": 8},
        {"objective": "spin", "pairs": "ranked"},
    ],
)
def test_options_without_use_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpinError, match=r"expected \w+ as it is for objective \S+, got .+; it has no use"):
        override(preset("emoji-cpu"), {"train": options})


def test_no_step_trains_at_rate_zero() -> None:
    with pytest.raises(SpinError, match=r"expected decay_steps of at least the longest .+ \(501\), got 500; .+"):
        override(preset("sd15-paper"), {"train": {"steps": [501]}})
    assert override(preset("sd15-paper"), {"train": {"steps": [501], "decay_steps": 0}}).train.steps == (501,)


def test_other_data_leaves_the_small_worlds_wording_and_judge() -> None:
    own, other = resolve("emoji-cpu", "", "", {}).score, resolve("emoji-cpu", "", "./images", {}).score
    assert (own.template, len(own.styles), own.clip_model) == ("{prompt}, openmoji style", 4, "emoji")
    assert (other.template, other.styles) == ("{prompt}", ())
    assert (other.clip_model, other.frechet_model) == (ScoreConfig().clip_model, "")
    named = {"clip_model": "emoji", "frechet_model": "emoji"}
    assert resolve("emoji-cpu", "", "./images", {"score": named}).score.model_dump(include={*named}) == named
    assert resolve("emoji-cpu", "", "", {"data": {"source": "./images"}}).score.template == "{prompt}"
    assert resolve("emoji-cpu", "", "./images", {"score": {"template": "a {prompt}"}}).score.template == "a {prompt}"


def test_whole_floats_are_counts_again() -> None:
    # KFP sends the numbers of a mapping as doubles
    config = override(preset("emoji-cpu"), {"train": {"steps": [50.0, 60.0], "warmup_steps": 7.0, "beta": [3000.0]}})
    assert (config.train.steps, config.train.warmup_steps, config.train.beta) == ((50, 60), 7, (3000.0,))
    assert all(type(step) is int for step in config.train.steps)
    assert type(config.train.beta[0]) is float


def test_integral_reaches_every_depth_and_keeps_the_rest() -> None:
    given = {"a": [1.0, 2.5, {"b": (3.0,)}], "c": "4.0", "d": True, "e": None, "f": math.inf}
    assert integral(given) == {"a": [1, 2.5, {"b": [3]}], "c": "4.0", "d": True, "e": None, "f": math.inf}
    assert type(integral(50.0)) is int
    assert math.isnan(integral(math.nan))


def test_overrides_touch_only_what_they_name() -> None:
    before = preset("emoji-cpu")
    after = override(before, {"train": {"beta": [1000]}})
    assert after.train.beta == (1000.0,)
    assert before == preset("emoji-cpu")
    assert before.train.beta != (1000.0,)
    assert after.model_copy(update={"train": before.train}) == before
    assert after.train.model_copy(update={"beta": before.train.beta}) == before.train
    assert override(before, {}) == before


def test_merge_leaves_its_arguments_alone() -> None:
    base, overrides = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}}
    assert merge(base, overrides) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert (base, overrides) == ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}})


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        preset("emoji-cpu").train.learning_rate = 1.0  # type: ignore[misc]


def test_the_last_beta_and_step_count_repeat() -> None:
    config = TrainConfig(beta=(2000, 5000), steps=(50, 500, 300))
    assert [config.of(k) for k in (1, 2, 3, 4)] == [(2000.0, 50), (5000.0, 500), (5000.0, 300), (5000.0, 300)]


def test_one_beta_or_step_count_is_that_of_all_iterations() -> None:
    one = override(preset("emoji-cpu"), {"train": {"beta": 3000, "steps": 100.0}})
    assert one == override(preset("emoji-cpu"), {"train": {"beta": [3000], "steps": [100]}})
    assert [one.train.of(k) for k in (1, 4)] == [(3000.0, 100)] * 2
    assert refusal({"train": {"steps": "many"}}) == (
        "expected train.steps to be a list, got 'many'; change it (in overrides)"
    )


def test_unknown_preset() -> None:
    with pytest.raises(SpinError) as caught:
        preset("sd15-papre")
    assert str(caught.value) == "expected a preset, got 'sd15-papre'; did you mean 'sd15-paper'?"
    with pytest.raises(SpinError, match="known: emoji-cpu, sd15-lora, sd15-paper"):
        preset("zzz")


def test_nearest() -> None:
    assert nearest("stpes", ["steps", "beta"]) == "did you mean 'steps'?"
    assert nearest("xyz", ["steps", "beta"]) == "known: beta, steps"


def test_sd15_paper_holds_the_published_numbers() -> None:
    config = preset("sd15-paper")
    assert config.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert config.data.resolution == 512
    assert (config.generate.num_inference_steps, config.generate.guidance_scale) == (20, 7.5)
    assert config.generate.batch_size == 64
    train = config.train
    assert (train.batch_size, train.learning_rate, train.warmup_steps, train.decay_steps) == (2048, 2e-5, 200, 500)
    assert [train.of(k)[0] for k in (1, 2, 3)] == [2000.0, 5000.0, 5000.0]
    assert (train.objective, train.lora_rank, train.prompt_dropout) == ("spin", 0, 0.0)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)


def test_sd15_lora_differs_from_the_paper_in_training_alone() -> None:
    paper, lora = preset("sd15-paper"), preset("sd15-lora")
    assert lora.train.lora_rank == 64
    assert lora.model_copy(update={"train": paper.train, "preset": "sd15-paper"}) == paper


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    # model_copy does not validate, so an invalid preset would pass unseen without this.
    again = RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert override(config, config.model_dump(mode="json")) == config


OFF = {
    "shared_noise": True, "min_snr": 0, "loser_gradient_scale": 1, "ema_decay": 0, "previous_share": 0,
    "prompt_dropout": 0, "validate_every": 0, "lora_rank": 0, "gradient_checkpointing": False, "sharding": "none",
    "link": "logistic", "pairs": "given",
}  # fmt: skip
"""What the paper does without, or what its code does (docs/training.md has the reasons)."""


@pytest.mark.parametrize("name", ["default", *PRESETS])
def test_what_the_paper_does_without_is_off(name: str) -> None:
    train = TrainConfig() if name == "default" else preset(name).train
    on = {"emoji-cpu": {"loser_gradient_scale": 0.3}, "sd15-lora": {"lora_rank": 64}}.get(name, {})
    assert {option: getattr(train, option) for option in OFF} == {**OFF, **on}


def test_a_grid_over_an_option_without_use_is_refused_as_one_line() -> None:
    assert refusal({"train": {"objective": "exact-spin", "beta": [3000]}}) == (
        "train: expected beta as it is for objective exact-spin, got (3000.0,); it has no use (in overrides)"
    )
    assert override(preset("emoji-cpu"), {"train": {"objective": "sft"}}).train.beta == TrainConfig().beta


def test_another_objective_drops_options_that_it_does_not_read() -> None:
    mild = override(preset("sd15-paper"), {"train": {"loser_gradient_scale": 0.5, "previous_share": 0.2}})
    sft = override(mild, {"train": {"objective": "sft"}})
    assert (sft.train.loser_gradient_scale, sft.train.previous_share) == (1, 0)
    assert override(mild, {"train": {"objective": "spin"}}) == mild
    assert "loser_gradient_scale" in refusal({"train": {"objective": "sft", "loser_gradient_scale": 0.5}})
