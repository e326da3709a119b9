"""Reading detectron2's files: pickled dictionaries of numpy arrays."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...tensor_files import ForeignObjects

__all__ = ["read_numpy_pickle"]

# All that a dictionary of arrays needs; ``encode`` makes the bytes of protocols before 3.
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # numpy 1's name of it
        if (module, name) not in _ADMITTED:
            raise ForeignObjects([f"{module}.{name}"])
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            module = module.replace("numpy._core.", "numpy.core.")
        return super().find_class(module, name)


def read_numpy_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle of nested dictionaries, whose arrays become tensors. Nothing in the file is executed.

    Raises:
        ForeignObjects: if the file holds anything but arrays, numbers, texts and containers of them.
        ValueError: if it is damaged. Both say the reason alone, for a sentence that names the file.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except ForeignObjects:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(str(error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    return _with_tensors(content)


def _with_tensors(content: dict[Any, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _with_tensors(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(np.array(value))  # a copy: the arrays of some pickles are read-only
        converted[key] = value
    return converted
