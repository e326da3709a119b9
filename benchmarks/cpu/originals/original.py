"""What an original is to the comparison, whatever its repository looks like."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import groupdetr_fast as gd

__all__ = ["Original", "predictions", "sizes", "targets_of"]


class Original(nn.Module):
    """A model of a checkout, with its criterion.

    Args:
        built: what the repository's function returned: the model, its losses, and what makes detections of its output.
        nested: the repository's class of images with their masks, which the model takes.

    Attributes:
        weights: what each loss counts in the sum, by the original's name.
    """

    def __init__(self, built: tuple[nn.Module, nn.Module, Mapping[str, nn.Module]], nested: type):
        super().__init__()
        self.net, self.criterion, after = built
        self.after, self.nested = after["bbox"], nested
        self.weights: Mapping[str, float] = self.criterion.weight_dict

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Any]:
        """``images`` ``[B, 3, H, W]`` and ``masks`` ``[B, H, W]``, True on padding -> the output of the original."""
        return self.net(self.nested(images, masks))

    def detect(self, images: Tensor, masks: Tensor, targets: gd.PackedTargets) -> tuple[dict[str, Tensor], Any]:
        """Detect in a training step.

        Returns:
            Predictions by name, ``[layers, B, Q, ...]`` or, of the encoder, ``[B, Q, ...]``; and what the criterion
            takes.
        """
        out = self(images, masks)
        return predictions(out), out

    def losses(self, out: Any, targets: gd.PackedTargets) -> dict[str, Tensor]:
        """The losses that are trained on, unweighted, under this package's names, and ``loss``, their weighted sum."""
        found = self.all_losses(out, targets_of(targets))
        trained = {name: value for name, value in found.items() if name in self.weights}
        total = sum(self.weights[name] * value for name, value in trained.items())
        return {self.loss_name(name): value for name, value in trained.items()} | {"loss": total}

    def all_losses(self, out: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All that the criterion computes, also what it only logs."""
        return self.criterion(out, targets)

    def loss_name(self, name: str) -> str:
        """This package's name of a loss."""
        return name


def predictions(out: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Logits and boxes of all layers, last layer last."""
    every = [*out["aux_outputs"], out]
    return {f"{prefix}{name}": torch.stack([each[f"pred_{name}"] for each in every]) for name in ("logits", "boxes")}


def sizes(config: Any) -> dict[str, Any]:
    """What this package's configuration says, by the names that all of the repositories have for it."""
    return {
        "hidden_dim": config.d_model,
        "nheads": config.num_heads,
        "enc_layers": config.encoder_layers,
        "dec_layers": config.decoder_layers,
        "dim_feedforward": config.dim_feedforward,
        "num_queries": config.num_queries,
        "dropout": config.dropout,
        "dilation": config.dilation,
    }


def targets_of(targets: gd.PackedTargets) -> list[dict[str, Tensor]]:
    """Targets as the originals take them."""
    return [
        {"labels": targets.labels[index, :size], "boxes": targets.boxes[index, :size]}
        for index, size in enumerate(targets.sizes)
    ]
