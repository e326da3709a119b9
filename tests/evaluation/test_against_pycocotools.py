"""COCO's numbers on data of all kinds, judged by pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from groupdetr_fast.evaluation import METRICS, evaluate_coco

HEIGHT, WIDTH = 200, 240
SCORES = (0.1, 0.5, 0.5, 0.9)  # with ties
AREAS = (32**2, 96**2, 0.0)  # at the limits of small, medium and large


def a_box(rng):
    """Of any size, on whole pixels or between them."""
    size = (rng.random(2) * rng.choice([8, 40, 100, 200])).clip(1, (WIDTH, HEIGHT))
    corner = rng.random(2) * ((WIDTH, HEIGHT) - size)
    box = np.concatenate((corner, size))
    return (box.round().clip(min=(0, 0, 1, 1)) if rng.random() < 0.5 else box).tolist()


def run_lengths(box, rng):
    x, y, width, height = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[int(max(y, 0)) : int(y + height) + 1, int(max(x, 0)) : int(x + width) + 1] = 1
    if rng.random() < 0.3:
        mask[::2] = 0
    encoded = rle.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def polygon(box):
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def an_object(rng, image_id, categories):
    box, crowd = a_box(rng), int(rng.random() < 0.2)
    return {
        "image_id": image_id,
        "category_id": int(rng.choice(categories)),
        "bbox": box,
        "iscrowd": crowd,
        "area": float(box[2] * box[3] * rng.choice([1, 0.7])) if rng.random() < 0.8 else float(rng.choice(AREAS)),
        "segmentation": run_lengths(box, rng) if crowd or rng.random() < 0.5 else polygon(box),
    }


def a_detection(rng, image_id, category_id, box):
    return {
        "image_id": image_id,
        "category_id": int(category_id),
        "bbox": box,
        "score": float(rng.choice([*SCORES, rng.random()])),
        "segmentation": run_lengths(box, rng),
    }


def ground_truth_and_detections(rng):
    """Images without objects, without detections and with more than count; crowds; equal scores; ids from 0 on."""
    categories = sorted(rng.choice(50, int(rng.integers(1, 5)), replace=False).tolist())
    image_ids = rng.choice(1000, int(rng.integers(1, 6)), replace=False).tolist()
    objects, detections = [], []
    for image_id in image_ids:
        for _ in range(int(rng.integers(0, 8)) if rng.random() < 0.8 else 0):
            objects.append(an_object(rng, image_id, categories))
            if rng.random() < 0.7:
                box = np.array(objects[-1]["bbox"]) + rng.normal(0, 2, 4) * (rng.random() < 0.6)
                right = rng.random() < 0.9
                category = objects[-1]["category_id"] if right else rng.choice(categories)
                detections.append(a_detection(rng, image_id, category, box.clip(min=(-5, -5, 0.5, 0.5)).tolist()))
        for _ in range(int(rng.choice([0, 1, 3, 120], p=[0.4, 0.3, 0.25, 0.05]))):
            detections.append(a_detection(rng, image_id, rng.choice(categories), a_box(rng)))
    first = int(rng.integers(0, 3))
    content = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH, "file_name": "x"} for number in image_ids],
        "categories": [{"id": number, "name": f"c{number}"} for number in categories],
        "annotations": [{"id": number, **each} for number, each in enumerate(objects, start=first)],
    }
    return content, [detections[index] for index in rng.permutation(len(detections))]


def judged(content, detections, iou_type):
    """The twelve numbers and AP by category, by pycocotools; its ids begin at 1, as 0 would be "no match" to it."""
    truth, found = COCO(), COCO()
    truth.dataset = {
        **content,
        "annotations": [{**each, "id": number} for number, each in enumerate(content["annotations"], start=1)],
    }
    areas = {"bbox": lambda each: each["bbox"][2] * each["bbox"][3], "segm": lambda each: area_of(each["segmentation"])}
    found.dataset = {
        **content,
        "annotations": [
            {**each, "id": number, "iscrowd": 0, "area": areas[iou_type](each)}
            for number, each in enumerate(detections, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    valid = [precision[:, :, index][precision[:, :, index] > -1] for index in range(precision.shape[2])]
    return evaluation.stats, [each.mean() if each.size else None for each in valid]


def area_of(run_lengths):
    return float(rle.decode(run_lengths).sum())


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_all_numbers_are_those_of_pycocotools(iou_type, seed):
    content, detections = ground_truth_and_detections(np.random.default_rng(seed))
    expected, by_category = judged(content, detections, iou_type)
    metrics = evaluate_coco(content, detections, iou_type)
    assert [metrics[name] for name in METRICS] == pytest.approx(list(expected), abs=1e-9)
    for actual, wanted in zip(metrics["per_category"].values(), by_category, strict=True):
        assert actual == (None if wanted is None else pytest.approx(wanted, abs=1e-9))
