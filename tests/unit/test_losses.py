"""The objectives against numbers worked out by hand, and the properties that make them a game."""

import math

import pytest
import torch

from spin.losses import LINKS, Objective, sft_loss, spin_loss

LN2 = 0.6931471805599453


def loss_of(margin: float, beta: float) -> float:
    """Return the loss of one pair with this margin, all of it from the loser."""
    one = torch.ones(1)
    return float(spin_loss(one, one + margin, one, one, beta).loss)


@pytest.fixture
def two_pairs() -> Objective:
    # pair           1      2
    # winner       0.5    0.9   reference 0.6  0.6   winner_drift -0.1   0.3
    # loser        0.8    0.4   reference 0.7  0.5   loser_drift   0.1  -0.1
    # margin = loser_drift - winner_drift                          0.2  -0.4
    return spin_loss(
        torch.tensor([0.5, 0.9]), torch.tensor([0.8, 0.4]), torch.tensor([0.6, 0.6]), torch.tensor([0.7, 0.5]), beta=10
    )


def test_two_pairs_by_hand(two_pairs: Objective) -> None:
    # beta/2 * margin = 5 * 0.2, 5 * -0.4 = 1, -2
    # mean(log(1 + exp(-1)), log(1 + exp(2))) = (0.3132616875 + 2.1269280110) / 2
    assert float(two_pairs.loss) == pytest.approx(1.2200948493, abs=1e-6)


def test_measures_by_name_and_value(two_pairs: Objective) -> None:
    assert {name: float(value) for name, value in two_pairs.measures.items()} == pytest.approx(
        {
            "loss": 1.2200948493,
            "implicit_accuracy": 0.5,  # 0.2 > 0, -0.4 < 0
            "margin": -0.1,  # (0.2 - 0.4) / 2
            "winner_drift": 0.1,  # (-0.1 + 0.3) / 2
            "loser_drift": 0.0,  # (0.1 - 0.1) / 2
            "error_winner": 0.7,  # (0.5 + 0.9) / 2
            "reference_error_winner": 0.6,
        },
        abs=1e-6,
    )


def test_a_tie_is_no_win() -> None:
    one = torch.ones(3)
    assert float(spin_loss(one, one, one, one, beta=1).measures["implicit_accuracy"]) == 0.0


def test_player_equal_to_reference_gives_ln_2_and_a_quarter_beta_of_the_gradient() -> None:
    beta = 2000.0
    weights = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    winner_input, loser_input = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]] * 2)
    winner, loser = (winner_input @ weights - 1).pow(2), (loser_input @ weights + 2).pow(2)
    objective = spin_loss(winner, loser, winner.detach(), loser.detach(), beta)
    assert objective.loss.item() == pytest.approx(LN2, abs=1e-7)

    (gradient,) = torch.autograd.grad(objective.loss, weights, retain_graph=True)
    (winner_gradient,) = torch.autograd.grad(winner.mean(), weights, retain_graph=True)
    (loser_gradient,) = torch.autograd.grad(loser.mean(), weights)
    # d/dm log(1 + exp(-beta/2 m)) at m = 0 is -beta/4, and m = ... - winner + loser
    torch.testing.assert_close(gradient, beta / 4 * (winner_gradient - loser_gradient))
    assert gradient.norm() > 1


def test_measures_carry_no_gradient() -> None:
    winner = torch.tensor([0.4], requires_grad=True)
    objective = spin_loss(winner, torch.tensor([0.5]), torch.tensor([0.4]), torch.tensor([0.5]), beta=1)
    assert objective.loss.requires_grad
    assert not any(value.requires_grad for value in objective.measures.values())


@pytest.mark.parametrize("margin", [-3.0, 0.25, 40.0])
def test_beta_to_0_forgets_the_margin(margin: float) -> None:
    # log(1 + exp(-x)) = ln 2 - x/2 + O(x^2), x = beta/2 * margin = at most 2e-7
    assert loss_of(margin, 1e-8) == pytest.approx(LN2, abs=2e-7)


def test_swapping_winner_and_loser_flips_the_margin() -> None:
    winner, loser = torch.tensor([0.5, 0.9]), torch.tensor([0.8, 0.4])
    reference_winner, reference_loser = torch.tensor([0.6, 0.6]), torch.tensor([0.7, 0.5])
    ours = spin_loss(winner, loser, reference_winner, reference_loser, beta=10)
    theirs = spin_loss(loser, winner, reference_loser, reference_winner, beta=10)
    assert float(ours.measures["margin"]) == pytest.approx(-0.1, abs=1e-6)
    assert float(theirs.measures["margin"]) == pytest.approx(0.1, abs=1e-6)
    # -logsigmoid(x) + logsigmoid(-x) = -x, so the losses differ by the mean of beta/2 * margin = 5 * -0.1
    assert float(theirs.loss - ours.loss) == pytest.approx(-0.5, abs=1e-6)


def test_loss_falls_as_the_margin_grows() -> None:
    losses = [loss_of(margin, 10) for margin in (-1.0, -0.1, 0.0, 0.1, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


def test_better_on_winners_and_worse_on_losers_both_lower_the_loss() -> None:
    winner, loser = torch.tensor([0.6], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    loss = spin_loss(winner, loser, torch.tensor([0.6]), torch.tensor([0.7]), beta=8).loss
    loss.backward()
    # beta/4 = 2
    assert (float(winner.grad), float(loser.grad)) == pytest.approx((2.0, -2.0))


def test_a_hopeless_pair_keeps_finite_loss_and_gradient() -> None:
    winner = torch.tensor([5.0], requires_grad=True)
    loss = spin_loss(winner, torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0]), beta=5000).loss
    loss.backward()
    # margin -4: log(1 + exp(10000)) = 10000, slope beta/2; the naive log(1 + exp(x)) overflows
    assert (loss.item(), winner.grad.item()) == pytest.approx((10000.0, 2500.0))


def test_beta_carries_a_factor_of_one_half() -> None:
    # margin 0.001, beta 2000: log(1 + exp(-1)); without the half it would be log(1 + exp(-2)) = 0.1269
    assert loss_of(0.001, 2000) == pytest.approx(math.log1p(math.exp(-1)), abs=1e-4)


def test_sft_is_the_mean_error_of_the_winners() -> None:
    errors = torch.tensor([0.25, 1.0, 0.25], requires_grad=True)
    objective = sft_loss(errors)
    objective.loss.backward()
    assert objective.loss.item() == 0.5
    assert errors.grad.tolist() == pytest.approx([1 / 3] * 3)
    assert {name: float(value) for name, value in objective.measures.items()} == {"loss": 0.5, "error_winner": 0.5}
    assert not any(value.requires_grad for value in objective.measures.values())


@pytest.mark.parametrize(
    ("link", "values"),
    [
        # at u = -2, 0, 1, 3
        ("logistic", [2.1269280, 0.6931472, 0.3132617, 0.0485874]),  # log(1 + e^-u)
        ("hinge", [3.0, 1.0, 0.0, 0.0]),  # max(0, 1 - u)
        ("correlation", [2.0, 0.0, -1.0, -3.0]),  # -u
        ("exponential", [7.3890561, 1.0, 0.3678794, 0.0497871]),  # e^-u
    ],
)
def test_links_by_hand(link: str, values: list[float]) -> None:
    assert LINKS[link](torch.tensor([-2.0, 0.0, 1.0, 3.0])).tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("link", LINKS)
def test_links_are_decreasing_and_convex(link: str) -> None:
    """Assumption 4.1; the slope at 0 is below 0, so a player equal to its opponent always learns."""
    u = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(LINKS[link](u).sum(), u)
    assert bool((slope <= 0).all())
    assert bool((slope.diff() >= -1e-9 * slope.abs()[1:].clamp(min=1)).all())
    assert float(slope[1000]) < 0


def test_exponential_stays_finite_and_goes_on_pulling() -> None:
    u = torch.tensor([-10.0, -11.0, -1e6], requires_grad=True)
    value = LINKS["exponential"](u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value[:2].tolist() == pytest.approx([math.exp(10), 2 * math.exp(10)])
    assert bool(torch.isfinite(value).all())
    assert float(slope[1]) == float(slope[2]) == pytest.approx(-math.exp(10))


def test_a_scaled_loser_pulls_less_and_weighs_the_same() -> None:
    loser = torch.tensor([0.5], requires_grad=True)
    one = torch.tensor([0.4])
    whole, scaled = (spin_loss(one, loser, one, one, 10, loser_gradient_scale=scale) for scale in (1.0, 0.6))
    assert scaled.loss.item() == whole.loss.item()
    (pull,) = torch.autograd.grad(whole.loss, loser)
    (less,) = torch.autograd.grad(scaled.loss, loser)
    assert float(less) == pytest.approx(0.6 * float(pull))
    assert float(pull) < 0


def test_hinge_ignores_pairs_past_its_margin() -> None:
    winner = torch.tensor([0.4, 0.4], requires_grad=True)
    # advantage = beta/2 * margin = 1 * 0.5 and 1 * 2
    objective = spin_loss(winner, torch.tensor([0.9, 2.4]), winner.detach(), torch.tensor([0.4, 0.4]), 2, "hinge")
    (gradient,) = torch.autograd.grad(objective.loss, winner)
    assert gradient.tolist() == pytest.approx([0.5, 0.0])
