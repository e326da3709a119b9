import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from groupdetr_fast.boxes import cxcywh_to_xyxy
from groupdetr_fast.data import (
    AugmentationConfig,
    CocoDataset,
    DataError,
    EpochSampler,
    collate,
    eval_transforms,
    train_transforms,
)
from groupdetr_fast.data.images import as_rgb

SMALL = AugmentationConfig(
    short_sides=(32, 40, 48),
    max_size=70,
    crop_short_sides=(40, 50),
    crop_min=24,
    crop_max=40,
    eval_short_side=40,
    eval_max_size=64,
)


def test_samples_hold_normalised_boxes_and_contiguous_labels(content, write):
    dataset = CocoDataset(*write(content))
    assert len(dataset) == 4
    assert dataset.image_ids == [7, 5, 9, 2]
    assert [category["name"] for category in dataset.categories] == ["car", "cat", "toothbrush"]
    assert dataset.num_classes == 3
    image, target = dataset[0]
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.uint8
    assert target["labels"].tolist() == [2, 0]
    expected = torch.tensor([[20 / 60, 20 / 40, 20 / 60, 30 / 40], [2.5 / 60, 4 / 40, 3 / 60, 4 / 40]])
    torch.testing.assert_close(target["boxes"], expected)
    assert target["image_id"] == 7
    assert target["original_size"].tolist() == [40, 60]
    assert type(image) is type(target["boxes"]) is type(target["labels"]) is torch.Tensor


def test_pixels_are_those_of_the_file(content, write):
    folder, path = write(content)
    image, _ = CocoDataset(folder, path)[1]
    expected = np.array(Image.open(folder / "sub" / "5.png"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def turn(path, orientation):
    """Store an image so that its EXIF orientation makes what it shows."""
    with Image.open(path) as upright:
        stored = upright.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation])
        exif = stored.getexif()
        exif[0x0112] = orientation
        stored.save(path, exif=exif)


@pytest.mark.parametrize("orientation", [3, 6])
def test_photos_that_are_stored_turned_are_seen_upright(content, write, orientation):
    folder, path = write(content)
    upright, target = CocoDataset(folder, path)[0]
    turn(folder / "sub" / "7.png", orientation)
    dataset = CocoDataset(folder, path)
    assert torch.equal(dataset[0][0], upright)
    assert torch.equal(dataset[0][1]["boxes"], target["boxes"])
    assert torch.equal(dataset.image(0), as_rgb(folder / "sub" / "7.png"))  # as prediction reads it


def test_annotations_of_the_stored_pixels_are_called_that(content, write):
    folder, path = write(content)
    with Image.open(folder / "sub" / "7.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "sub" / "7.png", exif=exif)
    message = (
        r"7\.png .* is 40 x 60 pixels, but .*json says 60 x 40, which fits the pixels as they are stored: .*upright"
    )
    with pytest.raises(DataError, match=message):
        CocoDataset(folder, path)[0]


def test_labels_can_be_category_ids(content, write):
    dataset = CocoDataset(*write(content), labels="category_id")
    assert dataset.num_classes == len(dataset.class_names) == 91
    assert dataset.class_names[3] == dataset.categories[0]["name"]
    assert dataset[0][1]["labels"].tolist() == [90, 3]
    assert dataset.label_to_category_id(90) == 90
    assert dataset.label_to_category_id(torch.tensor([[3], [17]])).tolist() == [[3], [17]]


def test_labels_map_back_to_category_ids(content, write):
    dataset = CocoDataset(*write(content))
    assert [dataset.label_to_category_id(label) for label in range(3)] == [3, 17, 90]
    assert dataset.label_to_category_id(torch.tensor([2, 0])).tolist() == [90, 3]
    assert dataset.category_ids.tolist() == [3, 17, 90]
    assert dataset.class_names == tuple(category["name"] for category in dataset.categories)


def test_unknown_label_mode_is_refused(content, write):
    with pytest.raises(ValueError, match='labels must be "contiguous" or "category_id"'):
        CocoDataset(*write(content), labels="names")


def test_crowds_are_no_targets(content, write):
    dataset = CocoDataset(*write(content))
    assert len(dataset[1][1]["labels"]) == 1
    assert dataset[1][1]["labels"].tolist() == [0]
    assert dataset[3][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("transforms", [None, train_transforms(SMALL), eval_transforms(SMALL)])
def test_images_without_objects(content, write, transforms):
    dataset = CocoDataset(*write(content), transforms)
    for epoch in range(6):
        image, target = dataset[epoch, 2]
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert (image.dtype, target["boxes"].dtype) == (torch.uint8, torch.float32)
    assert collate([dataset[2], dataset[3]]).targets.sizes == (0, 0)


def test_boxes_are_clipped_to_the_image(content, write, caplog):
    content["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [-10, 30, 25, 50]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [50, -5.5, 30, 10]},
    ]
    dataset = CocoDataset(*write(content))
    assert dataset.ground_truth(0)["boxes"].tolist() == [[0, 30, 15, 40], [50, 0, 60, 4.5]]
    assert caplog.text == ""


def test_degenerate_boxes_are_dropped_with_one_warning(content, write, caplog):
    bad = [
        [5, 5, 0, 10],
        [5, 5, 10, 0],
        [5, 5, -4, 10],
        [60, 5, 10, 10],
        [-20, 5, 20, 10],
        [float("nan"), 5, 10, 10],
        [5, 5, float("inf"), 10],
    ]
    content["annotations"] += [
        {"id": 100 + index, "image_id": 7, "category_id": 3, "bbox": box} for index, box in enumerate(bad)
    ]
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(*write(content))
    assert dataset.ground_truth(0)["boxes"].tolist() == [[10, 5, 30, 35], [1, 2, 4, 6]]
    assert len(caplog.records) == 1
    assert "dropped 7 of 10 boxes" in caplog.text
    assert "annotation ids 100, 101, 102, 103, 104, ..." in caplog.text
    assert "instances.json" in caplog.text


def remove(table, key):
    def change(content):
        del content[table][0][key]

    return change


def put(table, key, value):
    def change(content):
        content[table][0][key] = value

    return change


CONTENT_ERRORS = {
    "no images": (lambda c: c.pop("images"), r'instances\.json lacks the key "images"'),
    "no annotations": (lambda c: c.pop("annotations"), r'instances\.json lacks the key "annotations"'),
    "no categories": (lambda c: c.pop("categories"), r'instances\.json lacks the key "categories"'),
    "empty images": (lambda c: c["images"].clear(), r'"images" is empty; give a file with at least one'),
    "empty categories": (lambda c: c["categories"].clear(), r'"categories" is empty'),
    "no list": (lambda c: c.update(images={}), r'"images" must be a list of objects'),
    "no objects": (lambda c: c.update(annotations=[3]), r'"annotations" must be a list of objects'),
    "image without id": (remove("images", "id"), r'images\[0\] lacks the key "id"'),
    "image without file name": (remove("images", "file_name"), r'images\[0\] lacks the key "file_name"'),
    "image without width": (remove("images", "width"), r'images\[0\] lacks the key "width"'),
    "annotation without id": (remove("annotations", "id"), r'annotations\[0\] lacks the key "id"'),
    "annotation without image": (remove("annotations", "image_id"), r'annotations\[0\] lacks the key "image_id"'),
    "annotation without box": (remove("annotations", "bbox"), r'annotations\[0\] lacks the key "bbox"'),
    "category without name": (remove("categories", "name"), r'categories\[0\] lacks the key "name"'),
    "duplicate image": (put("images", "id", 5), r'id 5 occurs twice in "images"'),
    "duplicate annotation": (put("annotations", "id", 13), r'id 13 occurs twice in "annotations"'),
    "duplicate category": (put("categories", "id", 17), r'id 17 occurs twice in "categories"'),
    "text id": (put("images", "id", "7"), r"images\[0\]: \"id\" must be an integer, got '7'"),
    "text image id": (put("annotations", "image_id", "5"), r"annotation 11: \"image_id\" must be an integer, got '5'"),
    "unknown image": (put("annotations", "image_id", 6), r'annotation 11 has image_id 6, which is not in "images"'),
    "unknown category": (
        put("annotations", "category_id", 4),
        r'annotation 11 has category_id 4, which is not in "categories"; add the entry or remove the annotation',
    ),
    "short box": (put("annotations", "bbox", [1, 2, 3]), r"annotation 11 has the bbox \[1, 2, 3\]; it must be four"),
    "endless box": (put("annotations", "bbox", [1, 2, 10**400, 4]), r"annotation 11 has the bbox \[1, 2, 1000"),
    "endless area": (put("annotations", "area", 10**400), r"annotation 11 has the area 1000.*; it must be a number"),
    "null box": (put("annotations", "bbox", None), r"annotation 11 has the bbox None"),
    "text box": (put("annotations", "bbox", ["1", "2", "3", "4"]), r"annotation 11 has the bbox \['1'"),
    "zero width": (put("images", "width", 0), r"image 7 has the size 0 x 40"),
    "text width": (put("images", "width", "60"), r"image 7: \"width\" must be an integer, got '60'"),
    "parent folder": (put("images", "file_name", "../7.png"), r"image 7 has the file name '../7.png'; it must be"),
    "hidden parent folder": (put("images", "file_name", "a/../../7.png"), r"a path inside the image folder"),
    "windows parent folder": (put("images", "file_name", "..\\7.png"), r"a path inside the image folder"),
    "absolute": (put("images", "file_name", "/etc/passwd"), r"image 7 has the file name '/etc/passwd'"),
    "drive": (put("images", "file_name", "C:\\7.png"), r"a path inside the image folder"),
    "empty file name": (put("images", "file_name", ""), r"image 7 has the file name ''"),
    "number as file name": (put("images", "file_name", 7), r"image 7 has the file name 7"),
}


def assert_one_sentence(error):
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(("change", "message"), CONTENT_ERRORS.values(), ids=CONTENT_ERRORS)
def test_faulty_annotation_files(content, write, change, message):
    change(content)
    with pytest.raises(DataError, match=message) as error:
        CocoDataset(*write(content))
    assert "instances.json" in str(error.value)
    assert_one_sentence(error)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"images": [}', "\ud800".encode("utf-8", "surrogatepass")])
def test_annotation_file_that_is_not_json(content, write, text):
    folder, path = write(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"instances\.json is not valid json .*; export or download it again") as error:
        CocoDataset(folder, path)
    assert_one_sentence(error)


def test_annotation_file_that_is_no_object(content, write):
    with pytest.raises(DataError, match=r"instances\.json must hold a json object with the keys images, annotations"):
        CocoDataset(*write("[]"))


def test_missing_files(content, write, tmp_path):
    folder, path = write(content)
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist; give the folder that holds"):
        CocoDataset(tmp_path / "nowhere", path)
    with pytest.raises(DataError, match=r"annotation file .*none\.json does not exist; give the path of a") as error:
        CocoDataset(folder, tmp_path / "none.json")
    assert_one_sentence(error)
    with pytest.raises(DataError, match=r"annotation file .* cannot be read \(Is a directory\)") as error:
        CocoDataset(folder, folder)
    assert_one_sentence(error)


def test_negative_category_id_is_no_label(content, write):
    content["categories"][0]["id"] = -1
    content["annotations"] = []
    assert CocoDataset(*write(content)).num_classes == 3
    with pytest.raises(DataError, match=r"category id -1 cannot be a label; use labels=\"contiguous\""):
        CocoDataset(*write(content), labels="category_id")


def damage_missing(path):
    path.unlink()


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:2000])


def damage_text(path):
    path.write_text("no image")


def damage_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"image file .*7\.png \(image id 7\) does not exist; check the image folder"),
        (damage_truncated, r"image file .*7\.png \(image id 7\) cannot be read \(.*\); replace the file or"),
        (damage_text, r"image file .*7\.png \(image id 7\) cannot be read"),
        (damage_folder, r"image file .*7\.png \(image id 7\) cannot be read"),
    ],
)
def test_faulty_image_files(content, write, damage, message, workers):
    folder, path = write(content)
    damage(folder / "sub" / "7.png")
    dataset = CocoDataset(folder, path)
    with pytest.raises(DataError, match=message) as error:
        next(iter(DataLoader(dataset, num_workers=workers, collate_fn=collate)))
    assert str(error.value).startswith("image file")
    assert_one_sentence(error)
    with pytest.raises(DataError, match=message):
        CocoDataset(folder, path, cache_images=True)


def test_image_of_another_size_than_annotated(content, write):
    content["images"][0]["width"] = 61
    dataset = CocoDataset(*write(content))
    with pytest.raises(DataError, match=r"7\.png \(image id 7\) is 60 x 40 pixels, but .*instances\.json says 61 x 40"):
        dataset[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_image_mode_becomes_rgb(content, write, mode):
    folder, path = write(content)
    content["images"][0]["file_name"] = name = "7.tif"
    folder, path = write(content)
    Image.open(folder / "sub" / "7.png").convert(mode).save(folder / name)
    assert CocoDataset(folder, path).image(0).shape == (3, 40, 60)


def test_index_out_of_range(content, write):
    dataset = CocoDataset(*write(content))
    for index in (4, -1):
        with pytest.raises(IndexError, match=rf"index must be in \[0, 4\), got {index}"):
            dataset[index]
    assert len(list(dataset)) == 4


def test_cache_holds_the_decoded_images(content, write):
    folder, path = write(content)
    cached = CocoDataset(folder, path, train_transforms(SMALL), cache_images=True)
    plain = CocoDataset(folder, path, train_transforms(SMALL))
    expected = [plain[3, index] for index in range(4)]
    copy = pickle.loads(pickle.dumps(cached))
    assert_same_samples([copy[3, index] for index in range(4)], expected)
    for image_id in (7, 5, 9, 2):
        (folder / "sub" / f"{image_id}.png").unlink()
    assert_same_samples([cached[3, index] for index in range(4)], expected)


def assert_same_samples(actual, expected):
    for (image, target), (other_image, other_target) in zip(actual, expected, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["boxes"], other_target["boxes"])
        assert torch.equal(target["labels"], other_target["labels"])
        assert target["image_id"] == other_target["image_id"]


def test_augmentation_depends_on_seed_epoch_and_index_alone(content, write):
    files = write(content)
    dataset = CocoDataset(*files, train_transforms(SMALL), seed=3)
    first = [dataset[1, index] for index in range(4)]
    torch.manual_seed(99)
    assert_same_samples([dataset[1, index] for index in (3, 2, 1, 0)][::-1], first)
    other_epochs = [dataset[epoch, 0][0] for epoch in range(8)]
    assert any(image.shape != first[0][0].shape or not torch.equal(image, first[0][0]) for image in other_epochs)
    other_seed = CocoDataset(*files, train_transforms(SMALL), seed=4)
    pairs = [(dataset[epoch, 0][0], other_seed[epoch, 0][0]) for epoch in range(8)]
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in pairs)


def test_augmentation_leaves_the_global_generators_alone(content, write):
    dataset = CocoDataset(*write(content), train_transforms(SMALL))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    dataset[5, 0]
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_workers_do_not_change_the_samples(content, write):
    dataset = CocoDataset(*write(content), train_transforms(SMALL))
    sampler = EpochSampler(dataset, shuffle=True, seed=1)
    alone = DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=collate)
    helped = DataLoader(
        dataset, batch_size=3, sampler=sampler, collate_fn=collate, num_workers=2, persistent_workers=True
    )
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        one, two = list(alone), list(helped)
        assert [batch.image_ids for batch in one] == [batch.image_ids for batch in two]
        assert sorted(image_id for batch in one for image_id in batch.image_ids) == [2, 5, 7, 9]
        for first, second in zip(one, two, strict=True):
            assert torch.equal(first.images, second.images)
            assert torch.equal(first.masks, second.masks)
            assert torch.equal(first.targets.boxes, second.targets.boxes)
            assert torch.equal(first.targets.labels, second.targets.labels)
        seen.append([(batch.image_ids, batch.images.sum().item()) for batch in one])
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_real_photographs_load(shared_data, split, caplog):
    folder = shared_data("bccd")
    transforms = eval_transforms(AugmentationConfig(eval_short_side=64, eval_max_size=128))
    dataset = CocoDataset(folder / "images", folder / "annotations" / f"instances_{split}.json", transforms)
    assert len(dataset) == {"train": 205, "val": 87, "test": 72}[split]
    assert dataset.num_classes == 3
    objects = 0
    for image, target in dataset:
        assert image.shape == (3, 64, 85)
        assert image.dtype == torch.uint8
        corners = cxcywh_to_xyxy(target["boxes"])
        assert corners.min() >= -1e-6
        assert corners.max() <= 1 + 1e-6
        objects += len(target["labels"])
    assert objects == {"train": 2805, "val": 1138, "test": 945}[split]
    assert caplog.text == ""


def test_real_coco_subset_with_crowds_loads(shared_data):
    folder = shared_data("coco_cc")
    dataset = CocoDataset(folder / "images", folder / "annotations" / "instances_train.json", labels="category_id")
    assert dataset.num_classes == 91
    crowds = sum(entry["iscrowd"] for entry in json.loads(dataset.annotation_file.read_text())["annotations"])
    assert sum(len(dataset.ground_truth(index)["labels"]) for index in range(30)) == 206 - crowds
    assert all(dataset[index][0].ndim == 3 for index in range(30))
