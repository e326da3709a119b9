"""Masks from COCO's segmentations, judged by pycocotools, and their way through a data set."""

import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO

from groupdetr_fast.boxes import cxcywh_to_xyxy
from groupdetr_fast.data import AugmentationConfig, CocoDataset, DataError, collate, eval_transforms, train_transforms
from groupdetr_fast.data.segmentations import Segmentations, parse_segmentation


def rectangle(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def blob(height, width, rng):
    """A mask of a few overlapping rectangles."""
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    for _ in range(3):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = 1
    return mask


def run_lengths(mask):
    """Uncompressed counts, as COCO's crowd regions have them."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def compressed(mask):
    encoded = rle.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def test_every_form_of_a_segmentation_gives_its_mask():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = rng.integers(1, 60, size=2).tolist()
        mask = blob(height, width, rng)
        forms = [run_lengths(mask), compressed(mask)]
        parsed = [parse_segmentation(form, height, width) for form in forms]
        decoded = Segmentations.pack(parsed).masks(0, 2, height, width).numpy()
        np.testing.assert_array_equal(decoded[0], mask)
        np.testing.assert_array_equal(decoded[1], mask)


def test_polygons_are_rasterised_as_pycocotools_does():
    polygons = [[rectangle(2.3, 4.1, 10, 12.5)], [rectangle(0, 0, 5, 5), rectangle(20.5, 8, 9, 3), [1, 2, 3, 4]]]
    parsed = [parse_segmentation(value, 30, 40) for value in polygons]
    masks = Segmentations.pack([parsed[0], compress_all(40, 30), parsed[1]]).masks(0, 3, 30, 40).numpy()
    for mask, value in zip(masks[[0, 2]], polygons, strict=True):
        expected = rle.decode(rle.merge(rle.frPyObjects(value[:2], 30, 40)))
        np.testing.assert_array_equal(mask, expected)
    assert masks[1].all()


def compress_all(width, height):
    return parse_segmentation(run_lengths(np.ones((height, width), dtype=np.uint8, order="F")), height, width)


@pytest.mark.parametrize("value", [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[0, 0, 9, 0, float("nan"), 9]]])
def test_nothing_is_left_of_degenerate_polygons(value):
    assert parse_segmentation(value, 20, 20) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("polygon", "must be a list of polygons or an object"),
        ([[0, 0, "x", 1, 2, 2]], "has a polygon that is no list of numbers"),
        ([5, 6, 7], "has a polygon that is no list of numbers"),
        ({"size": [20, 21], "counts": [420]}, r"has the size \[20, 21\], but the image is \[20, 20\]"),
        ({"size": [20, 20]}, "has counts that are neither"),
        ({"size": [20, 20], "counts": [-1, 401]}, "has counts that are neither"),
        ({"size": [20, 20], "counts": [100, 200]}, "has counts whose sum is 300, but the image has 400 pixels"),
        ({"size": [20, 20], "counts": "o9999zzzz"}, "has counts"),
        ({"size": [20, 20], "counts": ""}, "has counts whose sum is 0"),
    ],
)
def test_what_cannot_be_understood_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_segmentation(value, 20, 20)


@pytest.fixture
def with_masks(content, write):
    """The files of conftest.py with segmentations: image 7 has a polygon and run lengths, 5 a polygon and a crowd."""
    for entry in content["annotations"]:
        entry["segmentation"] = [rectangle(*entry["bbox"])]
    by_id = {entry["id"]: entry for entry in content["annotations"]}
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    mask[2:6, 1:4] = 1
    by_id[14]["segmentation"] = compressed(mask)
    crowd = np.zeros((48, 48), dtype=np.uint8, order="F")
    crowd[:24] = 1
    by_id[11]["segmentation"] = run_lengths(crowd)
    return content, lambda: write(content)


def test_samples_hold_the_masks_of_their_objects(with_masks):
    dataset = CocoDataset(*with_masks[1](), masks=True)
    for index, size in enumerate([(40, 60), (48, 48), (64, 32), (30, 50)]):
        _, target = dataset[index]
        assert target["masks"].shape == (len(target["labels"]), *size)
        assert target["masks"].dtype == torch.bool
        assert type(target["masks"]) is torch.Tensor
    _, target = dataset[0]
    assert target["labels"].tolist() == [2, 0]
    assert target["masks"][1].nonzero().unique(dim=0).tolist() == [[y, x] for y in range(2, 6) for x in range(1, 4)]
    assert target["masks"][0].sum() == 20 * 30
    assert "masks" not in CocoDataset(*with_masks[1]())[0][1]


def test_the_annotation_file_is_packed_for_the_workers(with_masks):
    dataset = CocoDataset(*with_masks[1](), masks=True)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0][1]["masks"], dataset[0][1]["masks"])


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(short_sides=(40, 60), max_size=90, crop_short_sides=(50,), crop_min=20, crop_max=40),
        AugmentationConfig(jitter_size=48, jitter_scale=(0.2, 2.0)),
    ],
)
def test_masks_follow_the_image(with_masks, config):
    """Each mask lies in its box and touches, up to a pixel, those sides of it that the image does not cut off."""
    dataset = CocoDataset(*with_masks[1](), train_transforms(config), masks=True)
    seen = 0
    for epoch in range(20):
        image, target = dataset[epoch, 0]
        height, width = image.shape[1:]
        assert target["masks"].shape == (len(target["labels"]), height, width)
        corners = cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        for mask, box in zip(target["masks"], corners, strict=True):
            y, x = mask.nonzero(as_tuple=True)
            assert len(x)
            around = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1))
            assert (around - box).abs().max() < 2.5
            seen += 1
    assert seen > 15


def test_objects_without_a_visible_pixel_are_dropped(with_masks):
    content, write = with_masks
    content["annotations"][1]["segmentation"] = [rectangle(10, 5, 20, 0.01)]  # a box, but no pixel
    _, target = CocoDataset(*write(), masks=True)[0]
    assert target["labels"].tolist() == [0]
    assert len(target["boxes"]) == len(target["masks"]) == 1


def test_objects_without_a_segmentation_are_dropped_with_one_warning(with_masks, caplog):
    content, write = with_masks
    del content["annotations"][1]["segmentation"]
    content["annotations"][2]["segmentation"] = []
    dataset = CocoDataset(*write(), masks=True)
    assert sum(len(dataset[index][1]["labels"]) for index in range(4)) == 1
    assert caplog.text.count("WARNING") == 1
    assert "dropped 2 of 3 objects without a usable segmentation (annotation ids 12, 13)" in caplog.text


def test_a_file_without_segmentations_is_refused(content, write):
    with pytest.raises(DataError, match="has no segmentations; give a file with polygons or run lengths"):
        CocoDataset(*write(content), masks=True)


def test_faults_name_the_annotation(with_masks):
    content, write = with_masks
    content["annotations"][3]["segmentation"]["size"] = [60, 40]
    with pytest.raises(DataError, match=r"annotation 14: the segmentation has the size \[60, 40\], but the image is"):
        CocoDataset(*write(), masks=True)
    assert len(CocoDataset(*write())) == 4  # without masks, nobody looks at it


def test_batches_hold_masks_of_several_sizes(with_masks):
    dataset = CocoDataset(*with_masks[1](), masks=True)
    batch = collate([dataset[index] for index in range(3)], min_size=50)
    assert batch.images.shape == (3, 3, 64, 60)
    assert [mask.shape for mask in batch.targets.masks] == [(2, 40, 60), (1, 48, 48), (0, 64, 32)]


def test_jitter_gives_batches_of_one_size(with_masks):
    config = AugmentationConfig(jitter_size=32, jitter_scale=(0.5, 2.0))
    dataset = CocoDataset(*with_masks[1](), train_transforms(config), masks=True)
    shapes = set()
    for epoch in range(10):
        samples = [dataset[epoch, index] for index in range(4)]
        shapes |= {tuple(image.shape[1:]) for image, _ in samples}
        assert collate(samples, min_size=32).images.shape == (4, 3, 32, 32)
    assert len(shapes) > 5
    assert max(max(shape) for shape in shapes) == 32


@pytest.mark.parametrize(("name", "split"), [("coco_cc", "train"), ("coco_cc", "val"), ("nuclei", "train")])
def test_masks_of_real_data_are_those_of_pycocotools(shared_data, name, split, capsys):
    folder = shared_data(name)
    path = folder / "annotations" / f"instances_{split}.json"
    dataset, coco = CocoDataset(folder / "images", path, masks=True), COCO(path)
    for index, image_id in enumerate(dataset.image_ids):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
        masks = dataset.ground_truth(index)["masks"]
        assert len(masks) == len(annotations)
        for mask, annotation in zip(masks, annotations, strict=True):
            np.testing.assert_array_equal(mask.numpy(), coco.annToMask(annotation))


def test_real_crowds_decode(shared_data):
    """They are no targets, but the metric needs them: COCO writes them as uncompressed run lengths."""
    folder = shared_data("coco_cc")
    dataset = CocoDataset(folder / "images", folder / "annotations" / "instances_val.json", masks=True)
    coco = COCO(dataset.annotation_file)
    crowds = coco.loadAnns(coco.getAnnIds(iscrowd=True))
    assert crowds
    for crowd in crowds:
        height, width = crowd["segmentation"]["size"]
        parsed = parse_segmentation(crowd["segmentation"], height, width)
        mask = Segmentations.pack([parsed]).masks(0, 1, height, width)[0]
        np.testing.assert_array_equal(mask.numpy(), coco.annToMask(crowd))
        assert mask.any()


def test_evaluation_resizes_masks(with_masks):
    transforms = eval_transforms(AugmentationConfig(eval_short_side=80, eval_max_size=None))
    _, target = CocoDataset(*with_masks[1](), transforms, masks=True)[0]
    assert target["masks"].shape == (2, 80, 120)
    assert target["masks"][0].sum() == 4 * 20 * 30
