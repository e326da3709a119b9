"""Transforms of one's own, from a file."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from groupdetr_fast.data import AugmentationConfig, CocoDataset, EpochSampler, SkipUnreadable, collate, train_transforms
from groupdetr_fast.data.own_transforms import OwnTransforms, TransformError, try_on_samples

HEAD = "import torch\nfrom torchvision import tv_tensors\nfrom torchvision.transforms import v2\n"
ZOOM = "def build():\n    return v2.Compose([v2.RandomZoomOut(p=1.0), v2.ColorJitter(0.3)])\n"
SIZES = AugmentationConfig(short_sides=(32,), max_size=64, flip=0.0, crop=0.0)


@pytest.fixture
def load(tmp_path):
    """A function from the text of a file to the transform that its function returns."""

    def write(text, function="build"):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + text)
        return OwnTransforms(f"{path}:{function}")

    return write


def scene(masks=False):
    image = tv_tensors.Image(torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8))
    boxes = torch.tensor([[10.0, 5, 30, 25], [40, 20, 60, 40]])
    objects = {
        "labels": torch.tensor([1, 0]),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(40, 60)),
    }
    if masks:
        objects["masks"] = tv_tensors.Mask(torch.ones(2, 40, 60, dtype=torch.uint8))
    return image, objects


@pytest.mark.parametrize("masks", [False, True])
def test_a_transform_comes_before_the_built_in_ones(load, masks):
    own = load("def build():\n    return v2.RandomHorizontalFlip(1.0)\n")
    image, objects = scene(masks)
    result, found = train_transforms(SIZES, own)(image, objects)
    expected = train_transforms(SIZES)(*v2.RandomHorizontalFlip(1.0)(image, objects))
    assert torch.equal(result, expected[0])
    for key in objects:
        assert torch.equal(found[key], expected[1][key])
        assert type(found[key]) is type(expected[1][key])
    assert found["boxes"][0].tolist() == pytest.approx([24, 4, 40, 20])  # mirrored, and resized by 4 / 5


def test_boxes_are_clipped_and_objects_outside_removed(load):
    own = load("def build():\n    return v2.RandomAffine(0, translate=(0, 0), scale=(3.0, 3.0))\n")
    image, objects = scene(masks=True)
    result, found = own(image, objects)
    # three times as large about the centre, (30, 20)
    assert found["boxes"].tolist() == [[0, 0, 30, 35]]
    assert found["labels"].tolist() == [1]
    assert len(found["masks"]) == 1
    assert result.shape == image.shape


def test_the_image_that_is_transformed_is_a_copy(load):
    own = load(
        "class Black(v2.Transform):\n    def transform(self, inpt, params):\n"
        "        return inpt.zero_() if isinstance(inpt, tv_tensors.Image) else inpt\n\n"
        "def build():\n    return Black()\n"
    )
    image, objects = scene()
    before = image.clone()
    assert not own(image, objects)[0].any()
    assert torch.equal(image, before)


def test_what_is_drawn_while_building_is_the_same_everywhere(load):
    text = (
        "import random\nclass Fixed(v2.Transform):\n    def __init__(self):\n        super().__init__()\n"
        "        self.number = (torch.rand(()).item(), random.random())\n"
        "    def transform(self, inpt, params):\n        return inpt\n\ndef build():\n    return Fixed()\n"
    )
    own = load(text)
    torch.rand(3)
    state = torch.get_rng_state()
    again = pickle.loads(pickle.dumps(own))  # a class of the file, which no other process knows
    assert torch.equal(torch.get_rng_state(), state)
    assert again._transform.number == own._transform.number
    Path(own.name.rpartition(":")[0]).write_text("")
    assert pickle.loads(pickle.dumps(own)).source == own.source  # the text of the beginning, not that of now


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def built():\n    pass\n", r"mine.py has no function build: it has built"),
        ("import nothing_of_that_name\n", r"mine.py fails, line 4: ModuleNotFoundError: No module named"),
        ("def build(:\n", r"mine.py fails, line 4: SyntaxError"),
        ("def build():\n    return 1 / 0\n", r"build\(\) of .*mine.py fails, line 5: ZeroDivisionError"),
        ("def build():\n    return None\n", r"build\(\) of .*mine.py must return a transform of .*v2, got NoneType"),
    ],
)
def test_faults_of_the_file_are_told_in_one_sentence(load, text, message):
    with pytest.raises(TransformError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


LAMBDA = "class T(v2.Transform):\n    def forward(self, image, objects):\n        {}\n\ndef build():\n    return T()\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return image", "must return the image and the dictionary .*, got Image"),
        ("return image[0], objects", r"must return an image \[3, H, W\], got Tensor \[40, 60\]"),
        (
            "return image.float(), objects",
            "must return the image as uint8, got torch.float32: leave ToDtype and Normal",
        ),
        (
            "return image, {**objects, 'labels': objects['labels'][:1]}",
            "different numbers of objects: 1 labels, 2 boxes",
        ),
        ("return image, {'labels': objects['labels']}", "must keep 'boxes' in the dictionary, got NoneType"),
        ("return image, {**objects, 'boxes': objects['boxes'] * 1}", "must keep the boxes as tv_tensors.BoundingBoxes"),
        (
            "return v2.functional.crop(image, 0, 0, 9, 9), objects",
            r"image of \(9, 9\) pixels and boxes of one of \(40,",
        ),
        (
            "return image, {**objects, 'boxes': v2.ConvertBoundingBoxFormat('CXCYWH')(objects['boxes'])}",
            "in XYXY, got BoundingBoxes .* as CXCYWH",
        ),
        (
            "return image, {**objects, 'labels': objects['labels'].float()}",
            "must keep the labels int64, got torch.float",
        ),
        ("return image, {**objects, 'masks': objects['masks'].bool() * 1}", "must keep the masks as tv_tensors.Mask"),
        ("raise KeyError('x')", "mine.py:build fails, line 6: KeyError"),
    ],
)
def test_faults_of_the_transform_are_told_in_one_sentence(load, body, message):
    with pytest.raises(TransformError, match=message) as caught:
        load(LAMBDA.format(body))(*scene(masks=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine.py", ":build", "mine.py:", "mine.py:a b"])
def test_a_setting_names_file_and_function(name):
    with pytest.raises(ValueError, match=r"transforms must be FILE.py:FUNCTION, such as my_transforms.py:build, got"):
        AugmentationConfig(transforms=name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TransformError, match=r"none.py cannot be read \(No such file or directory\): give my_transf"):
        OwnTransforms(f"{tmp_path / 'none.py'}:build")


def test_the_beginning_tries_a_few_samples(load, content, write):
    dataset = CocoDataset(*write(content))
    try_on_samples(load(ZOOM), dataset)
    away = "def build():\n    return v2.RandomAffine(0, translate=(0, 0), scale=(0.01, 0.01))\n"
    with pytest.raises(
        TransformError, match=r"mine.py:build leaves none of the 3 objects of 2 images: their boxes are"
    ):
        try_on_samples(load(away), dataset)
    (dataset.image_folder / "sub" / "7.png").write_bytes(b"damaged")
    with pytest.raises(TransformError, match="none of the 1 objects of 1 images"):  # of those that can be read
        try_on_samples(load(away), dataset)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_samples_depend_on_seed_epoch_and_index_alone(load, content, write, start):
    """Whatever process draws them, also one that knows no class of the file."""
    text = ZOOM + "class Own(v2.ColorJitter):\n    pass\n\ndef other():\n    return v2.Compose([build(), Own(0.4)])\n"
    datasets = [
        CocoDataset(*write(content), train_transforms(SIZES, load(text, "other")), seed=3, cache_images=cache)
        for cache in (False, True)
    ]
    expected = [datasets[0][2, index] for index in range(4)]
    sampler = EpochSampler(datasets[1], shuffle=False)
    sampler.set_epoch(2)
    loader = DataLoader(
        datasets[1],
        1,
        sampler=sampler,
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context=start,
    )
    for batch, (image, target) in zip(loader, expected, strict=True):
        assert torch.equal(batch.images[0], image)
        assert torch.equal(batch.targets.boxes[0], target["boxes"])


def test_a_fault_in_a_process_that_loads_images_is_one_sentence(load, content, write):
    own = load(LAMBDA.format("return image.float(), objects"))
    dataset = SkipUnreadable(CocoDataset(*write(content), train_transforms(SIZES, own)), limit=3)
    loader = DataLoader(dataset, 1, sampler=EpochSampler(dataset), num_workers=1, collate_fn=partial(collate))
    with pytest.raises(TransformError, match=r"^transforms: the transform of .*mine.py:build must return") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    assert dataset.unreadable == []
