"""Which models are those of transformers, by name, and what is peculiar to each of its detectors, by ``model_type``."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..files import read_json

__all__ = [
    "FAMILIES",
    "PREFIX",
    "Family",
    "check_accelerate_kernels",
    "model_type_in",
    "of_transformers",
    "place_of",
    "require_transformers",
    "size_multiple",
]

PREFIX = "transformers:"


def of_transformers(name: object) -> bool:
    """Whether a name, or a path, stands for a model of transformers."""
    return str(name).startswith(PREFIX)


def place_of(name: object) -> str:
    """The directory or hub id in ``transformers:DIR_OR_ID``."""
    return str(name).removeprefix(PREFIX)


def model_type_in(folder: Path) -> str | None:
    """The ``model_type`` of a model directory of transformers, known here or not; None for anything else."""
    content = read_json(folder / "config.json") if folder.is_dir() else None
    kind = content.get("model_type") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def require_transformers() -> None:
    """Call this before what needs transformers is imported.

    Raises:
        ValueError: if it is not installed; the sentence says how to.
    """
    if find_spec("transformers") is None:
        raise ValueError("models of transformers need it: pip install 'groupdetr_fast[train,transformers]'")


def check_accelerate_kernels(accelerate_kernels: bool, model: object) -> None:
    """Check that the kernels of this package are switched off for a model of transformers alone.

    Args:
        accelerate_kernels: whether the model computes with them.
        model: its name.

    Raises:
        ValueError: if they are off for a detector of this package, which has no other code.
    """
    if not accelerate_kernels and not of_transformers(model):
        raise ValueError(f"accelerate_kernels is for models of transformers: leave it out for {model}")


@dataclass(frozen=True)
class Family:
    """A detector of transformers.

    Attributes:
        processor: class of transformers whose defaults count where a model has no ``preprocessor_config.json``.
        uses_masks: whether boxes are relative to the image without its padding, which the model tells by the mask; else
            they are relative to the padded frame.
        no_object: whether the last of C + 1 logits is "no object" (softmax); else there are C (sigmoid).
        loss_counts: whose objects transformers' loss divides by: those of the batch in this process; in the mean over
            processes; or this mean divided by the number of processes once more, since Accelerate's ``reduce`` is a
            mean already, which transformers takes for a sum.
        weighted: whether transformers gives the losses with their weights.
        groups: "own" for models with ``group_detr`` groups of their own, "added" where
            ``integrations.transformers.add_groups`` can add some, else None.
        accelerates: whether ``integrations.transformers.accelerate`` has kernels for it.
        square_frames: whether height and width must be the same, since windows are cut wrongly otherwise.
    """

    processor: str
    uses_masks: bool = True
    no_object: bool = False
    loss_counts: Literal["process", "mean", "divided mean"] = "divided mean"
    weighted: bool = False
    groups: Literal["own", "added"] | None = None
    accelerates: bool = True
    square_frames: bool = False


_HYBRID = Family("RTDetrImageProcessor", uses_masks=False, loss_counts="process", weighted=True)

FAMILIES: Mapping[str, Family] = {
    "detr": Family("DetrImageProcessor", no_object=True, accelerates=False),
    "conditional_detr": Family("ConditionalDetrImageProcessor", groups="added"),
    "dab-detr": Family("ConditionalDetrImageProcessor", groups="added"),
    "deformable_detr": Family("DeformableDetrImageProcessor", groups="added"),
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deimv2": _HYBRID,
    "lw_detr": Family("DeformableDetrImageProcessor", loss_counts="mean", groups="own"),
    "rf_detr": Family("RfDetrImageProcessor", loss_counts="mean", groups="own", square_frames=True),
}

_HYBRID_STRIDE = 32  # of the coarsest map, which is doubled twice and then must fit the finer ones


def size_multiple(config: Mapping[str, Any]) -> int:
    """What heights and widths of images must be multiples of.

    Args:
        config: of the model, as in its ``config.json``.
    """
    backbone = config.get("backbone_config") or {}
    kind = config["model_type"]
    if FAMILIES[kind] is _HYBRID:
        return _HYBRID_STRIDE
    if FAMILIES[kind].groups != "own":
        return 1
    patch, windows = backbone["patch_size"], backbone["num_windows"]
    patch = patch if isinstance(patch, int) else max(patch)
    # LW-DETR counts all windows of an image, RF-DETR those along a side.
    return patch * (round(windows**0.5) if kind == "lw_detr" else windows)
