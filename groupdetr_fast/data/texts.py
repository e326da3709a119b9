"""Texts of a data set in two arrays."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["Texts"]


@dataclass(frozen=True)
class Texts:
    """A list of texts, held in few objects: each process that loads images copies every Python object it looks at.

    Attributes:
        characters: of all texts, one after another, in UTF-8, uint8.
        offsets: text ``i`` is ``characters[offsets[i]:offsets[i + 1]]``.
    """

    characters: np.ndarray
    offsets: np.ndarray

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "Texts":
        encoded = [text.encode() for text in texts]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([0, *map(len, encoded)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = self.offsets[index : index + 2]
        return self.characters[start:stop].tobytes().decode()
