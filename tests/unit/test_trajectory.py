"""The chain is DDIM's, and the two-pass exact objective is plain autograd's, in memory that does not grow."""

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from spin.losses import LINKS
from spin.trajectory import Chain, Denoiser, chain_of, exact_spin, real_trajectory, transition_drift

ALPHAS = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
SHAPE = (2, 4, 4)


class Net(nn.Module):
    """A small denoiser that depends on latents and timestep."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = (timestep.float() / 1000).view(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:])
        out: torch.Tensor = self.two(torch.tanh(self.one(torch.cat([latents, time], 1))))
        return out


def near(reference: Net, seed: int = 0) -> Net:
    """Return a player that has learnt a little: as its reference, but for 2 % of the way to another network.

    Between strangers, the sums are in the thousands, where every link is a straight line or flat.
    """
    player = Net(seed)
    for mine, theirs in zip(player.parameters(), reference.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.98)
    return player


def backward(share: Callable[[], torch.Tensor], last: bool) -> None:  # noqa: ARG001
    share().backward()


def draws(steps: int, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    winner = torch.randn(batch, *SHAPE, generator=generator)
    return winner, torch.randn(steps + 1, batch, *SHAPE, generator=generator)


def plain(player: Denoiser, reference: Denoiser, winner: torch.Tensor, noise: torch.Tensor, chain: Chain, scale: float):
    """Return every step's z_i [N, B] as the equation has it, all activations kept."""
    real = real_trajectory(chain, winner, noise)
    with torch.no_grad():
        losers = [noise[0]]
        for step, t in enumerate(chain.timesteps):
            predicted = reference(losers[-1], t.expand(len(winner)))
            losers.append(chain.mean(step, losers[-1], predicted) + chain.sigma[step] * noise[step + 1])
    terms = []
    for step, t in enumerate(chain.timesteps):
        both = []
        for path in (real, losers):
            x, after = path[step], path[step + 1]
            with torch.no_grad():
                theirs = (after - chain.mean(step, x, reference(x, t.expand(len(x))))).double().pow(2).sum((1, 2, 3))
            ours = (after - chain.mean(step, x, player(x, t.expand(len(x))))).double().pow(2).sum((1, 2, 3))
            both.append((ours - theirs) / (2 * chain.sigma[step].double() ** 2))
        terms.append(scale * (both[1] - both[0]))
    return torch.stack(terms)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_a_step_is_the_stock_schedulers(eta: float) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="leading", steps_offset=0,
    )  # fmt: skip
    scheduler.set_timesteps(10)  # 900, 800, ..., 0
    x, predicted, noise = torch.randn(3, 5, *SHAPE, generator=torch.Generator().manual_seed(0))
    chain = chain_of(ALPHAS[:901], 9, eta)  # 900, 800, ..., 100 -> 0
    assert chain.timesteps.tolist() == list(range(900, 0, -100))
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        stock = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(chain.mean(step, x, predicted) + chain.sigma[step] * noise, stock)


def test_the_real_trajectory_has_the_forward_marginals() -> None:
    """x_i ~ N(sqrt(a) x, 1 - a) for every i."""
    chain = chain_of(ALPHAS, 6)
    image = torch.full((20_000, 1, 1, 1), 1.5)
    noise = torch.randn(7, 20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    path = real_trajectory(chain, image, noise)
    signals = [*chain.signal_before.tolist(), float(chain.signal_after[-1])]
    for latents, signal in zip(path, signals, strict=True):
        assert float(latents.mean()) == pytest.approx(1.5 * math.sqrt(signal), abs=0.03)
        assert float(latents.var()) == pytest.approx(1 - signal, rel=0.05)


def test_drift_by_hand() -> None:
    # One value, one step: mu = sqrt(after/before) x + (sqrt(1-after-s^2) - sqrt(after (1-before) / before)) noise
    chain = Chain(torch.tensor([5]), torch.tensor([0.25]), torch.tensor([0.64]), torch.tensor([0.3]))
    one = torch.ones(1, 1, 1, 1)
    # mu(1, e) = 1.6 + (sqrt(0.27) - 0.8 sqrt(3)) e = 1.6 - 0.866025 e, since 0.519615 - 1.385641
    # player e = 0.5: 1.1669873; reference e = 1: 0.7339746; after = 1
    # ((1 - 1.1669873)^2 - (1 - 0.7339746)^2) / (2 * 0.09) = (0.0278848 - 0.0707695) / 0.18
    found = transition_drift(chain, 0, one, one, 0.5 * one, one)
    assert float(found) == pytest.approx(-0.2382486, abs=1e-5)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("steps", "seed", "scale"), [(1, 4, 6e-5), (4, 2, 0.05)])
def test_two_passes_equal_plain_autograd(link: str, steps: int, seed: int, scale: float) -> None:
    chain, (winner, noise) = chain_of(ALPHAS, steps), draws(steps, batch=4, seed=seed)
    reference = Net(1)
    player = near(reference)
    advantage = plain(player, reference, winner, noise, chain, scale).sum(0)
    assert float(advantage.detach().abs().max()) < 3, "where the links' slopes differ"
    assert {*advantage.detach().sign().tolist()} == {-1.0, 1.0}
    expected = LINKS[link](advantage).mean()
    gradients = torch.autograd.grad(expected, list(player.parameters()))

    objective = exact_spin(player, reference, winner, noise, chain, scale, link, backward)
    assert float(objective.loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, gradient in zip(player.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_player_equal_to_its_opponent_is_at_ln_2_and_learns() -> None:
    chain, (winner, noise) = chain_of(ALPHAS, 4), draws(4, batch=3)
    player = Net(0)
    objective = exact_spin(player, Net(0), winner, noise, chain, 0.05, "logistic", backward)
    assert float(objective.loss) == pytest.approx(math.log(2), abs=1e-6)
    assert float(player.two.weight.grad.norm()) > 0


def test_the_approximate_loss_bounds_the_exact_one() -> None:
    """Section 3.4, by Jensen: link(sum_i z_i) <= mean_i link(N z_i), on the same trajectories."""
    steps, signs = 8, set[float]()
    chain = chain_of(ALPHAS, steps)
    for seed in range(5):
        winner, noise = draws(steps, batch=4, seed=seed)
        reference = Net(seed + 50)
        terms = plain(near(reference, seed), reference, winner, noise, chain, 0.01).detach()
        assert 0.5 < float((steps * terms).abs().max()) < 5, "where the links are curved"
        signs |= {*terms.sign().flatten().tolist()}
        for name, link in LINKS.items():
            exact, bound = float(link(terms.sum(0)).mean()), float(link(steps * terms).mean())
            if name == "correlation":
                assert exact == pytest.approx(bound), "a straight line"
            elif name == "hinge":
                assert exact <= bound + 1e-9, "straight below 1"
            else:
                assert exact < bound - 1e-3
    assert signs == {-1.0, 1.0}


def live_activations(steps: int, run: Callable[[Net, torch.Tensor, torch.Tensor, Chain], object]) -> int:
    """Return the largest number of bytes that autograd held for its backward pass at any time."""
    held, most = 0, 0
    player, chain, (winner, noise) = Net(0), chain_of(ALPHAS, steps), draws(steps, batch=2)

    class Kept:
        def __init__(self, value: torch.Tensor):
            self.value = value

    def pack(value: torch.Tensor) -> Kept:
        nonlocal held, most
        size, kept = value.numel() * value.element_size(), Kept(value)
        held += size
        most = max(most, held)

        def free() -> None:
            nonlocal held
            held -= size

        weakref.finalize(kept, free)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value):
        run(player, winner, noise, chain)
        gc.collect()
    return most


def test_memory_for_gradients_is_flat_in_the_number_of_steps() -> None:
    def two_pass(player: Net, winner: torch.Tensor, noise: torch.Tensor, chain: Chain) -> None:
        exact_spin(player, Net(1), winner, noise, chain, 0.05, "logistic", backward)

    def autograd(player: Net, winner: torch.Tensor, noise: torch.Tensor, chain: Chain) -> None:
        LINKS["logistic"](plain(player, Net(1), winner, noise, chain, 0.05).sum(0)).mean().backward()

    assert live_activations(50, two_pass) <= 1.05 * live_activations(5, two_pass)
    assert live_activations(50, autograd) > 8 * live_activations(5, autograd)


@pytest.mark.parametrize(("steps", "eta"), [(0, 1.0), (1000, 1.0), (5, 0.0), (5, 1.5)])
def test_chains_that_have_no_density(steps: int, eta: float) -> None:
    with pytest.raises(ValueError, match=r"^expected .+, got "):
        chain_of(ALPHAS, steps, eta)
