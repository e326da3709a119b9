"""Going on where an image cannot be read."""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .annotations import DataError

__all__ = ["SkipUnreadable"]

logger = logging.getLogger(__name__)


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]: ...


class SkipUnreadable(Dataset[tuple[Tensor, dict[str, Any]]]):
    """A data set in which the next readable sample stands in for one that raises :class:`DataError`.

    So batches keep their size, and what a batch holds still depends on seed, epoch and index alone. Every unreadable
    sample is reported once and counted once, over all workers of the process.

    Args:
        dataset: asked for ``dataset[epoch, index]``.
        limit: largest number of unreadable samples to go on with; 0 for none. It includes those that other processes
            found, as far as this one was told.
    """

    def __init__(self, dataset: _Samples, limit: int):
        self.dataset = dataset
        self.limit = limit
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # one for all workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        """The sample, or the next readable one.

        Raises:
            DataError: if more samples than ``limit`` were unreadable.
        """
        epoch, index = key
        while True:
            try:
                return self.dataset[epoch, index]
            except DataError as error:
                self._note(index, error)
            index = (index + 1) % len(self)

    @property
    def unreadable(self) -> list[int]:
        """Indices of the samples found unreadable so far, in any worker of this process."""
        return self._unreadable.nonzero().flatten().tolist()

    def remember(self, indices: list[int]) -> None:
        """Count samples that another process, or the run before this one was resumed, found unreadable."""
        self._unreadable[indices] = True

    def _note(self, index: int, error: DataError) -> None:
        known = bool(self._unreadable[index])
        self._unreadable[index] = True
        count = len(self.unreadable)
        if count > min(self.limit, len(self) - 1):
            if self.limit == 0:
                raise error
            raise DataError(
                f"{count} of {len(self)} images cannot be read, and {self.limit} are allowed; the last: {error}"
            )
        if not known:
            logger.warning("left out the %d. of at most %d unreadable images: %s", count, self.limit, error)
