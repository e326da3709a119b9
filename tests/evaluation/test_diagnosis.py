import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from groupdetr_fast.evaluation.diagnosis import ERRORS, diagnose

SIZE = 100
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def truth(*objects, images=1):
    """A ground truth of (image, category, box) and of (image, category, box, crowd)."""
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": int(any(crowd)),
        }
        for number, (image, category, box, *crowd) in enumerate(objects, start=1)
    ]
    sizes = [{"id": number, "height": SIZE, "width": SIZE} for number in range(1, images + 1)]
    return {"images": sizes, "annotations": annotations, "categories": CATEGORIES}


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_every_kind_of_error_once():
    here, there, elsewhere = (10, 10, 20, 20), (60, 10, 20, 20), (60, 60, 20, 20)
    four = [here, there, elsewhere, (10, 60, 20, 20)]
    objects = truth(
        (1, 3, here), (1, 7, there), (1, 3, elsewhere), (2, 7, here), *((3, 3, box) for box in four), images=4
    )
    results = [
        found(1, 3, here, 0.9),  # right
        found(1, 3, here, 0.8),  # double
        found(1, 3, there, 0.8),  # class: it is a dog
        found(1, 3, (70, 60, 20, 20), 0.7),  # place: IoU 1/3
        found(2, 3, (20, 10, 20, 20), 0.7),  # class and place
        found(2, 7, (70, 70, 20, 20), 0.9),  # background
        found(2, 7, here, 0.9),  # right
        found(4, 3, here, 0.7),  # background
        *(found(3, 3, box, 0.7) for box in four),  # right, which puts the threshold of cats at 0.7
        found(4, 7, here, 0.1),  # below the threshold of dogs
    ]
    diagnosis = diagnose(objects, results)
    assert [each.threshold for each in diagnosis.classes] == [0.7, 0.9]
    # The cat in the lower right is explained by its misplaced detection, the dog by its class.
    assert diagnosis.errors == {
        "place": 1, "class": 1, "double": 1, "background": 2, "class and place": 1, "missed": 0
    }  # fmt: skip
    assert diagnosis.errors.keys() == ERRORS.keys()
    assert diagnosis.correct == 6
    assert diagnosis.confusion.tolist() == [[5, 0, 1], [1, 1, 0], [4, 1, 0]]
    worst = diagnosis.images[0]
    assert (worst.image_id, worst.wrong, worst.missed) == (1, 3, 2)
    assert [image.image_id for image in diagnosis.images] == [1, 2, 4, 3]


def test_an_object_without_anything_near_it_is_missed():
    diagnosis = diagnose(truth((1, 3, (0, 0, 10, 10)), (1, 3, (50, 50, 10, 10))), [found(1, 3, (0, 0, 10, 10), 0.5)])
    assert diagnosis.errors["missed"] == 1
    assert diagnosis.confusion.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_detections_on_a_crowd_do_not_count():
    objects = truth((1, 3, (0, 0, 50, 50), True), (1, 3, (60, 60, 20, 20)))
    results = [found(1, 3, (5, 5, 10, 10), 0.9), found(1, 3, (60, 60, 20, 20), 0.8)]
    diagnosis = diagnose(objects, results)
    assert diagnosis.classes[0].objects == 1
    assert diagnosis.classes[0].precisions.tolist() == [1.0]
    assert diagnosis.classes[0].at_threshold == (1.0, 1.0, 1.0)
    assert not any(diagnosis.errors.values())


def test_nothing_at_all():
    diagnosis = diagnose(truth(), [])
    assert [each.threshold for each in diagnosis.classes] == [None, None]
    assert diagnosis.classes[0].at_threshold == (0.0, 0.0, 0.0)
    assert not diagnosis.confusion.any()
    only_detections = diagnose(truth(), [found(1, 3, (0, 0, 9, 9), 0.9)])
    assert only_detections.classes[0].precisions.tolist() == [0.0]


def random_case(rng, images=12):
    def box():
        x, y = rng.integers(0, 60, 2)
        return (int(x), int(y), int(rng.integers(5, 40)), int(rng.integers(5, 40)))

    objects = [
        (image, int(rng.choice([3, 7])), box(), rng.random() < 0.15)
        for image in range(1, images + 1)
        for _ in range(rng.integers(0, 6))
    ]
    results = []
    for image, category, (x, y, width, height), _ in objects:
        for _ in range(rng.integers(0, 3)):
            x2, y2 = (int(value) for value in np.clip(np.array([x, y]) + rng.integers(-6, 7, 2), 0, None))
            label = category if rng.random() < 0.8 else 10 - category
            results.append(found(image, label, (x2, y2, width, height), float(rng.integers(1, 20)) / 20))
    results += [found(int(rng.integers(1, images + 1)), 3, box(), float(rng.random())) for _ in range(10)]
    return truth(*objects, images=images), results


def as_masks(ground_truth, results):
    """The same objects and detections as masks."""

    def mask(entry):
        x, y, width, height = entry["bbox"]
        pixels = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
        pixels[y : y + height, x : x + width] = 1
        return rle.encode(pixels)

    def as_json(encoded):
        return {**encoded, "counts": encoded["counts"].decode("ascii")}

    annotations = [{**each, "segmentation": as_json(mask(each))} for each in ground_truth["annotations"]]
    found_masks = [{**each, "segmentation": as_json(mask(each))} for each in results]
    return {**ground_truth, "annotations": annotations}, found_masks


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(5))
def test_curves_are_those_of_pycocotools(seed, iou_type):
    rng = np.random.default_rng(seed)
    ground_truth, results = random_case(rng)
    # pycocotools breaks ties of scores by the place of an image in its list, as a stable sort does.
    results = sorted(results, key=lambda each: each["image_id"])
    if iou_type == "segm":
        ground_truth, results = as_masks(ground_truth, results)
    coco = COCO()
    coco.dataset = ground_truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(each) for each in results]), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    for index, each in enumerate(diagnose(ground_truth, results, iou_type).classes):
        expected = evaluation.eval["precision"][0, :, index, 0, -1]
        scores = evaluation.eval["scores"][0, :, index, 0, -1]
        falling = np.maximum.accumulate(each.precisions[::-1])[::-1]
        places = np.searchsorted(each.recalls, evaluation.params.recThrs, side="left")
        reached = places < len(falling)
        assert expected[reached] == pytest.approx(falling[places[reached]])
        assert not expected[~reached].any()
        reached[0] = False  # where pycocotools has the score of the first detection, even one on a crowd
        assert scores[reached] == pytest.approx(each.scores[places[reached]])


@pytest.mark.parametrize("seed", range(5))
def test_sums_agree(seed):
    ground_truth, results = random_case(np.random.default_rng(seed))
    diagnosis = diagnose(ground_truth, results)
    objects = sum(not each["iscrowd"] for each in ground_truth["annotations"])
    assert diagnosis.confusion[:-1].sum() == objects
    assert np.trace(diagnosis.confusion) == diagnosis.correct
    wrong = sum(diagnosis.errors.values()) - diagnosis.errors["missed"]
    assert diagnosis.confusion[:, :-1].sum() == diagnosis.correct + wrong
    assert sum(image.wrong for image in diagnosis.images) == wrong
    assert sum(image.missed for image in diagnosis.images) == objects - diagnosis.correct


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_best_of_all(seed):
    ground_truth, results = random_case(np.random.default_rng(seed))
    diagnosis = diagnose(ground_truth, results)
    for category, each in zip(CATEGORIES, diagnosis.classes, strict=True):
        others = []
        for threshold in {result["score"] for result in results}:
            kept = [result for result in results if result["score"] >= threshold]
            right = diagnose(ground_truth, kept).classes[CATEGORIES.index(category)]
            found_right = (right.recalls[-1] if len(right.recalls) else 0.0) * right.objects
            others.append(2 * found_right / (len(right.scores) + right.objects))
        assert each.at_threshold[2] == pytest.approx(max(others))
