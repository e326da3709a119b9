"""The one table of sizes that all benchmarks use, and inputs of these sizes.

Shapes are those of the paper: 6 decoder layers, 11 groups of 300 queries, 8 heads of 32 channels, and two images per
process; feature levels are those of a 400 x 533 image, and whole detectors see 480 x 640 pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import groupdetr_fast as gd

AVERAGE_OF_COCO = 7  # objects per image


@dataclass(frozen=True)
class Matching:
    """Predictions of all layers and groups, and their targets."""

    targets: int  # per image
    layers: int = 6
    batch: int = 2
    num_groups: int = 11
    num_queries: int = 300
    classes: int = 91
    predictions: str = "trained"  # or one of OTHER_PREDICTIONS

    def __str__(self) -> str:
        size = f"{self.layers * self.batch * self.num_groups}x{self.num_queries}x{self.targets}"
        return size if self.predictions == "trained" else f"{size} {self.predictions}"

    @property
    def groups(self) -> gd.QueryGroups:
        return gd.QueryGroups(self.num_groups, self.num_queries)

    def make(self) -> tuple[gd.DetectorOutput, list[dict[str, Tensor]]]:
        """Predictions and targets.

        - trained: as of a model in training, 60 % of the queries lie around targets, closer in later layers;
        - random: no query has anything to do with a target;
        - early: all queries predict about the same box and no class, as after a few steps;
        - crowded: goods on a shelf, in rows and columns, and every query lies around one of a quarter of them.
        """
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        crowded = self.predictions == "crowded"
        targets, near = [], []
        for _ in range(self.batch):
            if crowded:
                boxes, labels = self._shelf(uniform), torch.zeros(self.targets, dtype=torch.int64)
            else:
                boxes = torch.cat((uniform(self.targets, 2) * 0.8 + 0.1, uniform(self.targets, 2) * 0.3 + 0.02), dim=1)
                labels = torch.randint(self.classes, (self.targets,), generator=generator)
            targets.append({"labels": labels, "boxes": boxes})
            found = boxes[::4] if crowded else boxes
            near.append(found[torch.randint(len(found), (self.groups.length,), generator=generator)])
        shape = (self.layers, self.batch, self.groups.length)
        if self.predictions == "early":
            boxes = 0.4 + 0.02 * torch.randn(*shape, 4, generator=generator)
            logits = 0.1 * torch.randn(*shape, self.classes, generator=generator) - 4.6
            return gd.DetectorOutput(logits, boxes, self.groups), targets
        noise = torch.randn(*shape, 4, generator=generator) * torch.linspace(0.1, 0.01, self.layers).view(-1, 1, 1, 1)
        around = (torch.stack(near) + noise).clamp(0.01, 0.99)
        share = {"trained": 0.6, "random": 0.0, "crowded": 1.0}[self.predictions]
        boxes = torch.where(uniform(*shape, 1) < share, around, uniform(*shape, 4) * 0.9 + 0.05)
        logits = torch.randn(*shape, self.classes, generator=generator) - 3
        return gd.DetectorOutput(logits, boxes, self.groups), targets

    def _shelf(self, uniform: Callable[..., Tensor]) -> Tensor:
        side = math.ceil(self.targets**0.5)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[: self.targets]
        centers = 0.25 + 0.5 * (places + 0.5 + 0.2 * (uniform(self.targets, 2) - 0.5)) / side
        return torch.cat((centers, 0.5 / side * (0.9 + 0.2 * uniform(self.targets, 2))), dim=1)


@dataclass(frozen=True)
class Attention:
    """Decoder self-attention."""

    num_groups: int
    num_queries: int = 300
    batch: int = 2
    heads: int = 8
    channels: int = 32
    denoising_groups: int = 0
    denoising_queries: int = 0  # of one denoising group

    def __str__(self) -> str:
        denoising = f"+{self.denoising_groups * self.denoising_queries}" if self.denoising_groups else ""
        return f"K{self.num_groups}xN{self.num_queries}{denoising}"

    @property
    def groups(self) -> gd.QueryGroups:
        return gd.QueryGroups(self.num_groups, self.num_queries, self.denoising_groups, self.denoising_queries)

    def small(self) -> "Attention":
        """The same with few queries, to see that a benchmark works."""
        return replace(self, num_queries=16, denoising_queries=min(self.denoising_queries, 3))

    def make(self, device: torch.device | str = "cpu") -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.groups.length, self.heads, self.channels)
        return [torch.randn(shape, generator=generator, device=device).requires_grad_() for _ in range(3)]


@dataclass(frozen=True)
class CrossAttention:
    """Attention of queries to images, of which every other one is padded to the right, the others below.

    Attributes:
        mask: "a quarter" of each map is padding; "empty" for a mask without padding, "none" for no mask.
    """

    queries: int
    mask: str = "a quarter"
    batch: int = 2
    heads: int = 8
    channels: int = 64  # of queries and keys: content and position side by side, as in Conditional DETR
    value_channels: int = 32
    map: tuple[int, int] = (25, 42)  # of an image of 800 x 1333 pixels, at stride 32

    def __str__(self) -> str:
        masks = {"a quarter": "", "empty": ", empty mask", "none": ", no padding"}
        return f"L{self.queries}xS{self.map[0] * self.map[1]}" + masks[self.mask]

    def small(self) -> "CrossAttention":
        """The same with few queries and keys, to see that a benchmark works."""
        return replace(self, queries=min(self.queries, 20), heads=2, map=(5, 8))

    def make(self, device: torch.device | str = "cpu") -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        keys = self.map[0] * self.map[1]
        shapes = (self.queries, self.channels), (keys, self.channels), (keys, self.value_channels)
        return [
            torch.randn(self.batch, length, self.heads, size, generator=generator, device=device).requires_grad_()
            for length, size in shapes
        ]

    def padding(self, device: torch.device | str = "cpu") -> Tensor | None:
        """``[batch, keys]`` bool, True on padding; None for none."""
        if self.mask == "none":
            return None
        height, width = self.map
        padding = torch.zeros(self.batch, height, width, dtype=torch.bool, device=device)
        if self.mask == "a quarter":
            padding[::2, :, width - width // 4 :] = True
            padding[1::2, height - height // 4 :] = True
        return padding.flatten(1)


@dataclass(frozen=True)
class Deformable:
    """Multi-scale deformable attention of an encoder (one query per pixel) or of a decoder."""

    queries: int | None  # None: one per pixel
    batch: int = 2
    heads: int = 8
    channels: int = 32
    points: int = 4
    levels: tuple[tuple[int, int], ...] = ((50, 67), (25, 34), (13, 17), (7, 9))
    near: bool = False  # samples lie a few pixels from their query, as in trained models, not anywhere

    def __str__(self) -> str:
        return ("encoder" if self.queries is None else f"decoder{self.queries}") + (" near" if self.near else "")

    def small(self) -> "Deformable":
        """The same with few pixels and queries, to see that a benchmark works."""
        return replace(self, queries=self.queries and 7, levels=((6, 8), (3, 4), (2, 2), (1, 1)))

    def make(self, device: torch.device | str = "cpu") -> list[Tensor]:
        options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        pixels = sum(height * width for height, width in self.levels)
        queries = self.queries or pixels
        value = torch.randn(self.batch, pixels, self.heads, self.channels, **options)
        samples = (self.batch, queries, self.heads, len(self.levels), self.points)
        sizes = torch.tensor([(width, height) for height, width in self.levels], device=device)[:, None]
        if self.near:  # sizes: [levels, 1, 2]
            places = self._places_of_queries(queries, options)[None, :, None, None, None]
            pixels = places * sizes - 0.5 + 2 * torch.randn(*samples, 2, **options)
        else:
            pixels = torch.rand(*samples, 2, **options) * sizes - 0.5
        # A little away from the centres of pixels, where slopes jump and gradients could not be compared.
        pixels = pixels.floor() + 0.01 + 0.98 * (pixels - pixels.floor())
        locations = (pixels + 0.5) / sizes
        weights = torch.randn(samples, **options).flatten(3).softmax(-1).view(samples)
        return [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def _places_of_queries(self, queries: int, options: dict) -> Tensor:
        """``[queries, 2]``, x and y in [0, 1]: the pixels' own places in an encoder, any in a decoder."""
        if self.queries is not None:
            return torch.rand(queries, 2, **options)
        maps = []
        for height, width in self.levels:
            y, x = ((torch.arange(size, device=options["device"]) + 0.5) / size for size in (height, width))
            maps.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
        return torch.cat(maps)


@dataclass(frozen=True)
class Detection:
    """A batch for a whole detector: images of which all but the first are padded, and their targets."""

    num_groups: int = 1
    num_queries: int = 300
    batch: int = 2
    height: int = 480
    width: int = 640
    classes: int = 91
    targets: int = AVERAGE_OF_COCO  # per image

    def __str__(self) -> str:
        return f"K{self.num_groups}xN{self.num_queries}"

    def small(self) -> "Detection":
        """The same with few pixels and queries, to see that a benchmark works."""
        return replace(self, num_queries=16, height=64, width=64)

    def make(self) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
        """Images ``[B, 3, H, W]``, masks ``[B, H, W]`` (True on padding) and targets."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.height, self.width, generator=generator)
        masks = torch.zeros(self.batch, self.height, self.width, dtype=torch.bool)
        masks[1:, self.height * 3 // 4 :] = True
        targets = []
        for _ in range(self.batch):
            boxes = torch.rand(self.targets, 4, generator=generator) * 0.4 + 0.2
            labels = torch.randint(self.classes, (self.targets,), generator=generator)
            targets.append({"labels": labels, "boxes": boxes})
        return images.masked_fill(masks[:, None], 0), masks, targets


@dataclass(frozen=True)
class Segmentation:
    """Square images with round objects, and what Mask2Former predicts for them."""

    num_groups: int
    num_queries: int = 100
    batch: int = 2
    size: int = 1024  # of the images, in pixels
    layers: int = 10  # 9, and the learned queries
    channels: int = 256
    classes: int = 80
    targets: int = AVERAGE_OF_COCO  # per image
    points: int = 12544

    def __str__(self) -> str:
        return f"K{self.num_groups}x{self.batch}x{self.size}"

    def small(self) -> "Segmentation":
        """The same with few pixels and queries, to see that a benchmark works."""
        return replace(self, num_queries=8, size=64, channels=8, points=200)

    def make_images(self) -> Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def make_targets(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        steps = torch.arange(self.size) / self.size
        targets = []
        for _ in range(self.batch):
            x, y, radius = (torch.rand(self.targets, 3, generator=generator) * 0.2 + 0.05).unbind(1)
            far = (steps - 4 * x[:, None, None]) ** 2 + (steps[:, None] - 4 * y[:, None, None]) ** 2
            labels = torch.randint(self.classes, (self.targets,), generator=generator)
            masks = far < radius[:, None, None] ** 2
            targets.append({"labels": labels, "boxes": torch.zeros(self.targets, 4), "masks": masks})
        return targets

    def make_predictions(self) -> gd.SegmentationOutput:
        """Random ones, which need gradients."""
        generator = torch.Generator().manual_seed(2)
        groups, cells = gd.QueryGroups(self.num_groups, self.num_queries), self.size // 4
        queries = (self.layers, self.batch, groups.length)
        shapes = ((*queries, self.classes + 1), (*queries, self.channels), (self.batch, self.channels, cells, cells))
        tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        padding = torch.zeros(self.batch, self.size, self.size, dtype=torch.bool)
        return gd.SegmentationOutput(*tensors, padding, groups)


@dataclass(frozen=True)
class Transformers:
    """A model of transformers at the sizes of its own configuration, and square images for it."""

    model: str
    size: int = 320  # of the images, in pixels
    batch: int = 2
    targets: int = AVERAGE_OF_COCO  # per image

    def __str__(self) -> str:
        objects = "" if self.targets == AVERAGE_OF_COCO else f" with {self.targets} objects"
        return f"{self.model}x{self.batch}x{self.size}{objects}"

    def small(self) -> "Transformers":
        """The same with few pixels, to see that a benchmark works."""
        return replace(self, size=128)

    def make(self, classes: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Images ``[B, 3, size, size]``, and labels, boxes and masks ``[T, size, size]`` of their objects."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        steps = torch.arange(self.size) / self.size
        targets = []
        for _ in range(self.batch):
            boxes = torch.rand(self.targets, 4, generator=generator) * 0.4 + 0.2
            center_x, center_y, width, height = boxes[:, :, None, None].unbind(1)
            inside = ((steps - center_x).abs() < width / 2) & ((steps[:, None] - center_y).abs() < height / 2)
            labels = torch.randint(classes, (self.targets,), generator=generator)
            targets.append({"labels": labels, "boxes": boxes, "masks": inside.float()})
        return images, targets


@dataclass(frozen=True)
class RfDetr:
    """The smallest published RF-DETR in training, and square images for it."""

    batch: int = 2
    num_groups: int = 13
    num_queries: int = 300
    size: int = 384  # of the images, in pixels
    classes: int = 80
    targets: int = AVERAGE_OF_COCO  # per image

    def __str__(self) -> str:
        return f"K{self.num_groups}x{self.batch}x{self.size}"

    def small(self) -> "RfDetr":
        """The same with few pixels and queries, to see that a benchmark works."""
        return replace(self, num_queries=16, size=128)

    def make(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Images ``[B, 3, size, size]`` and targets."""
        return _images_with_boxes(self)


@dataclass(frozen=True)
class Ultralytics:
    """Ultralytics' RT-DETR in training, and square images for it."""

    targets: int = AVERAGE_OF_COCO  # per image
    model: str = "rtdetr-l.yaml"
    batch: int = 2
    size: int = 320  # of the images, in pixels
    classes: int = 80

    def __str__(self) -> str:
        return f"{self.model.removesuffix('.yaml')}x{self.batch}x{self.size} with {self.targets} objects"

    def small(self) -> "Ultralytics":
        """The same with few pixels, to see that a benchmark works."""
        return replace(self, size=64)

    def make(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Images ``[B, 3, size, size]`` and targets."""
        return _images_with_boxes(self)


def _images_with_boxes(case: "RfDetr | Ultralytics") -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Random images of a case, and labels and boxes of their objects."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    targets = []
    for _ in range(case.batch):
        boxes = torch.rand(case.targets, 4, generator=generator) * 0.4 + 0.2
        targets.append({"labels": torch.randint(case.classes, (case.targets,), generator=generator), "boxes": boxes})
    return images, targets


MATCHING = [Matching(5), Matching(20), Matching(60), Matching(100)]
OTHER_PREDICTIONS = ("random", "early", "crowded")
ASSIGNMENT = [Matching(targets) for targets in (5, 20, 60, 100, 200, 300)]
ATTENTION = [Attention(1), Attention(3), Attention(5), Attention(11)]
DEFORMABLE = [Deformable(None), Deformable(300)]
DETECTION = [Detection(1), Detection(5), Detection(11)]
MASKS = [Segmentation(1), Segmentation(11)]
SEGMENTATION = [Segmentation(1, size=512), Segmentation(11, size=512)]  # whole steps: the backbone wants memory, too
TRANSFORMERS = [
    Transformers(model)
    for model in (
        "DeformableDetr",
        "Mask2Former",
        "LwDetr",
        "RfDetr",
        "RTDetrV2",
        "DFine",
    )
]
TRANSFORMERS += [Transformers("Mask2Former", targets=number) for number in (20, 60)]  # whose masks take their time
RFDETR = [RfDetr(2), RfDetr(4)]
ULTRALYTICS = [Ultralytics(), Ultralytics(targets=20)]
# On GPUs: Conditional DETR's and DINO's queries, small and large batches, images of 800 x 1333 pixels.
MAPS = ((100, 167), (50, 84), (25, 42), (13, 21))
GPU_BATCHES = (2, 16)
GPU_ATTENTION = [Attention(11, 300), Attention(11, 900), Attention(3, 900, denoising_groups=2, denoising_queries=100)]
GPU_CROSS_ATTENTION = [
    CrossAttention(3300),
    CrossAttention(3300, mask="none"),
    CrossAttention(300),
    CrossAttention(3300, mask="empty"),
    CrossAttention(1050, channels=32),  # an encoder's tokens to each other
]
GPU_DEFORMABLE = [
    Deformable(queries, levels=MAPS, near=near)
    for queries, near in ((None, True), (None, False), (3 * 900, True), (11 * 900, True))
]
GPU_MATCHING = [Matching(20), Matching(60), Matching(100)]
