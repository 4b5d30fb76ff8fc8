"""What work costs: FLOPs against a count by hand, the peak, and the share of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention

from spin import models
from spin.accounting import (
    cost,
    flops_of,
    flops_per_decode,
    flops_per_encode,
    flops_per_image,
    flops_per_pair,
    flops_per_pass,
    peak,
)
from spin.config import GenerateConfig, TrainConfig
from spin.models import Model
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(made: Callable[[str], Path]) -> Model:
    return models.load(made("sd1"), CPU)


def test_products_by_hand() -> None:
    one, other = torch.zeros(3, 5), torch.zeros(5, 7)
    assert flops_of(lambda: one @ other) == 2 * 3 * 5 * 7
    q = torch.zeros(1, 2, 6, 4)
    # 2 heads, 6 x 6 scores of width 4, and 6 sums of 6 values of width 4
    assert flops_of(lambda: scaled_dot_product_attention(q, q, q)) == 2 * (2 * 6 * 6 * 4) * 2


def test_sd15_costs_what_is_known_of_it() -> None:
    """0.803 TFLOP a pass (NVIDIA: 1.68 for two and the text); on the meta device nothing is computed."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        latents, text = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768)
        assert flops_of(lambda: unet(latents, torch.tensor(0), text)) / 1e12 == pytest.approx(0.8033, abs=1e-4)


def test_an_image_is_its_passes_and_what_the_autoencoder_does(model: Model) -> None:
    once, decode, encode = (work(model, tiny.LATENTS) for work in (flops_per_pass, flops_per_decode, flops_per_encode))
    assert min(once, decode, encode) > 0
    config = GenerateConfig(num_inference_steps=3, guidance_scale=2)
    assert flops_per_image(model, tiny.LATENTS, config, decoded=False) == 6 * once
    assert flops_per_image(model, tiny.LATENTS, config, decoded=True) == 6 * once + decode
    back = config.model_copy(update={"roundtrip": True})
    assert flops_per_image(model, tiny.LATENTS, back, decoded=False) == 6 * once + decode + encode


def test_a_pass_is_the_same_for_any_batch_and_a_compiled_denoiser(made: Callable[[str], Path], model: Model) -> None:
    three, conditioning = torch.zeros(3, *tiny.LATENTS), model.embed(["a", "b", "c"])
    counted = flops_of(lambda: model.predict(model.denoiser, three, torch.zeros(()), conditioning))
    assert counted == 3 * flops_per_pass(model, tiny.LATENTS)
    other = models.load(made("sd1"), CPU)
    other.compile_for("on", 1)
    assert flops_per_pass(other, tiny.LATENTS) == flops_per_pass(model, tiny.LATENTS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_counted(made: Callable[[str], Path], family: str) -> None:
    found = models.load(made(family), CPU)
    assert flops_per_pass(found, tiny.latents_shape(family)) > 10**6


def test_a_pair_is_eight_passes_and_a_winner_three(model: Model) -> None:
    once = flops_per_pass(model, tiny.LATENTS)
    assert flops_per_pair(model, tiny.LATENTS, TrainConfig()) == 8 * once
    assert flops_per_pair(model, tiny.LATENTS, TrainConfig(objective="sft")) == 3 * once


def test_the_share_of_the_peak_by_hand() -> None:
    # 10 items of 2e8 FLOPs in 4 s, where two accelerators could have done 8e9
    found = cost(1e9, 2 * 10**8, 10, 4.0, accelerators=2)
    assert found == {
        "flops": 2e9, "peak_flops": 1e9, "mfu": 0.25, "items_per_second": 2.5, "accelerator_hours": 8 / 3600,
    }  # fmt: skip
    assert cost(1e9, 2 * 10**8, 10, 4.0, accelerators=0)["mfu"] == 0.5, "a CPU counts as one"


def test_the_peak_is_that_of_this_machine() -> None:
    peak.cache_clear()
    assert 1e8 < peak("cpu", "fp32") < 1e14
    assert peak("cpu", "fp32") == peak("cpu", "fp32")
