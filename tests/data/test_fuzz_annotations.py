"""Annotation files that anybody may have written end in a data set or in one clear sentence, and soon."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from groupdetr_fast.data import CocoDataset, DataError
from groupdetr_fast.evaluation.coco import CocoEvaluator

VALID = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 12, "height": 9},
        {"id": 7, "file_name": "sub/b.png", "width": 8, "height": 8},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5.5, 6], "area": 33, "iscrowd": 0,
         "segmentation": [[1, 1, 6, 1, 6, 7, 1, 7], [2, 2, 3, 2, 3, 3]]},
        {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0, 0, 8, 8],
         "segmentation": {"size": [8, 8], "counts": [10, 20, 34]}},
        {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 8], "iscrowd": 1,
         "segmentation": {"size": [8, 8], "counts": "0P2"}},
    ],
}  # fmt: skip

NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32 + 1, 2**53, 2**63, -(2**63), 10**30, 1e308, -1e308, 1e-320]),
    st.floats(),
    st.integers(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "a.png",
            "sub/b.png",
            "../a.png",
            "/etc/passwd",
            "C:\\a",
            "a\0",
            "\ud800",
            "",
            ".",
            "sub",
            "\\\\host\\a",
            "\x00",
        ]
    ),
    st.sampled_from(["o" * 50, "P" * 50, "n" * 20000, "0" * 20000]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=9),
        st.dictionaries(st.sampled_from(["id", "size", "counts", "bbox", "name", "a"]), inner, max_size=4),
    ),
    max_leaves=12,
)


def places(content, path=()):
    """The paths of everything in nested lists and dicts."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def spoiled(draw):
    """The valid file after a few changes: another value somewhere, or something taken out or put in twice."""
    content = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        *parents, key = draw(st.sampled_from(list(places(content)) or [("images",)]))
        owner = content
        for parent in parents:
            owner = owner[parent]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
        if change == "replace":
            owner[key] = draw(VALUES)
        elif change == "remove":
            del owner[key]
        elif isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in VALID["images"]:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    Image.fromarray(pixels).save(folder / "outside.png")
    return folder


def result_or_sentence(beginning, function, *arguments, **settings):
    """What a function returns, or None if it raises DataError, whose message is one line that any terminal can show."""
    try:
        return function(*arguments, **settings)
    except DataError as error:
        sentence = str(error)
    assert sentence.startswith(beginning)
    assert "\n" not in sentence
    sentence.encode()
    return None


def use(folder, text, labels, masks):
    """Do with a file what a training does. Returns whether it was accepted."""
    path = folder / "instances.json"
    path.write_bytes(text)
    dataset = result_or_sentence("annotation file", CocoDataset, folder / "images", path, labels=labels, masks=masks)
    if dataset is None:
        return False
    for index in range(len(dataset)):
        sample = result_or_sentence("image file", dataset.__getitem__, index)
        if sample is None:
            continue
        image, target = sample
        assert image.shape[-2:] in ((9, 12), (8, 8))
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()
        assert ((target["labels"] >= 0) & (target["labels"] < dataset.num_classes)).all()
        assert not masks or target["masks"].dtype == torch.bool
    metrics = CocoEvaluator(path, category_ids=dataset.category_ids).summarize()
    assert not math.isnan(metrics["AP"])
    return True


def test_the_file_that_is_spoiled_is_valid(folder):
    for masks in (False, True):
        assert use(folder, json.dumps(VALID).encode(), "contiguous", masks)


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=5000,  # ms
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


MODES = {"labels": st.sampled_from(["contiguous", "category_id"]), "masks": st.booleans()}


@fuzz(250)
@given(content=spoiled(), **MODES)
def test_spoiled_files(folder, content, labels, masks):
    use(folder, json.dumps(content).encode(), labels, masks)


@pytest.mark.slow
@fuzz(5000)
@given(content=spoiled(), **MODES)
def test_thousands_of_spoiled_files(folder, content, labels, masks):
    use(folder, json.dumps(content).encode(), labels, masks)


@fuzz(100)
@given(content=VALUES, **MODES)
def test_any_json(folder, content, labels, masks):
    assert not use(folder, json.dumps(content).encode(), labels, masks)


@fuzz(100)
@given(cut=st.integers(0, 700), noise=st.binary(max_size=6), **MODES)
def test_damaged_bytes(folder, cut, noise, labels, masks):
    text = json.dumps(VALID).encode()
    use(folder, text[:cut] + noise + text[cut + len(noise) :], labels, masks)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b'{"images": [' + b"{}," * 10])
def test_deep_and_long_files(folder, text):
    assert not use(folder, text, "contiguous", False)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("o" * 1_000_000, "a count in its compressed string that does not end"),
        ("é1", "characters that compressed strings do not have"),
        ([2**32, -(2**32) + 64], "neither a compressed string nor a list of whole numbers"),
        ([2**32 + 64], "sum is 4294967360, but the image has 64 pixels"),
    ],
)
def test_run_lengths_that_would_hang_or_overflow(folder, counts, message):
    content = copy.deepcopy(VALID)
    content["annotations"][1]["segmentation"]["counts"] = counts
    (folder / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        CocoDataset(folder / "images", folder / "instances.json", masks=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("images", "id", 2**63), r"images\[0\] has an id beyond 64 bits"),
        (("images", "width", 2**31), "image 1 has the size 2147483648 x 9"),
        (("images", "file_name", "\ud800.png"), r"has the file name '\\ud800.png'"),
        (("categories", "id", 10**12), "category id 1000000000000 cannot be a label"),
    ],
)
def test_numbers_and_names_that_do_not_fit(folder, change, message):
    table, key, value = change
    content = copy.deepcopy(VALID)
    content["annotations"] = []
    content[table][0][key] = value
    (folder / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        CocoDataset(folder / "images", folder / "instances.json", labels="category_id")
