"""Images as units."""

import numpy as np
import pytest

from glomo.data import Pixels, vocabulary_from_dict
from glomo.errors import UserError


def test_levels_by_hand():
    grey = np.array([[[0, 63], [64, 255]]], np.uint8)
    assert Pixels(4, 1, 255).sequences(grey).tolist() == [[2, 2, 3, 5]]
    assert Pixels(17, 1, 16).sequences(np.array([[[0, 16]]])).tolist() == [[2, 18]]
    colours = np.zeros((1, 1, 2, 3), np.uint8)
    colours[0, 0, 1] = (255, 0, 128)  # levels 1, 0, 1 of two: 1 + 4
    pixels = Pixels(2, 3, 255)
    assert pixels.sequences(colours).tolist() == [[2, 7]]
    assert len(pixels) == len(pixels.units()) == 10
    assert pixels.decode([2, 7]) == "0/0/0 1/0/1"


def test_smaller_images_are_means_of_squares():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert Pixels(16, 1, 255, 2).shrink(image)[0, ..., 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    with pytest.raises(UserError, match="cannot be made 3 x 3"):
        Pixels(16, 1, 255, 3).sequences(image)
    with pytest.raises(UserError, match=r"1 channel\(s\), but 3"):
        Pixels(2, 3, 255).sequences(image)


def test_saved_and_restored():
    pixels = Pixels(4, 3, 255, 8)
    again = vocabulary_from_dict(pixels.to_dict())
    assert again.to_dict() == pixels.to_dict()
    assert again.fingerprint == pixels.fingerprint != Pixels(4, 3, 255).fingerprint
    with pytest.raises(UserError, match="whole numbers are needed"):
        vocabulary_from_dict({**pixels.to_dict(), "levels": "4"})


@pytest.mark.parametrize(
    ("sizes", "sentence"), [((0, 1, 255), "levels 0"), ((300, 1, 255), "only the values 0 to 255")]
)
def test_sizes_that_cannot_be(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        Pixels(*sizes)
