"""The one table of sizes that all benchmarks use, and inputs of these sizes.

Shapes are those of the paper: 6 decoder layers, 11 groups of 300 queries, 8 heads of 32 channels, and two images per
process; feature levels are those of a 400 x 533 image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import groupdetr_fast as gd


@dataclass(frozen=True)
class Matching:
    """Predictions of all layers and groups, and their targets."""

    targets: int  # per image
    layers: int = 6
    batch: int = 2
    num_groups: int = 11
    num_queries: int = 300
    classes: int = 91

    def __str__(self) -> str:
        return f"{self.layers * self.batch * self.num_groups}x{self.num_queries}x{self.targets}"

    @property
    def groups(self) -> gd.QueryGroups:
        return gd.QueryGroups(self.num_groups, self.num_queries)

    def make(self) -> tuple[gd.DetectorOutput, list[dict[str, Tensor]]]:
        """Predictions as of a model in training: 60 % of the queries lie around targets, closer in later layers."""
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        targets, near = [], []
        for _ in range(self.batch):
            boxes = torch.cat((uniform(self.targets, 2) * 0.8 + 0.1, uniform(self.targets, 2) * 0.3 + 0.02), dim=1)
            labels = torch.randint(self.classes, (self.targets,), generator=generator)
            targets.append({"labels": labels, "boxes": boxes})
            near.append(boxes[torch.randint(self.targets, (self.groups.length,), generator=generator)])
        shape = (self.layers, self.batch, self.groups.length)
        noise = torch.randn(*shape, 4, generator=generator) * torch.linspace(0.1, 0.01, self.layers).view(-1, 1, 1, 1)
        around = (torch.stack(near) + noise).clamp(0.01, 0.99)
        boxes = torch.where(uniform(*shape, 1) < 0.6, around, uniform(*shape, 4) * 0.9 + 0.05)
        logits = torch.randn(*shape, self.classes, generator=generator) - 3
        return gd.DetectorOutput(logits, boxes, self.groups), targets


@dataclass(frozen=True)
class Attention:
    """Decoder self-attention."""

    num_groups: int
    num_queries: int = 300
    batch: int = 2
    heads: int = 8
    channels: int = 32

    def __str__(self) -> str:
        return f"K{self.num_groups}xN{self.num_queries}"

    def make(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.num_groups * self.num_queries, self.heads, self.channels)
        return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


@dataclass(frozen=True)
class Deformable:
    """Multi-scale deformable attention of an encoder (one query per pixel) or of a decoder."""

    queries: int | None  # None: one per pixel
    batch: int = 2
    heads: int = 8
    channels: int = 32
    points: int = 4
    levels: tuple[tuple[int, int], ...] = ((50, 67), (25, 34), (13, 17), (7, 9))

    def __str__(self) -> str:
        return "encoder" if self.queries is None else f"decoder{self.queries}"

    def make(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        pixels = sum(height * width for height, width in self.levels)
        queries = self.queries or pixels
        value = torch.randn(self.batch, pixels, self.heads, self.channels, generator=generator)
        samples = (self.batch, queries, self.heads, len(self.levels), self.points)
        locations = torch.rand(*samples, 2, generator=generator)
        weights = torch.randn(samples, generator=generator).flatten(3).softmax(-1).view(samples)
        return [tensor.requires_grad_() for tensor in (value, locations, weights)]


MATCHING = [Matching(5), Matching(20), Matching(60), Matching(100)]
ATTENTION = [Attention(1), Attention(3), Attention(11)]
DEFORMABLE = [Deformable(None), Deformable(300)]
