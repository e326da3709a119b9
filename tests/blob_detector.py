"""A detector whose answers are known: it finds coloured rectangles on black, where they are large enough to be seen."""

from types import SimpleNamespace

import torch
from scipy import ndimage
from torch import nn

from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.groups import QueryGroups
from groupdetr_fast.models import DetectorOutput
from groupdetr_fast.prediction import InferenceSettings

NAMES = ("red", "green", "blue")
QUERIES = 40
CERTAIN, NOTHING = 3.0, -20.0  # logits


def settings(side=64, **sizes):
    """Of images that are resized to squares of 64 pixels, so that what the detector sees is what is drawn."""
    augmentation = AugmentationConfig(
        **{"square": True, "eval_short_side": side, **sizes}, image_mean=(0.0,) * 3, image_std=(1.0,) * 3
    )
    return InferenceSettings(class_names=NAMES, category_ids=(3, 5, 8), augmentation=augmentation)


class BlobDetector(nn.Module):
    """The scores say how much of a box is filled, and larger objects are surer.

    Args:
        least: side of the smallest object that is seen, in pixels as the model sees them.
    """

    def __init__(self, least=4, **sizes):
        super().__init__()
        self.anywhere = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(num_classes=len(NAMES))
        self.least = least
        self.inference_settings = settings(**sizes)
        self.batches = []  # shapes of the images of each

    def forward(self, images, masks):
        self.batches.append(tuple(images.shape))
        logits = torch.full((1, len(images), QUERIES, len(NAMES)), NOTHING)
        boxes = torch.full((1, len(images), QUERIES, 4), 0.5)
        for row, (image, padding) in enumerate(zip(images, masks, strict=True)):
            height, width = (~padding).any(1).sum().item(), (~padding).any(0).sum().item()
            for query, (label, x1, y1, x2, y2) in enumerate(self._blobs(image[:, :height, :width])):
                # between 2 and 4, more for larger ones
                logits[0, row, query, label] = CERTAIN - 1 + 2 * min(x2 - x1, y2 - y1) / max(height, width)
                boxes[0, row, query] = torch.tensor(
                    [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
                )
        return DetectorOutput(logits + self.anywhere, boxes, QueryGroups(1, QUERIES))

    def _blobs(self, image):
        for label, plane in enumerate(image.numpy() > 0.5):
            numbered, _ = ndimage.label(plane)
            for rows, columns in ndimage.find_objects(numbered):
                sides = (columns.stop - columns.start, rows.stop - rows.start)
                if min(sides) >= self.least:
                    yield label, columns.start, rows.start, columns.stop, rows.stop


def draw(height, width, objects):
    """An image ``[3, H, W]`` uint8 of objects ``(label, x1, y1, x2, y2)``."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for label, x1, y1, x2, y2 in objects:
        image[label, y1:y2, x1:x2] = 255
    return image
