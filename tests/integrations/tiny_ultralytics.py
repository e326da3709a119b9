"""A tiny RT-DETR of Ultralytics with random weights, batches for it, and a data set on disk.

test_ultralytics.py runs what imports this, and skips where Ultralytics is not installed.
"""

import os
import tempfile

# Before Ultralytics is imported: its settings go to a folder of the tests', and nothing is asked of the network.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="groupdetr_fast-ultralytics-"))
os.environ.setdefault("YOLO_OFFLINE", "true")

import torch
from PIL import Image
from ultralytics import RTDETR
from ultralytics.nn.tasks import RTDETRDetectionModel
from ultralytics.utils import YAML

CLASSES, QUERIES, DENOISING, SIZE = 4, 8, 10, 64  # SIZE: of images, in pixels, which have 84 feature positions
COUNTS = [(2,), (3, 1), (0, 0), (1, 12, 0), (0, 25)]  # objects of images; more than queries, and than denoising queries

CONFIG = {
    "nc": CLASSES,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 4]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
}


def config_of(queries=QUERIES, learnt=False):
    # classes, hidden channels, queries, points, heads, layers, channels of the feed-forward network
    arguments = ["nc", 32, queries, 2, 4, 3, 64]
    if learnt:  # dropout, activation, layer of inference, denoising: queries and noise; learned contents
        arguments += [0.0, None, -1, DENOISING, 0.5, 1.0, True]
    return {**CONFIG, "head": [[[1, 2, 3], 1, "RTDETRDecoder", arguments]]}


def model_of(dtype=torch.float32, queries=QUERIES, denoising=DENOISING, learnt=False):
    """Ultralytics' model in training mode, whose heads are not those of the beginning, which are all zeros."""
    torch.manual_seed(0)
    model = RTDETRDetectionModel(config_of(queries, learnt), verbose=False)
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


def folder_of(tmp_path):
    """The folder itself, with a data set and a model's yaml file."""
    YAML.save(tmp_path / "rtdetr-tiny.yaml", config_of())
    write_data(tmp_path / "data")
    return tmp_path


def write_data(folder, counts=(2, 0, 3, 1)):
    """A data set with an image of noise for each number of objects."""
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


def step(model, batch):
    """The losses that Ultralytics shows and the sum of all, and gradients."""
    torch.manual_seed(3)  # of denoising queries
    model.zero_grad()
    loss, shown = model(dict(batch))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**shown, "loss": loss.detach()}, gradients


def assert_same_step(step, expected_step, tolerance):
    losses, gradients = step
    expected_losses, expected_gradients = expected_step
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance, check_dtype=False)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values()).item()
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=tolerance * largest)


def options_of(folder, name):
    """Of a training of two batches on the CPU, without what takes time and shows nothing here.

    The first updates of Adam are signs of gradients, which rounding changes where they are near 0.
    """
    options = {"imgsz": SIZE, "batch": 2, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    options |= {"optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0}
    return {**options, "data": str(folder / "data" / "data.yaml"), "project": str(folder / "runs"), "name": name}


def train(folder, name, *, model="rtdetr-tiny.yaml", epochs=1, **options):
    """The shown losses of each step, and the ``RTDETR``."""
    detector = RTDETR(str(folder / model))
    losses = []
    detector.add_callback("on_train_batch_end", lambda trainer: losses.append(dict(trainer.loss_items)))
    detector.train(**{**options_of(folder, name), "epochs": epochs, **options})
    return losses, detector
