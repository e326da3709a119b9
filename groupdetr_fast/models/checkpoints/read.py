"""Reading checkpoint files without running anything that they contain."""

import argparse
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...tensor_files import ForeignObjects, read_tensors
from .header import CheckpointHeader
from .numpy_pickle import read_numpy_pickle
from .transformers_config import header_of_config

__all__ = ["CheckpointFile", "find_weights", "read_checkpoint", "read_header"]

_MOST_ROWS = 10**6
HEADER_KEY = "groupdetr_fast"  # in the metadata of safetensors; ``training.checkpoint`` writes it


@dataclass(frozen=True)
class CheckpointFile:
    """Tensors as the file names them, and the sizes of its queries where the file tells them.

    Attributes:
        state: tensors by key.
        num_queries: queries of one group, or None if the file does not say.
        num_groups: groups, or None if the file does not say.
    """

    state: dict[str, Tensor]
    num_queries: int | None = None
    num_groups: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_queries", "num_groups"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= _MOST_ROWS):
                raise ValueError(f"the checkpoint says {name} = {reprlib.repr(value)}, which is no number of queries")


def find_weights(path: str | Path) -> Path:
    """The file or folder of weights that is meant: for the folder of a run its best checkpoint, or else the newest.

    Other paths are returned as they are.

    Raises:
        FileNotFoundError: if there is nothing at the path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: there is nothing at {path}")
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if any(path.glob("*.safetensors")) or not folder.is_dir():
        return path
    saved = sorted(weights.parent for weights in folder.glob("epoch_*/*.safetensors"))
    best = folder / "best"
    return best if any(best.glob("*.safetensors")) else (saved or [path])[-1]


def read_checkpoint(source: str | Path | Mapping[str, Tensor]) -> CheckpointFile:
    """Read a ``.safetensors`` file, a pickle of tensors, a folder that holds one, or take a state dict as it is.

    Pickles are read with ``weights_only=True``; of other types only the ``argparse.Namespace`` of the original
    repositories is admitted. The ``.pkl`` files of detectron2 may hold numpy arrays and nothing else.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is damaged, holds something else, or holds objects that are not admitted.
    """
    if isinstance(source, Mapping):
        return _from_object(dict(source), "the state dict")
    path = find_weights(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _from_object(_read_pickle(path), str(path))


def read_header(path: str | Path) -> CheckpointHeader:
    """What this package's training wrote into the header of a weights file.

    Args:
        path: the file, or a folder that holds one, or the folder of a run.

    Returns:
        The header; of transformers what its ``config.json`` beside the weights says; for files of other code, one that
        says nothing.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is damaged, or its header has a value that no header of this package has.
    """
    path = find_weights(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    settings = (path if path.is_dir() else path.parent) / "config.json"
    of_transformers = path.is_dir() or path.suffix == ".safetensors" or path.name.startswith("pytorch_model")
    foreign = _header_beside(settings) if of_transformers and settings.is_file() else CheckpointHeader()
    if not files or files[0].suffix != ".safetensors" or not files[0].is_file():
        return foreign
    try:
        with safe_open(files[0], framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
        if text is None:
            return foreign
        content = json.loads(text)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {files[0]} cannot be read as safetensors: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {files[0]} has a header that is no json: {error}") from None
    try:
        return CheckpointHeader.from_json(content)
    except ValueError as error:
        raise ValueError(f"checkpoint {files[0]}: {error}") from None


def _read_folder(folder: Path) -> CheckpointFile:
    """A checkpoint of this package or a model directory of transformers, also one split into shards."""
    shards = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise ValueError(f"checkpoint {folder} has neither *.safetensors nor pytorch_model*.bin")
    parts = [read_checkpoint(shard) for shard in shards]
    state = {key: tensor for part in parts for key, tensor in part.state.items()}
    num_queries, num_groups = parts[0].num_queries, parts[0].num_groups
    config = folder / "config.json"
    if config.is_file() and num_queries is None:
        num_queries, num_groups = _read_config(config).get("num_queries"), 1
    return CheckpointFile(state, num_queries, num_groups)


def _header_beside(path: Path) -> CheckpointHeader:
    config = _read_config(path)
    try:
        return header_of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a model directory of transformers."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}, beside the weights, cannot be read as json: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}, beside the weights, must hold an object of json")
    return content


def _read_safetensors(path: Path) -> CheckpointFile:
    config = read_header(path).model_config
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be read as safetensors: {error}") from None
    return CheckpointFile(state, config.get("num_queries"), config.get("num_groups"))


def _read_pickle(path: Path) -> Any:
    """What a pickle holds: of torch, or for ``.pkl`` of arrays alone."""
    kind, read = ("pickle of arrays", read_numpy_pickle) if path.suffix == ".pkl" else ("file of tensors", _read_torch)
    try:
        return read(path)
    except ForeignObjects as error:
        found = [name for name in error.names if name.startswith("ultralytics.")]
        if not found:
            raise ValueError(f"checkpoint {path} cannot be read as a {kind}: {error}") from None
        raise ValueError(
            f"checkpoint {path} is a model of Ultralytics (it holds objects such as {found[0]}) and no {kind}, and "
            "such models run in Ultralytics' code alone: use the file there, or give another checkpoint here, such as "
            "transformers:PekingU/rtdetr_v2_r18vd"
        ) from None
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be read as a {kind}: {error}") from None


def _read_torch(path: Path) -> Any:
    return read_tensors(path, admitted=[argparse.Namespace])  # of the original repositories


def _from_object(content: object, name: str) -> CheckpointFile:
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {name} holds a {type(content).__name__}, not a state dict")
    args = content.get("args")
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"checkpoint {name} holds no tensors")
    # num_groups of the original Group DETR is called group_detr
    return CheckpointFile(
        state, getattr(args, "num_queries", None), getattr(args, "group_detr", None) if args else None
    )
