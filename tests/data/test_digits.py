import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from groupdetr_fast.data import CocoDataset, DigitsConfig, digits, digits_dataset

CONFIG = DigitsConfig(image_size=64, train_images=30, val_images=12, min_digit=14, max_digit=36, seed=3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=CONFIG)


def contents(paths):
    root = paths.train_images.parent
    return {file.relative_to(root): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_the_same_config_gives_the_same_bytes(paths, tmp_path):
    again = digits_dataset(tmp_path, config=CONFIG)
    assert again.train_images.parent.name == paths.train_images.parent.name
    assert contents(again) == contents(paths)
    assert len(contents(again)) == 30 + 12 + 2


def test_another_seed_gives_another_set(paths, tmp_path):
    other = digits_dataset(tmp_path, config=DigitsConfig(**{**CONFIG.__dict__, "seed": 4}))
    assert other.train_images.parent.name != paths.train_images.parent.name
    assert contents(other) != contents(paths)


def test_a_larger_set_begins_with_the_smaller(paths, tmp_path):
    larger = digits_dataset(tmp_path, config=DigitsConfig(**{**CONFIG.__dict__, "train_images": 32}))
    for name in ("000001.png", "000030.png"):
        assert (larger.train_images / name).read_bytes() == (paths.train_images / name).read_bytes()


def test_training_and_validation_show_different_digits(paths):
    train, val = (
        {annotation["digit"] for annotation in json.loads(path.read_text())["annotations"]}
        for path in (paths.train_annotations, paths.val_annotations)
    )
    assert train
    assert val
    assert not train & val


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_valid_coco(paths, split, capsys, caplog):
    images = getattr(paths, f"{split}_images")
    annotations = getattr(paths, f"{split}_annotations")
    coco = COCO(str(annotations))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [str(digit) for digit in range(10)]
    dataset = CocoDataset(images, annotations)
    assert len(dataset) == {"train": 30, "val": 12}[split]
    assert caplog.text == ""
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert image.shape == (3, 64, 64)
        assert 1 <= len(target["labels"]) <= 6
        assert target["labels"].max() < 10
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0
        assert x + width <= 64
        assert y + height <= 64
        assert annotation["area"] == width * height


def test_boxes_are_tight_to_the_visible_ink(monkeypatch):
    """The same scenes on an even ground, in colours that identify a digit, so that its ink can be read off."""
    painted = []

    def paint(rng, window, cover):
        painted.append(len(painted) + 1)
        window[...] = np.where(cover > 0.5, np.float32(painted[-1] * 20 / 255), window)

    monkeypatch.setattr(digits, "_paint", paint)
    monkeypatch.setattr(digits, "_background", lambda rng, size: np.zeros((size, size, 3), dtype=np.float32))
    glyphs, _ = digits._glyphs()
    overlaps = 0
    for seed in range(40):
        painted.clear()
        pixels, objects = digits._scene(np.random.default_rng(seed), CONFIG, glyphs, np.arange(100))
        assert len(objects) == len(painted) >= 1
        boxes = []
        for number, (_, (x, y, width, height)) in enumerate(objects, start=1):
            rows, columns = (pixels[..., 0] == number * 20).nonzero()
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
            boxes.append((x, y, x + width, y + height))
        for index, first in enumerate(boxes):
            for second in boxes[:index]:
                overlap_x = min(first[2], second[2]) - max(first[0], second[0])
                overlap_y = min(first[3], second[3]) - max(first[1], second[1])
                overlaps += overlap_x > 0 and overlap_y > 0
    assert overlaps > 5


def test_digits_stand_out_from_their_ground(paths):
    """Inside its box a digit differs from the box's border in brightness, and images are not flat."""
    content = json.loads(paths.train_annotations.read_text())
    for annotation in content["annotations"]:
        image = np.array(Image.open(paths.train_images / f"{annotation['image_id']:06d}.png").convert("L"), dtype=float)
        x, y, width, height = annotation["bbox"]
        assert np.ptp(image[y : y + height, x : x + width]) > 0.12 * 255
    assert {annotation["category_id"] for annotation in content["annotations"]} == set(range(1, 11))


def test_a_finished_set_is_reused(tmp_path, monkeypatch):
    config = DigitsConfig(image_size=40, train_images=2, val_images=1, min_digit=10, max_digit=20)
    first = digits_dataset(tmp_path, config=config)
    monkeypatch.setattr(digits, "_write", lambda *_: pytest.fail("the set was composed again"))
    assert digits_dataset(tmp_path, config=config) == first


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    config = DigitsConfig(image_size=40, train_images=4, val_images=1, min_digit=10, max_digit=20)
    scene, calls = digits._scene, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scene(*arguments)

    monkeypatch.setattr(digits, "_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_dataset(tmp_path, config=config)
    assert list(tmp_path.iterdir()) == []
    paths = digits_dataset(tmp_path, config=config)
    assert len(CocoDataset(paths.train_images, paths.train_annotations, cache_images=True)) == 4


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    config = DigitsConfig(image_size=40, train_images=2, val_images=1, min_digit=10, max_digit=20)
    write = digits._write

    def overtaken(folder, config):
        monkeypatch.setattr(digits, "_write", write)
        digits_dataset(tmp_path, config=config)
        write(folder, config)

    monkeypatch.setattr(digits, "_write", overtaken)
    paths = digits_dataset(tmp_path, config=config)
    assert [entry.name for entry in tmp_path.iterdir()] == [paths.train_images.parent.name]
    assert len(list(paths.train_images.iterdir())) == 2


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    config = DigitsConfig(image_size=40, train_images=1, val_images=1, min_digit=10, max_digit=20)
    monkeypatch.delenv("GROUPDETR_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert digits_dataset(config=config).train_images.parents[1] == tmp_path / "xdg" / "groupdetr_fast"
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "own"))
    assert digits_dataset(config=config).train_images.parents[1] == tmp_path / "own"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"min_digit": 4}, "need 8 <= min_digit"),
        ({"max_digit": 90}, "need 8 <= min_digit"),
        ({"min_objects": 0}, "need 1 <= min_objects <= max_objects, got 0 and 6"),
        ({"train_images": 0}, "must be at least 1"),
        ({"max_overlap": 1.0}, r"max_overlap must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_faulty_configs(sizes, message):
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**sizes)
