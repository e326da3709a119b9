"""Flags that commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["CheckpointArgument", "DetectorFlags", "ImageFlags", "require_checkpoint"]

# The first argument of every command that uses a checkpoint; :func:`require_checkpoint` asks for it where it is
# missing. The parser would ask for it wherever a misspelt flag comes before it, and say nothing of the flag.
CheckpointArgument = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")]]


def require_checkpoint(checkpoint: Path | None, usage: str) -> Path:
    """The checkpoint that a command line names.

    Args:
        checkpoint: the argument.
        usage: the command with all that it needs.

    Raises:
        ValueError: if it is missing.
    """
    if checkpoint is None:
        raise ValueError(f"name the checkpoint: {usage}")
    return checkpoint


class _Overrides:
    """Flags that take the place of what a checkpoint says; None, the default of all, leaves it as it is."""

    def given(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ImageFlags(_Overrides):
    """How images are prepared, where it is not to be as the checkpoint says.

    Attributes:
        square: whether images become squares of side eval_short_side, whatever their aspect ratio; None for the
            checkpoint's own.
        eval_short_side: short side to which images are resized, in pixels; None for the checkpoint's own.
        eval_max_size: limit on the long side, which takes precedence; None for the checkpoint's own.
        image_mean: of the channels red, green, blue in [0, 1]; None for the checkpoint's own.
        image_std: standard deviation of the same; None for the checkpoint's own.
    """

    square: bool | None = None
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorFlags(_Overrides):
    """Which detector a checkpoint is of, where it does not say itself; this package and transformers store it.

    Attributes:
        model: name of the detector.
        num_classes: C, classes of the detector.
        num_queries: N, queries of one group.
        d_model: size of tokens and queries.
        num_heads: attention heads.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dim_feedforward: hidden size of the feed-forward blocks.
        backbone: resnet50 and the like, timm:NAME, or conv:W1-W2-...
    """

    model: str | None = None
    num_classes: int | None = None
    num_queries: int | None = None
    d_model: int | None = None
    num_heads: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    dim_feedforward: int | None = None
    backbone: str | None = None
