"""Reading files of tensors without running anything that they contain, and what is said of files that hold more."""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

__all__ = ["ForeignObjects", "read_tensors"]

_REFUSED = re.compile(r"\bGLOBAL ([\w.]+)")  # what torch says of a class or function that it does not load
_OF_NO_USE = re.compile(r"Weights only load failed|This is an internal miniz error")  # starts of advice, and of a cause


class ForeignObjects(ValueError):
    """A pickle that holds more than tensors, numbers, texts and containers of them.

    Attributes:
        names: of the classes and functions that it would need; never empty.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        others = len(self.names) - 1
        besides = f" and {others} more kind{'s' * (others > 1)}" if others else ""
        super().__init__(
            f"it holds objects ({self.names[0]}{besides}), which are not admitted beside tensors, as they may run "
            "code: where you trust the file, load it with the code that wrote it and save the state_dict() alone"
        )


def read_tensors(path: Path, admitted: Sequence[type] = ()) -> Any:
    """What a ``.safetensors`` file, or any other that ``torch.save`` wrote, holds, on the CPU.

    Args:
        path: of the file; its suffix says which of the two it is.
        admitted: classes whose objects a pickle may hold beside tensors, numbers, texts and containers of them.

    Returns:
        Tensors by name, or whatever was given to ``torch.save``.

    Raises:
        ForeignObjects: if it holds other objects.
        ValueError: if it cannot be opened, is damaged or is of another kind. What is said, here and of objects, is the
            reason alone, for a sentence that names the file.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, RuntimeError) as error:  # the last: memory cannot be mapped
            raise ValueError(str(error)) from None
    # torch warns of what is refused here anyway
    with warnings.catch_warnings(), torch.serialization.safe_globals(list(admitted)):
        warnings.simplefilter("ignore")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
        except Exception as error:  # torch.load raises whatever the unpickler does
            if names := _foreign_names(path, str(error)):
                raise ForeignObjects(names) from None
            raise ValueError(_reason(str(error))) from None
    # Other packages let torch load their classes everywhere: Ultralytics does once it has read a checkpoint.
    if modules := [each for each in _entries(content) if isinstance(each, nn.Module)]:
        raise ForeignObjects([f"{type(each).__module__}.{type(each).__qualname__}" for each in modules])
    return content


def _entries(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else [content]


def _foreign_names(path: Path, message: str) -> list[str]:
    """Names of what a pickle needs and torch refuses, beginning with what torch met first; empty if it met none."""
    met = _REFUSED.findall(message)[:1]
    if not met:
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of before torch 1.6, or with parts that are not told apart without reading them
        names = []
    return met + sorted(set(names).difference(met, (f"builtins.{name}" for name in met)))


def _reason(message: str) -> str:
    if "TorchScript" in message:
        return "it is a TorchScript program: save the state_dict() of its model instead"
    text = _OF_NO_USE.split(message, maxsplit=1)[0].splitlines()
    cause = text[0].strip().removesuffix(".") if text else ""
    return "it is damaged or incomplete, or torch.save has not written it" + (f" ({cause})" if cause else "")
