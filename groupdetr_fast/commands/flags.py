"""Flags that commands share."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["CheckpointArgument", "DetectorFlags", "require_checkpoint"]

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


@dataclass(frozen=True, kw_only=True)
class DetectorFlags:
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

    def detector_settings(self) -> dict[str, Any]:
        """Those that are given, for ``load_model``."""
        given = {each.name: getattr(self, each.name) for each in fields(DetectorFlags)}
        return {name: value for name, value in given.items() if value is not None}
