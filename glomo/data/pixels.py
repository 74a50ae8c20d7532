"""Images as sequences of units: a pixel's grey value or colour, cut into few levels, row after row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from glomo.data.vocabulary import PAD, UNK, vocabulary_fingerprint
from glomo.errors import UserError

_NO_TEXT = "the units of this graph are pixels of images; it cannot read text"


class Pixels:
    """The units of images: id 0 is padding and 1 unknown, as in a vocabulary of words; behind them the levels.

    A pixel of `channels` values v_c from 0 to `most` has the level l_c = floor(v_c levels / (most + 1)) in each, and is
    the unit 2 + sum_c l_c levels^c.

    Args:
        levels: of one channel.
        channels: 1 (grey) or 3 (colours).
        most: the greatest value of a channel.
        side: images are made this high and wide by taking means over equal squares; 0 leaves them as they are.
    """

    pad_id = 0
    unk_id = 1

    def __init__(self, levels: int, channels: int, most: int, side: int = 0) -> None:
        for name, value in (("levels", levels), ("channels", channels), ("most", most)):
            if value < 1:
                raise UserError(f"pixels of {name} {value} were asked for; at least 1 is needed")
        if levels > most + 1:
            raise UserError(f"{levels} levels were asked for, but a channel has only the values 0 to {most}")
        self.levels, self.channels, self.most, self.side = levels, channels, most, side
        self.fingerprint: str = vocabulary_fingerprint(self.to_dict())

    def __len__(self) -> int:
        return 2 + self.levels**self.channels

    def shrink(self, images: np.ndarray) -> np.ndarray:
        """`(n, height, width[, channels])` to the mean values `(n, side, side, channels)` float32.

        Raises UserError for images that the side does not divide, or of other channels.
        """
        images = images[..., None] if images.ndim == 3 else images
        count, height, width, channels = images.shape
        if channels != self.channels:
            raise UserError(f"the images have {channels} channel(s), but {self.channels} are needed")
        images = images.astype(np.float32)
        if not self.side:
            return images
        if height % self.side or width % self.side:
            raise UserError(f"images of {height} x {width} cannot be made {self.side} x {self.side} by equal squares")
        blocks = images.reshape(count, self.side, height // self.side, self.side, width // self.side, channels)
        return blocks.mean((2, 4))

    def encode(self, text: str) -> list[int]:
        """Raises UserError."""
        raise UserError(_NO_TEXT)

    def tokens(self, text: str) -> list[str]:
        """Raises UserError."""
        raise UserError(_NO_TEXT)

    def sequences(self, images: np.ndarray) -> np.ndarray:
        """`(n, height, width[, channels])` to units `(n, pixels)` int64, row after row."""
        shrunk = self.shrink(images)
        level = np.minimum((shrunk * self.levels / (self.most + 1)).astype(np.int64), self.levels - 1)
        units = 2 + (level * self.levels ** np.arange(self.channels)).sum(-1)
        return units.reshape(len(units), -1)

    def decode(self, ids: Iterable[int]) -> str:
        """The levels of the units, channels with a slash between."""
        return " ".join(self.units()[i] for i in ids)

    def units(self) -> list[str]:
        """The levels by id."""
        codes = range(self.levels**self.channels)
        shown = ("/".join(str(code // self.levels**c % self.levels) for c in range(self.channels)) for code in codes)
        return [PAD, UNK, *shown]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON-able values; :meth:`from_dict` restores it."""
        sizes = {"levels": self.levels, "channels": self.channels, "most": self.most, "side": self.side}
        return {"kind": "pixels", **sizes}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Pixels:
        """Restore it from :meth:`to_dict`. Raises UserError for a damaged one."""
        sizes = [saved.get(name) for name in ("levels", "channels", "most", "side")]
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            raise UserError(f"saved pixels have the sizes {sizes}; whole numbers are needed")
        return cls(*sizes)  # type: ignore[arg-type]
