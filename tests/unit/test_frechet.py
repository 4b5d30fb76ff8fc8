"""The Fréchet distance equals its textbook form and known limits."""

import numpy as np
import pytest

from spin.scorers.frechet import frechet_distance


def features(n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.randn(n, d) @ random.randn(d, d) + random.randn(d)


def test_equals_the_textbook_form() -> None:
    """Against trace(C_a + C_b - 2 sqrt(sqrt(C_a) C_b sqrt(C_a))) with roots by eigendecomposition."""
    a, b = features(200, 6, 0), features(150, 6, 1)
    c_a, c_b = np.cov(a.T), np.cov(b.T)

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    middle = root(root(c_a) @ c_b @ root(c_a))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b - 2 * middle)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself_even_with_fewer_images_than_features() -> None:
    few = features(5, 40, 2)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_a_shift_costs_its_square() -> None:
    a = features(50, 4, 3)
    assert frechet_distance(a, a + np.array([3.0, 0, 4.0, 0])) == pytest.approx(25)


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2 images"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
