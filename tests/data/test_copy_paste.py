"""Objects of one image in another: pixels, masks and boxes."""

import json

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from groupdetr_fast.boxes import cxcywh_to_xyxy
from groupdetr_fast.data import AugmentationConfig, CocoDataset, DataError, SkipUnreadable, train_transforms
from groupdetr_fast.data import copy_paste as module
from groupdetr_fast.data.copy_paste import CopyPaste

SQUARE = AugmentationConfig(jitter_size=128, jitter_scale=(0.5, 1.5), copy_paste=1.0)
PLAIN = AugmentationConfig(short_sides=(96, 128), max_size=200, crop=0.0, copy_paste=1.0)


def scene(colour, size, *rectangles):
    """A picture of one colour, whose objects are rectangles (x1, y1, x2, y2) with masks."""
    boxes = torch.tensor(rectangles).float().reshape(-1, 4)
    masks = torch.zeros(len(rectangles), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, rectangles, strict=True):
        mask[y1:y2, x1:x2] = 1
    objects = {
        "labels": torch.arange(len(rectangles)) + colour,
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "masks": tv_tensors.Mask(masks),
    }
    return tv_tensors.Image(torch.full((3, *size), colour, dtype=torch.uint8)), objects


@pytest.fixture
def all_at_the_corner(monkeypatch):
    """Everything is pasted, where it is in its own image."""
    monkeypatch.setattr(module, "CHANCE", 1.0)
    monkeypatch.setattr(module, "_offset", lambda size, other: 0)


@pytest.mark.parametrize("its_size", [(20, 30), (40, 20), (12, 14)])
def test_pixels_masks_and_boxes_follow(all_at_the_corner, its_size):
    image, objects = scene(10, (20, 30), (2, 2, 12, 6), (4, 3, 8, 5), (20, 10, 28, 18), (0, 0, 30, 20))
    before = image.clone()
    result, found = CopyPaste(1.0)(image, objects, *scene(70, its_size, (3, 0, 9, 9)))
    assert torch.equal(image, before)
    pasted = torch.zeros(20, 30, dtype=torch.bool)
    pasted[0:9, 3:9] = True
    assert torch.equal(result, torch.where(pasted, 70, 10).to(torch.uint8).expand(3, -1, -1))
    # the second is hidden, of the first and the last something is left, the third is as it was
    assert found["labels"].tolist() == [10, 12, 13, 70]
    assert found["boxes"].tolist() == [[2, 2, 12, 6], [20, 10, 28, 18], [0, 0, 30, 20], [3, 0, 9, 9]]
    assert isinstance(found["boxes"], tv_tensors.BoundingBoxes)
    assert tuple(found["boxes"].canvas_size) == (20, 30)
    for row, index in enumerate((0, 2, 3)):
        assert torch.equal(found["masks"][row].bool(), objects["masks"][index].bool() & ~pasted)
    assert torch.equal(found["masks"][3].bool(), pasted)
    assert found["masks"].dtype == torch.uint8


def test_boxes_of_covered_objects_shrink_and_slivers_are_dropped(all_at_the_corner):
    image, objects = scene(0, (20, 20), (5, 5, 15, 15), (0, 0, 11, 4))
    _, found = CopyPaste(1.0)(image, objects, *scene(9, (20, 20), (0, 0, 10, 20)))
    # of 44 pixels 4 are left, less than a tenth
    assert found["boxes"].tolist() == [[10, 5, 15, 15], [0, 0, 10, 20]]


def test_a_larger_image_is_cut_and_what_lies_outside_is_not_pasted(all_at_the_corner):
    image, objects = scene(0, (10, 10))
    _, found = CopyPaste(1.0)(image, objects, *scene(5, (30, 30), (8, 8, 20, 20), (15, 2, 20, 5)))
    assert found["labels"].tolist() == [5]
    assert found["boxes"].tolist() == [[8, 8, 10, 10]]
    assert found["masks"].sum() == 4


def test_places_are_everywhere_and_inside():
    torch.manual_seed(1)
    image, objects = scene(0, (12, 40))
    corners = set()
    for _ in range(200):
        result, found = CopyPaste(1.0)(image, objects, *scene(200, (30, 20), (0, 0, 20, 30)))
        (box,) = found["boxes"].tolist()
        assert box == masks_to_boxes(found["masks"]).add(torch.tensor([0, 0, 1, 1]))[0].tolist()
        assert (result[0] == 200).sum() == 20 * 12
        corners.add(box[0])
    assert corners == set(range(21))


def test_small_objects_are_preferred_if_asked_for():
    image, objects = scene(0, (300, 300))
    source = scene(1, (300, 300), (0, 0, 10, 10), (20, 20, 70, 70), (100, 100, 250, 250))
    for prefer, expected in ((False, [0.5, 0.5, 0.5]), (True, [1.0, 0.5, 0.0])):
        paste = CopyPaste(1.0, prefer_small=prefer)
        rows = [paste(image, objects, *source)[1]["labels"].tolist() for _ in range(300)]
        assert min(map(len, rows)) == 1
        shares = [sum(label in row for row in rows) / len(rows) for label in (1, 2, 3)]
        assert shares == pytest.approx(expected, abs=0.12)  # a little more where one at least is pasted


@pytest.fixture
def nuclei(shared_data):
    folder = shared_data("nuclei")
    return folder / "images", folder / "annotations" / "instances_train.json"


@pytest.mark.parametrize("config", [SQUARE, PLAIN])
def test_samples_of_nuclei_fit_together(nuclei, config):
    """Real masks as run lengths: what a sample holds is what one sees in it."""
    dataset = CocoDataset(*nuclei, train_transforms(config), masks=True, copy_paste=CopyPaste(1.0))
    without = CocoDataset(*nuclei, train_transforms(config), masks=True)
    assert dataset._annotations.segmentations.counts.nbytes == without._annotations.segmentations.counts.nbytes
    more = 0
    for index in range(12):
        image, target = dataset[index]
        masks, size = target["masks"], image.shape[1:]
        boxes = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([size[1], size[0], size[1], size[0]])
        assert image.dtype == torch.uint8
        assert masks.shape == (len(boxes), *size)
        assert masks.flatten(1).any(1).all()
        assert (target["boxes"] >= 0).all()
        assert (boxes <= torch.tensor([size[1], size[0], size[1], size[0]]) + 1e-3).all()
        tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        # Boxes of objects that nothing covers are the annotated ones, which rounding and the resize move a little.
        inside = (boxes[:, :2] <= tight[:, :2] + 2) & (boxes[:, 2:] >= tight[:, 2:] - 2)
        assert inside.all()
        more += len(boxes) - len(without[index][1]["labels"])
    assert more > 50


def test_samples_do_not_depend_on_who_asks(nuclei):
    config = AugmentationConfig(jitter_size=64, copy_paste=0.5)
    first, second = (
        CocoDataset(*nuclei, train_transforms(config), masks=True, copy_paste=CopyPaste(0.5), cache_images=cache)
        for cache in (False, True)
    )
    cached = [second.image(index).clone() for index in range(4)]
    for key in [(0, 0), (3, 2), (0, 1), (3, 2)]:
        (image, target), (other, expected) = first[key], second[key]
        torch.rand(3)
        assert torch.equal(image, other)
        assert torch.equal(target["masks"], expected["masks"])
    assert all(torch.equal(image, second.image(index)) for index, image in enumerate(cached))


def test_detectors_of_boxes_get_boxes_alone(nuclei):
    paste = CopyPaste(1.0)
    masks = CocoDataset(*nuclei, train_transforms(SQUARE), masks=True, copy_paste=paste)
    boxes = CocoDataset(*nuclei, train_transforms(SQUARE), copy_paste=paste)
    for index in range(3):
        (image, target), (other, expected) = boxes[index], masks[index]
        assert "masks" not in target
        assert torch.equal(image, other)
        visible = expected["labels"].shape[0]
        assert visible <= len(target["labels"])  # an object without a pixel is no target for a mask
        assert {tuple(box) for box in expected["boxes"].tolist()} <= {tuple(box) for box in target["boxes"].tolist()}
    assert "masks" not in boxes.ground_truth(0)


def test_masks_are_decoded_where_something_is_pasted_alone(nuclei, monkeypatch):
    dataset = CocoDataset(*nuclei, train_transforms(PLAIN), copy_paste=CopyPaste(0.3))
    asked = []
    original = type(dataset).upright
    monkeypatch.setattr(
        type(dataset),
        "upright",
        lambda self, index, *, masks: asked.append(masks) or original(self, index, masks=masks),
    )
    for index in range(20):
        dataset[index]
    assert 0 < asked.count(True) < 20
    assert asked.count(True) % 2 == 0


def test_objects_without_a_mask_are_not_lost_to_a_detector_of_boxes(nuclei, tmp_path):
    content = json.loads(nuclei[1].read_text())
    del content["annotations"][3]["segmentation"]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"some.json: copy_paste needs the mask of every object, but dropped 1 of .*: give"
    ):
        CocoDataset(nuclei[0], path, train_transforms(PLAIN), copy_paste=CopyPaste(0.5))
    with pytest.raises(ValueError, match="copy_paste pastes into images that are transformed"):
        CocoDataset(*nuclei, copy_paste=CopyPaste(0.5))


def test_an_unreadable_source_does_not_count_against_the_image(nuclei, tmp_path):
    content = json.loads(nuclei[1].read_text())
    content["images"] = content["images"][:2]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    for image in content["images"]:
        (tmp_path / image["file_name"]).write_bytes((nuclei[0] / image["file_name"]).read_bytes())
    (tmp_path / content["images"][1]["file_name"]).write_bytes(b"damaged")
    path = tmp_path / "two.json"
    path.write_text(json.dumps(content))
    dataset = SkipUnreadable(
        CocoDataset(tmp_path, path, train_transforms(PLAIN), masks=True, copy_paste=CopyPaste(1.0)), limit=1
    )
    numbers = {len(dataset[epoch, 0][1]["labels"]) for epoch in range(8)}
    assert dataset.unreadable == []
    assert len(numbers) > 1  # its own objects are pasted, too


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copy_paste": 1.5}, r"copy_paste must be a probability in \[0, 1\], got 1.5"),
        ({"copy_paste_prefer_small": True}, "copy_paste_prefer_small chooses what copy_paste pastes: give copy_paste"),
    ],
)
def test_wrong_settings_of_pasting_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**settings)
