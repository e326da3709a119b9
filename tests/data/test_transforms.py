from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from groupdetr_fast.data.normalization import Normalization
from groupdetr_fast.data.transforms import (
    AugmentationConfig,
    RandomSizeCrop,
    ResizeShortSide,
    eval_transforms,
    train_transforms,
)

CONFIG = AugmentationConfig(
    short_sides=(64, 80, 96),
    max_size=140,
    crop_short_sides=(70, 90),
    crop_min=40,
    crop_max=80,
    eval_short_side=96,
    eval_max_size=140,
)


def scene(height, width, box):
    """A black image with one red rectangle, and its box."""
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, y1:y2, x1:x2] = 255
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]).float(), format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([4])}


def red_extent(image):
    """The box of the pixels that are at least half red."""
    red = image[0] > 127
    rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize(("height", "width"), [(120, 90), (75, 160), (64, 64), (300, 200)])
def test_boxes_follow_the_image(height, width):
    transform = train_transforms(CONFIG)
    box = (width // 5, height // 3, width // 2, 2 * height // 3)
    shapes, seen = set(), 0
    for _ in range(60):
        image, target = transform(*scene(height, width, box))
        assert len(target["labels"]) == len(target["boxes"]) <= 1
        shapes.add(tuple(image.shape[1:]))
        if len(target["boxes"]) == 0:
            assert (image[0] <= 127).float().mean() > 0.95
            continue
        left, top, right, bottom = target["boxes"][0].tolist()
        if min(right - left, bottom - top) < 4:
            continue  # a sliver at the crop's edge is blurred away
        seen += 1
        assert target["labels"].tolist() == [4]
        assert (red_extent(image) - target["boxes"][0]).abs().max() <= 1.5
    assert seen > 30
    assert len(shapes) > 5


def test_flip_mirrors_image_and_boxes():
    transform = train_transforms(AugmentationConfig(short_sides=(50,), max_size=None, flip=1.0, crop=0.0))
    image, target = transform(*scene(50, 100, (10, 5, 30, 40)))
    assert target["boxes"].tolist() == [[70, 5, 90, 40]]
    assert red_extent(image).tolist() == [70, 5, 90, 40]


def test_colours_stay_innermost_and_the_pixels_what_they_were():
    """As decoders write them: resizing and collating others takes twice as long."""
    torch.manual_seed(0)
    innermost = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8).permute(2, 0, 1)
    boxes = tv_tensors.BoundingBoxes([[10.0, 10, 50, 60]], format="XYXY", canvas_size=(90, 120))
    for seed in range(30):
        images = []
        for pixels in (innermost, innermost.contiguous()):
            torch.manual_seed(seed)
            image, _ = train_transforms(CONFIG)(tv_tensors.Image(pixels), {"boxes": boxes, "labels": torch.tensor([0])})
            images.append(image.as_subclass(torch.Tensor))
        assert images[0].movedim(0, -1).is_contiguous()
        assert torch.equal(*images)


def test_sizes_of_training_images():
    transform = train_transforms(CONFIG)
    shorts = set()
    for _ in range(80):
        image, target = transform(*scene(110, 150, (0, 0, 150, 110)))
        short, long = sorted(image.shape[1:])
        assert long <= 140
        assert short in (64, 80, 96) or long == 140
        assert target["boxes"].canvas_size == tuple(image.shape[1:])
        shorts.add(short)
    assert {64, 80, 96} <= shorts


@pytest.mark.parametrize("side", [1, 3, 30])
def test_images_smaller_than_the_crop(side):
    transform = RandomSizeCrop(40, 80)
    for _ in range(10):
        image, target = transform(*scene(side, 60, (0, 0, 60, side)))
        assert image.shape[1] == side
        assert 40 <= image.shape[2] <= 60
        assert target["boxes"][0].tolist() == [0, 0, image.shape[2], side]
    assert train_transforms(CONFIG)(*scene(side, 60, (0, 0, 60, side)))[0].dtype == torch.uint8


def test_crop_sides_and_positions():
    transform = RandomSizeCrop(40, 80)
    image = tv_tensors.Image(torch.arange(100).view(1, 100, 1).expand(3, 100, 120).to(torch.uint8))
    tops, heights = set(), set()
    for _ in range(300):
        crop = transform(image)
        heights.add(crop.shape[1])
        tops.add(int(crop[0, 0, 0]))
        assert 40 <= crop.shape[1] <= 80
        assert 40 <= crop.shape[2] <= 80
    assert min(heights) <= 42
    assert max(heights) >= 78
    assert min(tops) <= 2
    assert max(tops) >= 45


def test_a_crop_removes_boxes_that_it_leaves_empty():
    image, target = scene(100, 100, (0, 0, 100, 100))
    corners = [[0, 0, 5, 5], [95, 95, 100, 100], [0, 0, 100, 100]]
    target["boxes"] = tv_tensors.BoundingBoxes(torch.tensor(corners).float(), format="XYXY", canvas_size=(100, 100))
    target["labels"] = torch.tensor([1, 2, 3])
    config = AugmentationConfig(
        short_sides=(50,), max_size=None, crop_short_sides=(100,), crop_min=40, crop_max=60, flip=0.0, crop=1.0
    )
    counts = set()
    for _ in range(40):
        _, result = train_transforms(config)(image, target)
        labels = result["labels"].tolist()
        assert 3 in labels
        assert not {1, 2} <= set(labels)
        assert len(result["boxes"]) == len(labels)
        counts.add(len(labels))
    assert counts == {1}


def test_large_scale_jitter():
    """Images are scaled relative to their fit into the square, and cropped to it where they are larger."""
    transform = train_transforms(AugmentationConfig(jitter_size=200, jitter_scale=(0.1, 2.0), flip=0.0))
    scales, offsets = [], set()
    for _ in range(200):
        image, target = transform(*scene(300, 400, (0, 0, 400, 300)))
        height, width = image.shape[1:]
        assert max(height, width) <= 200
        assert len(target["boxes"]) == 1
        # the object fills the image before and after
        assert target["boxes"][0].tolist() == pytest.approx([0, 0, width, height], abs=1e-3)
        scales.append(min(height / 150, 4 / 3))  # at scale 1, the image is 150 x 200; from 4 / 3 on, 200 x 200 remain
        offsets.add((height, width) == (200, 200))
    scales = torch.tensor(scales)
    assert 0.1 <= scales.min() < 0.2
    assert 0.2 < (scales == 4 / 3).float().mean() < 0.5  # (2 - 4 / 3) / 1.9 = 0.35
    assert offsets == {True, False}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((300, 1000), (400, 1333)),
        ((1000, 300), (1333, 400)),
        ((500, 500), (800, 800)),
        ((1, 4000), (1, 1333)),
    ],
)
def test_evaluation_size(size, expected):
    image, target = eval_transforms()(*scene(*size, (0, 0, size[1], size[0])))
    assert tuple(image.shape[1:]) == expected
    torch.testing.assert_close(
        target["boxes"][0].as_subclass(torch.Tensor), torch.tensor([0.0, 0, expected[1], expected[0]])
    )


def test_a_box_at_the_edge_survives_every_resize():
    """Rounding may put its corner outside the canvas by a hair; nothing may take it for degenerate."""
    config = AugmentationConfig(short_sides=tuple(range(40, 90)), max_size=None, flip=0.5, crop=0.0)
    transform = train_transforms(config)
    for size in range(50, 90):
        _, target = transform(*scene(size, size + 7, (size, 0, size + 7, size)))
        assert len(target["boxes"]) == 1


def test_the_normalisation_of_the_configuration_is_said():
    config = AugmentationConfig(
        short_sides=(8,), eval_short_side=8, flip=0.0, crop=0.0, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.25, 1.0)
    )
    white = tv_tensors.Image(torch.full((3, 8, 8), 255, dtype=torch.uint8))
    for made in (train_transforms(config), eval_transforms(config), train_transforms(replace(config, jitter_size=8))):
        image, objects = made(*scene(8, 8, (1, 1, 7, 7)))
        assert image.dtype == torch.uint8
        assert objects["normalization"] == Normalization((0.5, 0.5, 0.5), (0.5, 0.25, 1.0))
        torch.testing.assert_close(objects["normalization"](white)[:, 0, 0], torch.tensor([1.0, 2.0, 0.5]))


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(jitter_size=96, jitter_scale=(0.3, 2.0)),
        AugmentationConfig(short_sides=(35, 41, 60, 130), max_size=None, crop=0.0),
    ],
    ids=["jitter", "short side"],
)
def test_masks_lie_on_their_images(config):
    """The centroids of a white disc and of its mask agree: on average, and not half a pixel apart."""
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(120), indexing="ij")
    offsets = []
    for seed in range(60):
        torch.manual_seed(seed)
        disc = (rows - 45) ** 2 + (columns - 60) ** 2 < 25**2
        boxes = tv_tensors.BoundingBoxes([[35.0, 20.0, 86.0, 71.0]], format="XYXY", canvas_size=(100, 120))
        objects = {"boxes": boxes, "labels": torch.tensor([0]), "masks": tv_tensors.Mask(disc[None].to(torch.uint8))}
        image = tv_tensors.Image(disc.to(torch.uint8).mul(255).expand(3, -1, -1).contiguous())
        image, objects = train_transforms(config)(image, objects)
        if len(objects["masks"]):
            offsets.append(centroid(objects["masks"][0].float()) - centroid((image[0] - image[0].min()).float()))
    assert len(offsets) > 50
    assert torch.stack(offsets).mean(dim=0).abs().max() < 0.1


def centroid(weights):
    """Row and column of the centre of a map ``[H, W]``, in pixels."""
    weights = weights.as_subclass(torch.Tensor) / weights.sum()
    return torch.stack([(weights.sum(1 - dim) * torch.arange(weights.shape[dim])).sum() for dim in (0, 1)])


def test_resize_draws_from_its_sizes():
    transform = ResizeShortSide((20, 30))
    image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert {tuple(transform(image).shape[1:]) for _ in range(30)} == {(20, 30), (30, 45)}


def test_transforms_can_be_sent_to_a_worker():
    dataset = [0]
    loader = DataLoader(
        dataset, num_workers=1, multiprocessing_context="fork", collate_fn=_Apply(train_transforms(CONFIG))
    )
    assert next(iter(loader)).shape[0] == 3


class _Apply:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, _):
        return self.transform(*scene(60, 60, (5, 5, 30, 30)))[0].as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"short_sides": ()}, "short_sides must hold sizes of at least 8 pixels"),
        ({"crop_short_sides": (0, 5)}, "crop_short_sides must hold sizes of at least 8 pixels"),
        ({"short_sides": (2,)}, r"short_sides must hold sizes of at least 8 pixels, got \(2,\)"),
        ({"max_size": 0}, "max_size must be at least 8 pixels, got 0"),
        ({"crop_min": 700}, "crop_min must not exceed crop_max, got 700 > 600"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std must be positive"),
        ({"flip": 1.5}, r"flip must be a probability in \[0, 1\], got 1.5"),
        ({"jitter_size": 0}, "jitter_size must be at least 8 pixels, got 0"),
        ({"jitter_scale": (2.0, 0.1)}, "jitter_scale must be positive and ascending"),
        ({"crop": -0.1}, r"crop must be a probability in \[0, 1\]"),
    ],
)
def test_faulty_configs(sizes, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**sizes)


def test_squares_have_one_of_the_sides_and_boxes_follow():
    config = AugmentationConfig(short_sides=(64, 80), square=True, crop=0, flip=0, eval_short_side=96, max_size=10)
    shapes = set()
    for _ in range(20):
        image, target = train_transforms(config)(*scene(120, 60, (15, 30, 45, 90)))
        assert len(target["boxes"]) == 1
        side = image.shape[-1]
        expected = torch.tensor([[side / 4, side / 4, side * 3 / 4, side * 3 / 4]])
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), expected)
        shapes.add(tuple(image.shape[1:]))
    assert shapes == {(64, 64), (80, 80)}
    image, _ = eval_transforms(config)(*scene(120, 60, (15, 30, 45, 90)))
    assert image.shape == (3, 96, 96)
