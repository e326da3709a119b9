import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from PIL import Image

from groupdetr_fast.evaluation import draw_detections, draw_image
from groupdetr_fast.evaluation.visualize import draw_frame, scale_objects

NAMES = ["cat", "dog", "a much longer name"]


def objects(*boxes, scores=None):
    result = {"labels": torch.arange(len(boxes)) % 3, "boxes": torch.tensor(boxes).float().reshape(-1, 4)}
    if scores is not None:
        result["scores"] = torch.tensor(scores)
    return result


def pixels_of_colour(picture, label):
    colour = np.array(colormaps["tab10"](label)[:3]) * 255
    return (np.abs(picture.astype(float) - colour).max(axis=-1) < 3).any(axis=0).nonzero()[0]


def test_pictures_show_the_truth_left_and_the_predictions_right(tmp_path):
    images = [torch.full((3, 60, 80), 200, dtype=torch.uint8)]
    truth = [objects([10, 20, 40, 50])]
    predictions = [objects([12, 22, 38, 52], [50, 5, 75, 30], [1, 1, 9, 9], scores=[0.9, 0.6, 0.1])]
    path = tmp_path / "new" / "picture.png"
    draw_detections(images, truth, predictions, NAMES, path, score_threshold=0.5)
    picture = np.array(Image.open(path).convert("RGB"))
    middle = picture.shape[1] / 2
    cat, dog, third = (pixels_of_colour(picture, label) for label in range(3))
    assert (cat < middle).any()
    assert (cat > middle).any()
    assert len(dog)
    assert (dog > middle).all()
    assert len(third) == 0


def test_masks_are_drawn_in_place_of_boxes(tmp_path):
    image = torch.full((3, 60, 80), 200, dtype=torch.uint8)
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 10:50, 5:30], masks[1, 10:50, 50:75] = 1, 1
    boxes = torch.tensor([[5.0, 10, 30, 50], [50, 10, 75, 50]])
    truth = {"labels": torch.zeros(2, dtype=torch.int64), "boxes": boxes, "masks": masks}
    prediction = {name: value[:1] for name, value in truth.items()} | {"scores": torch.tensor([0.9])}
    draw_detections([image], [truth], [prediction], ["nucleus"], tmp_path / "picture.png")
    picture = np.array(Image.open(tmp_path / "picture.png").convert("RGB")).astype(float)
    halves = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for half, counts in zip(halves, [(1, 1), (1, 0)], strict=True):
        for index, expected in enumerate(counts):  # objects of one class have different colours
            colour = 0.55 * 200 + 0.45 * 255 * np.array(colormaps["tab20"](index)[:3])
            area = (np.abs(half - colour).max(axis=-1) < 4).mean()
            assert (area > 0.05) == bool(expected)


def test_images_of_many_sizes_and_without_objects(tmp_path):
    sizes = [(60, 80), (30, 30), (100, 20), (64, 64), (50, 70)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    empty = objects(scores=[])
    truth = [objects([-5, -5, 200, 200], [0, 0, 1, 1]), *([objects()] * 4)]
    predictions = [*([empty] * 4), objects([60, 0, 70, 50], [0, 0, 10, 50], scores=[1.0, 0.5])]
    backend, path = matplotlib.get_backend(), tmp_path / "many.png"
    draw_detections(images, truth, predictions, NAMES, path)
    picture = Image.open(path)
    assert picture.width > 1.2 * picture.height
    assert matplotlib.get_backend() == backend


def test_predictions_alone_are_shown_once(tmp_path):
    images = [torch.full((3, 60, 80), 200, dtype=torch.uint8)] * 2
    predictions = [objects([12, 22, 38, 52], scores=[0.9]), objects([12, 22, 38, 52], scores=[0.1])]
    draw_detections(images, None, predictions, NAMES, tmp_path / "sheet.png")
    picture = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"))
    cat = pixels_of_colour(picture, 0)
    assert len(cat)
    assert (cat < picture.shape[1] / 2).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 80), (480, 640)), ((1000, 1500), (1000, 1500)), ((3000, 3900), (1538, 2000))]
)
def test_one_image_keeps_its_shape(tmp_path, size, expected):
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    height, width = size
    prediction = objects([0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height], scores=[0.9])
    draw_image(image, prediction, NAMES, tmp_path / "new" / "a.png")
    picture = np.array(Image.open(tmp_path / "new" / "a.png").convert("RGB"))
    assert picture.shape[:2] == expected
    assert (picture[[2, -3]][:, [2, -3]] == 200).all()  # no margin
    drawn = (np.abs(picture.astype(int) - 200).max(axis=-1) > 20).any(axis=0).nonzero()[0]
    assert abs(drawn.min() / expected[1] - 0.25) < 0.02
    assert abs(drawn.max() / expected[1] - 0.75) < 0.02


def test_large_images_are_reduced_before_they_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda _, pixels, **__: drawn.append(pixels.shape))
    image = torch.zeros(3, 2400, 3000, dtype=torch.uint8)
    masks = torch.zeros(1, 2400, 3000, dtype=torch.bool)
    prediction = objects([0, 0, 9, 9], scores=[0.9]) | {"masks": masks}
    draw_image(image, prediction, NAMES, tmp_path / "a.png")
    draw_detections([image], [prediction], [prediction], NAMES, tmp_path / "b.png")
    assert drawn == [(1600, 2000, 3), (480, 600, 3), (480, 600, 3)]


def test_pictures_of_slender_images_are_bounded(tmp_path):
    image = torch.zeros(3, 3000, 1, dtype=torch.uint8)
    draw_detections([image] * 2, None, [objects(scores=[])] * 2, NAMES, tmp_path / "sheet.png")
    draw_image(image, objects(scores=[]), NAMES, tmp_path / "a.png")
    for name, limit in (("sheet.png", 1200), ("a.png", 2000)):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) <= limit


def test_objects_are_scaled_with_their_image():
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 10:20, 30:60] = True
    scaled = scale_objects(objects([30, 10, 60, 20], scores=[0.9]) | {"masks": masks}, (40, 60), (20, 15))
    assert scaled["boxes"].tolist() == [[7.5, 5, 15, 10]]
    assert scaled["masks"].shape == (1, 20, 15)
    assert scaled["masks"][0, 5:10, 8:].all()
    assert scaled["masks"].sum() == 5 * 7
    assert scaled["scores"].tolist() == pytest.approx([0.9])


def test_names_are_drawn_as_they_are_and_cut(tmp_path, monkeypatch):
    texts = []
    draw = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **kw: texts.append(s) or draw(self, x, y, s, **kw))
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    names = [r"$\frac$", "y" * 10_000]  # the first is no formula that matplotlib can set
    draw_image(image, objects([0, 0, 9, 9], [20, 20, 40, 40], scores=[0.9, 0.8]), names, tmp_path / "a.png")
    assert sorted(texts) == [r"$\frac$ 0.90", "y" * 40 + " 0.80"]


def test_lengths_must_agree(tmp_path):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least one; got 0, 0 and 0"):
        draw_detections([], [], [], NAMES, tmp_path / "x.png")
    with pytest.raises(ValueError, match="got 1, 1 and 0"):
        draw_detections([image], [objects()], [], NAMES, tmp_path / "x.png")


def test_a_frame_keeps_its_size_and_shows_every_detection():
    image = torch.full((3, 120, 200), 200, dtype=torch.uint8)
    found = objects([10, 40, 60, 100], [90, 50, 190, 110], [5, 5, 5, 9], scores=[0.9, 0.1, 0.8])
    before = image.clone()
    picture = draw_frame(image, found, NAMES[:2])
    assert picture.shape == image.shape
    assert picture.dtype == torch.uint8
    assert torch.equal(image, before)
    shown = picture.permute(1, 2, 0).numpy()
    cat, dog = (pixels_of_colour(shown, label) for label in range(2))
    assert (cat.min(), cat.max()) == pytest.approx((10, 75), abs=16)  # with the name, beside a narrow box
    assert (dog.min(), dog.max()) == pytest.approx((90, 190), abs=2)
    assert len(pixels_of_colour(shown, 2)) == 0, "a box without a width"
    nothing = objects(scores=[])
    assert torch.equal(draw_frame(image, nothing, NAMES), image)


def test_masks_of_a_frame():
    image = torch.full((3, 64, 96), 200, dtype=torch.uint8)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 30:50, 10:30], masks[1, 30:50, 60:80] = True, True
    found = {**objects([10, 30, 30, 50], [60, 30, 80, 50], scores=[0.5, 0.9]), "masks": masks}
    picture = draw_frame(image, found, NAMES)
    changed = (picture != image).any(0)
    assert changed[masks[0]].all()
    assert changed[masks[1]].all()
    assert not changed[56:].any()
