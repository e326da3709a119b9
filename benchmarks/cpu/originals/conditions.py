"""Conditions under which two codes can be compared to the last digits: double precision, and the same noise."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Noise", "in_doubles"]


class _Doubles(TorchFunctionMode):
    """What is asked for in single precision is made in double precision, and what is asked for on a GPU on the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.cuda:
            return args[0]
        if function is Tensor.float:
            function = Tensor.double
        return function(*map(_exchanged, args), **{key: _exchanged(value) for key, value in (kwargs or {}).items()})


def _exchanged(argument: Any) -> Any:
    if argument is torch.float32:
        return torch.float64
    return "cpu" if isinstance(argument, str) and argument == "cuda" else argument


@contextmanager
def in_doubles() -> Iterator[None]:
    """Inside, all computation is in float64, on the CPU.

    Both codes ask for float32 in places, such as embeddings of positions, whatever the model's type is, and the
    originals for a GPU. Their warnings about functions of torch that have other names today are left out.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), _Doubles():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


class Noise:
    """One draw for every object in every denoising group, which both codes get, in whatever order they ask.

    Args:
        sizes: objects of each image.
        copies: of each object, at most.
        num_classes: of the labels that are drawn.
        generator: that draws.
    """

    def __init__(self, sizes: Sequence[int], copies: int, num_classes: int, generator: torch.Generator):
        shape = (copies, len(sizes), max(sizes))
        self.sizes, self.num_classes = sizes, num_classes
        self.tables = {
            "chance": torch.rand(shape, generator=generator),
            "class": torch.randint(num_classes, shape, generator=generator),
            "sign": torch.randint(2, (*shape, 4), generator=generator).double(),
            "share": torch.rand((*shape, 4), generator=generator),
        }

    def packed(self) -> TorchFunctionMode:
        """For this package: of an image, copies after copies, with room for as many objects as the fullest has."""
        return _Packed(self)

    def concatenated(self) -> TorchFunctionMode:
        """For the originals: copies after copies of all objects of all images."""
        return _Concatenated(self)


class _Draws(TorchFunctionMode, ABC):
    """Answers ``torch.rand``, ``rand_like`` and ``randint_like`` from tables.

    Raises:
        ValueError: if integers are asked for in another range than the table has.
    """

    dimensions: int  # of labels; boxes have one more

    def __init__(self, noise: Noise):
        super().__init__()
        self.noise = noise

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in (torch.rand, torch.rand_like, torch.randint_like):
            return function(*args, **(kwargs or {}))
        like = args[0]
        boxes = len(like if function is torch.rand else like.shape) > self.dimensions
        if function is torch.randint_like:
            asked, drawn = _range(*args, **(kwargs or {})), (0, 2 if boxes else self.noise.num_classes)
            if asked != drawn:
                what = "signs of boxes" if boxes else "labels"
                raise ValueError(
                    f"{what} are drawn from {asked[0]} to below {asked[1]}, not from 0 to below {drawn[1]}"
                )
            return self.boxes("sign", like) if boxes else self.classes(like)
        return self.boxes("share", like) if boxes else self.chances(like)

    @abstractmethod
    def boxes(self, table: str, like: Tensor) -> Tensor:
        """Numbers for boxes."""

    @abstractmethod
    def chances(self, like: Any) -> Tensor:
        """Numbers in [0, 1) for labels."""

    @abstractmethod
    def classes(self, like: Tensor) -> Tensor:
        """Classes for labels."""


def _range(_like: Tensor, *bounds: int, low: int = 0, high: int | None = None, **_: Any) -> tuple[int, int]:
    """The least integer and the first beyond, from the arguments of ``torch.randint_like(like, [low,] high)``."""
    *least, beyond = bounds if high is None else (*bounds, high)
    return (least[0] if least else low), beyond


class _Packed(_Draws):
    dimensions = 2  # [B, D]

    def boxes(self, table: str, like: Tensor) -> Tensor:
        return self._rows(table, like.shape[1])

    def chances(self, like: Any) -> Tensor:
        return self._rows("chance", like[1])

    def classes(self, like: Tensor) -> Tensor:
        return self._rows("class", like.shape[1])

    def _rows(self, name: str, length: int) -> Tensor:
        return self.noise.tables[name].transpose(0, 1).flatten(1, 2)[:, :length]


class _Concatenated(_Draws):
    dimensions = 1  # [D of all images]

    def boxes(self, table: str, like: Tensor) -> Tensor:
        return self._rows(table)[: len(like)]

    def chances(self, like: Any) -> Tensor:
        return self._rows("chance")[: len(like)]

    def classes(self, like: Tensor) -> Tensor:
        return self._rows("class")[like]  # which are asked for by number: those of the labels to replace

    def _rows(self, name: str) -> Tensor:
        table = self.noise.tables[name]
        return torch.cat([table[:, image, :size] for image, size in enumerate(self.noise.sizes)], dim=1).flatten(0, 1)
