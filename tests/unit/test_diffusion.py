"""The forward process against diffusers' own, and the error's reduction and precision."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from spin.diffusion import Diffusion, Flow, add_noise, denoising_error, process_of
from spin.errors import SpinError

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    process = process_of(config)
    assert isinstance(process, Diffusion)
    return process.alphas_cumprod


def pair(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=draws), torch.randn(count, 4, 8, 8, generator=draws)


@pytest.mark.parametrize("config", [SD15, {"num_train_timesteps": 200, "beta_schedule": "linear"}])
def test_add_noise_is_that_of_diffusers(config: dict[str, object]) -> None:
    schedule = alphas_cumprod(config)
    last = len(schedule) - 1
    latents, noise = pair(5)
    timestep = torch.tensor([0, 1, last // 3, last - 1, last])
    theirs = DDPMScheduler(**config).add_noise(latents, noise, timestep)
    torch.testing.assert_close(add_noise(latents, noise, timestep, schedule), theirs, rtol=0, atol=1e-6)


def test_schedule_of_sd15() -> None:
    schedule = alphas_cumprod(SD15)
    assert (schedule.dtype, schedule.shape) == (torch.float32, (1000,))
    # t = 0: 1 - beta_start. t = 999: sigma_max = sqrt((1 - a) / a) = 14.6146 of SD-1.5, so a = 1 / (1 + 14.6146^2)
    assert float(schedule[0]) == pytest.approx(0.99915, abs=1e-6)
    assert float(schedule[999]) == pytest.approx(0.00466, abs=1e-5)


def test_the_process_starts_at_the_image_and_ends_near_the_noise() -> None:
    schedule = alphas_cumprod(SD15)
    ones, zeros = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    first, last = torch.tensor([0]), torch.tensor([999])
    # shares of image and noise: sqrt(a), sqrt(1 - a) with a = 0.99915 and a = 0.00466
    assert add_noise(ones, zeros, first, schedule).item() == pytest.approx(0.99957, abs=1e-5)
    assert add_noise(zeros, ones, first, schedule).item() == pytest.approx(0.02915, abs=1e-5)
    assert add_noise(ones, zeros, last, schedule).item() == pytest.approx(0.06827, abs=1e-4)
    assert add_noise(zeros, ones, last, schedule).item() == pytest.approx(0.99767, abs=1e-5)


def test_every_row_has_its_own_timestep() -> None:
    schedule = torch.tensor([1.0, 0.25, 0.0])
    latents, noise = torch.full((3, 1, 1, 2), 2.0), torch.full((3, 1, 1, 2), 4.0)
    noisy = add_noise(latents, noise, torch.tensor([2, 0, 1]), schedule)
    # a = 0: 4; a = 1: 2; a = 1/4: 0.5 * 2 + sqrt(0.75) * 4 = 4.4641
    assert noisy.amax(dim=(1, 2, 3)).tolist() == pytest.approx([4.0, 2.0, 4.4641016], abs=1e-6)
    assert noisy.amin(dim=(1, 2, 3)).tolist() == pytest.approx([4.0, 2.0, 4.4641016], abs=1e-6)


def test_the_error_is_the_mean_over_channels_height_and_width() -> None:
    prediction = torch.zeros(2, 2, 1, 2)
    noise = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[2.0, 0.0]], [[0.0, 2.0]]]])
    # (1 + 9 + 0 + 0) / 4, (4 + 0 + 0 + 4) / 4
    assert denoising_error(prediction, noise).tolist() == [2.5, 2.0]


def test_the_error_of_bfloat16_predictions_is_float32() -> None:
    # Errors 1 and 2^-7: mean of squares = (1 + 2^-14) / 2. bfloat16 has 8 bits and would give 0.5.
    prediction = torch.tensor([[[[2.0, 1.0078125]]]], dtype=torch.bfloat16)
    noise = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    error = denoising_error(prediction, noise)
    assert error.dtype == torch.float32
    assert error.tolist() == [0.500030517578125]


def test_other_predictions_are_refused() -> None:
    with pytest.raises(SpinError) as caught:
        process_of({**SD15, "prediction_type": "sample"})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        "expected a model with prediction_type 'epsilon' or 'v_prediction', got 'sample'"
    )


def test_velocity_is_that_of_diffusers_and_says_which_noise_it_means() -> None:
    process = process_of({**SD15, "prediction_type": "v_prediction"})
    assert isinstance(process, Diffusion)
    latents, noise = pair(4)
    timestep = torch.tensor([0, 10, 500, 999])
    velocity = process.target(latents, noise, timestep)
    torch.testing.assert_close(velocity, DDPMScheduler(**SD15).get_velocity(latents, noise, timestep))
    noisy = process.noisy(latents, noise, timestep)
    torch.testing.assert_close(process.noise_in(velocity, noisy, timestep), noise, rtol=0, atol=1e-5)


def test_a_flows_steps_are_those_of_diffusers() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    process, stock = process_of(config), FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert process == Flow(3.0, 1000)
    latents, noise = pair(3)
    timestep = stock.timesteps[[0, 400, 999]]
    torch.testing.assert_close(process.noisy(latents, noise, timestep), stock.scale_noise(latents, timestep, noise))
    # One Euler step along the target, from sigma 1 to 0, is the image.
    torch.testing.assert_close(noise - process.target(latents, noise, timestep), latents, rtol=0, atol=1e-6)


def test_a_flows_draws_lean_towards_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    sigma = torch.cat([Flow(3.0).draw(draws) for _ in range(4000)]) / 1000
    assert 0 <= float(sigma.min()) < float(sigma.max()) < 1
    # sigma = 3u / (1 + 2u): the median is that of u = 1/2, 3/4
    assert float(sigma.median()) == pytest.approx(0.75, abs=0.02)


def test_min_snr_weights_by_hand() -> None:
    # SNR = a / (1 - a) = 9, 4, 1/4; min(SNR, 5) = 5, 4, 1/4
    alphas, timestep = torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0, 1, 2])
    assert Diffusion(alphas).min_snr_weight(timestep, 5.0).tolist() == pytest.approx([5 / 9, 1.0, 1.0])
    velocity = Diffusion(alphas, "v_prediction").min_snr_weight(timestep, 5.0)
    assert velocity.tolist() == pytest.approx([5 / 10, 4 / 5, 0.2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_flow_is_told_the_timesteps_that_diffusers_trains_with(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool
) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    process = process_of({"_class_name": type(stock).__name__, **stock.config})
    for row in (0, 400, 998):
        # train_dreambooth_sd3: timesteps[(u * 1000).long()] of the shifted, falling schedule
        uniform = stock.timesteps.numel() - row
        monkeypatch.setattr(torch, "rand", lambda *_, generator, u=uniform: torch.tensor([u / 1000]))  # noqa: ARG005
        assert float(process.draw(torch.Generator())) == pytest.approx(float(stock.timesteps[row]), rel=1e-5)


def test_noise_levels_that_are_no_timesteps() -> None:
    with pytest.raises(
        SpinError, match=r"^expected a model with the timesteps of DDPM .+, got EDMEulerScheduler .+; ch"
    ):
        process_of({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"})
