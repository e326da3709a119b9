"""A tiny RT-DETR of Ultralytics with random weights, batches for it, and a data set on disk.

What imports this is skipped where Ultralytics is not installed.
"""

import os
import tempfile

import pytest

# Before Ultralytics is imported: its settings go to a folder of the tests', and nothing is asked of the network.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="groupdetr_fast-ultralytics-"))
os.environ.setdefault("YOLO_OFFLINE", "true")
pytest.importorskip("ultralytics", reason="ultralytics is not installed")

import torch
from PIL import Image
from ultralytics.nn.tasks import RTDETRDetectionModel
from ultralytics.utils import YAML

CLASSES, QUERIES, DENOISING, SIZE = 4, 8, 10, 64  # SIZE: of images, in pixels, which have 84 feature positions

CONFIG = {
    "nc": CLASSES,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 4]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
}


def config_of(queries=QUERIES):
    # classes, hidden channels, queries, points, heads, layers, channels of the feed-forward network
    arguments = ["nc", 32, queries, 2, 4, 3, 64]
    return {**CONFIG, "head": [[[1, 2, 3], 1, "RTDETRDecoder", arguments]]}


def model_of(dtype=torch.float32, queries=QUERIES, denoising=DENOISING):
    """Ultralytics' model in training mode, whose heads are not those of the beginning, which are all zeros."""
    torch.manual_seed(0)
    model = RTDETRDetectionModel(config_of(queries), verbose=False)
    model.model[-1].num_denoising = denoising
    with torch.no_grad():
        for parameter in model.model[-1].parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.nc = CLASSES  # which a trainer sets
    model.names = {index: f"class{index}" for index in range(CLASSES)}
    return model.train().to(dtype)


def batch_of(counts, dtype=torch.float32):
    """Images with so many objects, as Ultralytics' loader makes them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(counts), 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    centers, sizes = (torch.rand(sum(counts), 2, generator=generator) for _ in range(2))
    return {
        "img": images.to(dtype),
        "cls": torch.randint(CLASSES, (sum(counts), 1), generator=generator).float(),
        "bboxes": torch.cat((centers * 0.6 + 0.2, sizes * 0.3 + 0.05), dim=1).to(dtype),
        "batch_idx": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float(),
    }


def write_model(folder):
    """The path of a yaml file that ``RTDETR`` takes."""
    path = folder / "rtdetr-tiny.yaml"
    YAML.save(path, config_of())
    return str(path)


def write_data(folder, counts=(2, 0, 3, 1)):
    """The path of the yaml file of a data set: an image of noise for each number of objects."""
    generator = torch.Generator().manual_seed(2)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index, count in enumerate(counts):
        pixels = torch.randint(256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        lines = [f"{index % CLASSES} {' '.join(f'{x:.6f}' for x in box.tolist())}\n" for index, box in enumerate(boxes)]
        (folder / "labels" / f"{index}.txt").write_text("".join(lines))
    names = {index: f"class{index}" for index in range(CLASSES)}
    YAML.save(folder / "data.yaml", {"path": str(folder), "train": "images", "val": "images", "names": names})
    return str(folder / "data.yaml")
