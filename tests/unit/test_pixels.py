"""Preprocessing against the numbers of the authors' own code, which calls torchvision (``tests/golden``)."""

import numpy as np
import pytest
import torch
from PIL import Image

from spin.scorers.pixels import MEAN, STD, centre_square, centre_squares, whole_in_square, wholes_in_squares
from tests import reference
from tests.reference import GOLDEN

PICTURES = [reference.picture(*size, number) for number, size in enumerate(reference.PICTURES)]


def test_centre_square_is_torchvisions_to_the_bit() -> None:
    found = centre_squares(PICTURES, reference.BLIP["side"])
    assert found[:, :, 9, 7:12].tolist() == torch.tensor(GOLDEN["centre_square"]["rows"]).tolist()
    torch.testing.assert_close(
        found.sum((1, 2, 3)), torch.tensor(GOLDEN["centre_square"]["sums"]), rtol=1e-6, atol=1e-3
    )


def test_whole_in_square_is_that_of_the_authors() -> None:
    found = wholes_in_squares(PICTURES, reference.OPEN_CLIP["vision"]["image_size"])
    # The resize runs in float32, whose last digit depends on the processor.
    torch.testing.assert_close(found[:, :, 9, 7:12], torch.tensor(GOLDEN["whole_in_square"]["rows"]), rtol=0, atol=2e-6)
    torch.testing.assert_close(
        found.sum((1, 2, 3)), torch.tensor(GOLDEN["whole_in_square"]["sums"]), rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize("size", [(224, 224), (300, 224), (224, 301), (640, 427), (225, 1000)])
def test_centre_square_by_hand(size: tuple[int, int]) -> None:
    picture = reference.picture(*size)
    short = min(size)
    resized = picture.resize(tuple(int(224 * side / short) for side in size), Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2.0) for side in resized.size)
    pixels = torch.from_numpy(np.array(resized)[top : top + 224, left : left + 224]).permute(2, 0, 1)
    wanted = (pixels.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(centre_square(picture, 224), wanted)


def test_what_is_added_to_an_oblong_is_black() -> None:
    wide = whole_in_square(Image.new("RGB", (448, 224), "white"), 224)
    black, white = ([(value - mean) / std for mean, std in zip(MEAN, STD, strict=True)] for value in (0, 1))
    assert wide.shape == (3, 224, 224)
    for rows, colour in ((slice(0, 56), black), (slice(56, 168), white), (slice(168, 224), black)):
        for channel in range(3):
            torch.testing.assert_close(
                wide[channel, rows], torch.full((rows.stop - rows.start, 224), colour[channel]), rtol=0, atol=1e-5
            )


def test_a_fitting_side_is_not_resized() -> None:
    tall = whole_in_square(reference.picture(100, 224), 224)
    square = centre_square(reference.picture(224, 224), 224)
    assert torch.equal(tall[:, :, 62:162], square[:, :, :100])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_kinds_of_images_become_rgb(mode: str) -> None:
    picture = reference.picture(224, 224).convert(mode)
    assert torch.equal(centre_square(picture, 224), centre_square(picture.convert("RGB"), 224))
    assert torch.equal(whole_in_square(picture, 224), whole_in_square(picture.convert("RGB"), 224))
