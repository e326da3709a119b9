import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO

from groupdetr_fast.evaluation import METRICS, CocoEvaluator, evaluate_coco, format_table, to_coco_results

# Image 3 has no object; category 8 occurs nowhere; image 2 has a crowd region.
TRUTH = [
    (1, 1, 5, [10, 10, 40, 50], 0),
    (2, 1, 9, [60, 20, 20, 20], 0),
    (3, 2, 5, [5, 5, 110, 100], 0),
    (4, 2, 9, [0, 0, 30, 30], 1),
]
CATEGORY_IDS = [5, 8, 9]


@pytest.fixture
def content():
    return {
        "images": [{"id": image_id, "height": 120, "width": 160, "file_name": "x.png"} for image_id in (1, 2, 3)],
        "categories": [{"id": category_id, "name": f"c{category_id}"} for category_id in CATEGORY_IDS],
        "annotations": [
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
                "segmentation": rle_of(box) if crowd else [polygon(box)],
            }
            for annotation_id, image_id, category_id, box, crowd in TRUTH
        ],
    }


def polygon(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def mask_of(box):
    mask = np.zeros((120, 160), dtype=np.uint8)
    x, y, width, height = box
    mask[y : y + height, x : x + width] = 1
    return mask


def rle_of(box):
    encoded = rle.encode(np.asfortranarray(mask_of(box)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def prediction(*detections, masks=False):
    """``(label, score, xywh box)`` of one image, as postprocess returns them."""
    boxes = torch.tensor([box for _, _, box in detections], dtype=torch.float32).reshape(-1, 4)
    result = {
        "labels": torch.tensor([label for label, _, _ in detections], dtype=torch.int64),
        "scores": torch.tensor([score for _, score, _ in detections]),
        "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
    }
    if masks:
        stack = [torch.from_numpy(mask_of(box)).bool() for _, _, box in detections]
        result["masks"] = torch.stack(stack) if stack else torch.zeros(0, 120, 160, dtype=torch.bool)
    return result


def perfect(masks=False):
    objects = {1: [(0, 0.9, TRUTH[0][3]), (2, 0.8, TRUTH[1][3])], 2: [(0, 0.7, TRUTH[2][3])], 3: []}
    return [1, 2, 3], [prediction(*objects[image_id], masks=masks) for image_id in (1, 2, 3)]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_metrics_are_those_of_pycocotools(shared_data, iou_type, capsys):
    folder = shared_data("coco_eval100")
    expected = json.loads((folder / "reference_pycocotools.json").read_text())[iou_type]
    truth = folder / "instances_val2014_100.json"
    results = folder / f"instances_val2014_fake{iou_type}100_results.json"
    metrics = evaluate_coco(truth, results, iou_type)
    assert list(metrics) == [*METRICS, "per_category"]
    assert {name: metrics[name] for name in METRICS} == pytest.approx(expected["stats"], abs=1e-9)
    assert metrics["per_category"].keys() == expected["per_category_AP"].keys()
    for name, value in expected["per_category_AP"].items():
        assert metrics["per_category"][name] == (None if value is None else pytest.approx(value, abs=1e-9))
    assert capsys.readouterr().out == ""


def test_the_evaluator_agrees_with_pycocotools_on_tensors(shared_data):
    """The way of a model's predictions: labels, float32 corners, batches in any order, in two processes."""
    folder = shared_data("coco_eval100")
    expected = json.loads((folder / "reference_pycocotools.json").read_text())["bbox"]["stats"]
    truth = COCO()
    truth.dataset = json.loads((folder / "instances_val2014_100.json").read_text())
    truth.createIndex()
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    category_ids = sorted(truth.getCatIds())
    evaluators = [CocoEvaluator(truth, category_ids=category_ids) for _ in range(2)]
    image_ids = truth.getImgIds()[::-1]
    for index in range(0, len(image_ids), 8):
        batch = image_ids[index : index + 8]
        predictions = []
        for image_id in batch:
            entries = [entry for entry in results if entry["image_id"] == image_id]
            predictions.append(
                prediction(
                    *((category_ids.index(entry["category_id"]), entry["score"], entry["bbox"]) for entry in entries)
                )
            )
        evaluators[index // 8 % 2].update(batch, predictions)
    evaluators[0].merge([evaluators[1].state])
    metrics = evaluators[0].summarize()
    # The corners went through float32: an IoU at a threshold may fall on its other side.
    assert {name: metrics[name] for name in METRICS} == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections(content, iou_type):
    evaluator = CocoEvaluator(content, iou_type, category_ids=CATEGORY_IDS)
    evaluator.update(*perfect(masks=iou_type == "segm"))
    metrics = evaluator.summarize()
    assert {name: metrics[name] for name in METRICS} == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert metrics["per_category"] == {"c5": pytest.approx(1.0), "c8": None, "c9": pytest.approx(1.0)}


def test_a_detection_in_a_crowd_is_no_mistake(content):
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    ids, predictions = perfect()
    predictions[1] = prediction((0, 0.7, TRUTH[2][3]), (2, 0.99, [2, 2, 10, 10]))
    evaluator.update(ids, predictions)
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)
    mistaken = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    predictions[1] = prediction((0, 0.7, TRUTH[2][3]), (2, 0.99, [100, 80, 10, 10]))
    mistaken.update(ids, predictions)
    assert mistaken.summarize()["AP"] < 0.9


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detections_at_all(content, iou_type):
    metrics = CocoEvaluator(content, iou_type).summarize()
    assert {name: metrics[name] for name in METRICS} == dict.fromkeys(METRICS, 0.0)
    assert evaluate_coco(content, [], iou_type) == metrics
    evaluator = CocoEvaluator(content, iou_type)
    evaluator.update([1, 2, 3], [prediction(masks=True)] * 3)
    assert evaluator.summarize() == metrics


def test_ground_truth_without_any_object(content):
    content["annotations"] = []
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    evaluator.update(*perfect())
    metrics = evaluator.summarize()
    assert {metrics[name] for name in METRICS} == {-1.0}
    assert set(metrics["per_category"].values()) == {None}


def test_annotation_id_zero_can_be_matched(content):
    """COCOeval takes the id 0 for "no match"; exporters that count from 0 must not lose an object."""
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    evaluator.update(*perfect())
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)
    assert [annotation["id"] for annotation in content["annotations"]] == [0, 1, 2, 3]


def test_images_count_once(content):
    ids, predictions = perfect()
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    evaluator.update(ids, predictions)
    once = evaluator.results
    evaluator.update([1, 1], [prediction((0, 1.0, [90, 90, 10, 10]))] * 2)
    assert evaluator.results == once
    other = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    other.update([2], [prediction((0, 1.0, [0, 0, 1, 1]))])
    evaluator.merge([evaluator.state, other.state])
    assert evaluator.results == once
    assert len(once) == 3


def test_states_of_processes_merge(content):
    ids, predictions = perfect()
    parts = [CocoEvaluator(content, category_ids=CATEGORY_IDS) for _ in range(3)]
    for index, part in enumerate(parts):
        part.update(ids[index : index + 1], predictions[index : index + 1])
    # A sampler that fills its last batch gives one image to two processes.
    parts[2].update(ids[:1], predictions[:1])
    whole = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    whole.update(ids, predictions)
    merged = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    merged.merge([part.state for part in parts][::-1])
    assert merged.results == whole.results
    assert merged.summarize() == whole.summarize()


def test_only_chosen_images_are_evaluated(content):
    ids, predictions = perfect()
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS, image_ids=[2, 3])
    evaluator.update(ids, predictions)
    assert {result["image_id"] for result in evaluator.results} == {2}
    metrics = evaluator.summarize()
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["APm"] == -1
    assert metrics["per_category"]["c9"] is None
    # All of the ground truth counts where nothing is chosen.
    everything = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    everything.update(ids[1:], predictions[1:])
    assert everything.summarize()["AP"] < 0.6


def test_results_are_json_with_xywh_boxes_and_category_ids():
    results = to_coco_results([4], [prediction((2, 0.5, [10, 20, 30, 40]), masks=True)], CATEGORY_IDS)
    assert json.loads(json.dumps(results)) == [
        {
            "image_id": 4,
            "category_id": 9,
            "score": 0.5,
            "bbox": [10.0, 20.0, 30.0, 40.0],
            "segmentation": rle_of([10, 20, 30, 40]),
        }
    ]
    assert to_coco_results([4], [prediction((2, 0.5, [0, 0, 1, 1]))])[0]["category_id"] == 2
    assert to_coco_results([4], [prediction()], torch.tensor(CATEGORY_IDS)) == []


def test_predictions_with_gradients_and_half_precision():
    detection = prediction((0, 0.5, [10, 20, 30, 40]))
    detection["scores"] = detection["scores"].half()
    detection["boxes"].requires_grad_()
    (result,) = to_coco_results([1], [detection], CATEGORY_IDS)
    assert (result["score"], result["bbox"]) == (0.5, [10, 20, 30, 40])


def test_categories_of_one_name_stay_apart(content):
    content["categories"][2]["name"] = "c5"
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    assert list(evaluator.summarize()["per_category"]) == ["c5 (5)", "c8", "c5 (9)"]


def test_table(content):
    metrics = CocoEvaluator(content).summarize()
    metrics.update(AP=0.1234, ARl=-1.0)
    lines = format_table(metrics).splitlines()
    assert len(lines) == 12
    assert lines[0].endswith("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.123")
    assert lines[11].endswith("Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = -1.000")
    assert [line.split()[0] for line in lines] == list(METRICS)


def test_faulty_arguments(content, tmp_path):
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    with pytest.raises(ValueError, match="image 17 is not in the ground truth"):
        evaluator.update([17], [prediction()])
    with pytest.raises(ValueError, match="got 2 image ids and 1 predictions"):
        evaluator.update([1, 2], [prediction()])
    for label in (3, -1):
        with pytest.raises(ValueError, match=rf"image 1: label {label} is not in \[0, 3\)"):
            evaluator.update([1], [prediction((label, 0.5, [0, 0, 5, 5]))])
    with pytest.raises(ValueError, match='iou_type must be "bbox" or "segm", got \'keypoints\''):
        CocoEvaluator(content, "keypoints")
    with pytest.raises(ValueError, match="image_ids: image 17 is not in the ground truth"):
        CocoEvaluator(content, image_ids=[1, 17])
    with pytest.raises(ValueError, match="there is no image to evaluate"):
        CocoEvaluator(content, image_ids=[])
    with pytest.raises(ValueError, match=r"annotation file .*none\.json cannot be read"):
        CocoEvaluator(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"annotation file .*bad\.json is not valid json"):
        CocoEvaluator(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"result file .*bad\.json is not valid json"):
        evaluate_coco(content, tmp_path / "bad.json")
    with pytest.raises(ValueError, match='the ground truth lacks the key "categories"'):
        CocoEvaluator({"images": [], "annotations": []})
    box = {"image_id": 1, "category_id": 5, "score": 1.0, "bbox": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match=r'results\[1\] lacks the key "score"'):
        evaluate_coco(content, [box, {"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]}])
    with pytest.raises(ValueError, match=r'results\[0\] lacks the key "segmentation"'):
        evaluate_coco(content, [box], "segm")
    with pytest.raises(ValueError, match=r"results\[0\]: image 17 is not in the ground truth"):
        evaluate_coco(content, [{**box, "image_id": 17}])


BOMBS = [
    ({"size": [10**9, 10**9], "counts": [10**18]}, "has the size"),
    ({"size": [120, 160], "counts": [10**18]}, "has counts whose sum is 1000000000000000000"),
    ({"size": [120, 160], "counts": "o" * 100_000}, "has a count in its compressed string that does not end"),
    ({"size": [120, 160], "counts": None}, "has counts that are neither"),
    ({"counts": "abc"}, "has the size None"),
    ([["x"]], "has a polygon that is no list of numbers"),
    (7, "must be a list of polygons or an object with size and counts"),
]


@pytest.mark.parametrize(("segmentation", "message"), BOMBS)
def test_masks_that_are_none_are_refused_in_one_sentence(content, segmentation, message):
    result = {"image_id": 1, "category_id": 5, "score": 0.5, "segmentation": segmentation}
    with pytest.raises(ValueError, match=rf"results\[0\]: the segmentation {message}"):
        evaluate_coco(content, [result], "segm")
    content["annotations"][3]["segmentation"] = segmentation  # of a crowd region, which training does not read
    with pytest.raises(ValueError, match=f"annotation 4: the segmentation {message}"):
        CocoEvaluator(content, "segm")
    assert CocoEvaluator(content, "bbox").image_ids == [1, 2, 3]


def test_scores_that_are_no_numbers_are_refused_in_words(content):
    evaluator = CocoEvaluator(content, "bbox", category_ids=CATEGORY_IDS)
    found = prediction((0, 0.9, [10, 10, 40, 50]))
    evaluator.update([1], [{**found, "scores": found["scores"] * float("nan")}])
    with pytest.raises(ValueError, match="image 1: the detector gives scores that are not finite"):
        evaluator.summarize()


def test_a_box_that_is_no_number_meets_no_object(content):
    evaluator = CocoEvaluator(content, "bbox", category_ids=CATEGORY_IDS)
    evaluator.update([1], [prediction((0, 0.9, [10, 10, 40, 50]))])
    expected = evaluator.summarize()["AP"]
    spoilt = prediction((0, 0.9, [10, 10, 40, 50]), (0, 0.1, [10, 10, 40, 50]))
    spoilt["boxes"][1] *= float("nan")
    evaluator = CocoEvaluator(content, "bbox", category_ids=CATEGORY_IDS)
    evaluator.update([1], [spoilt])
    assert evaluator.summarize()["AP"] == pytest.approx(expected)
    assert expected > 0


def test_objects_without_a_mask_are_left_out(content):
    del content["annotations"][1]["segmentation"]
    content["annotations"][2]["segmentation"] = []
    evaluator = CocoEvaluator(content, "segm", category_ids=CATEGORY_IDS)
    evaluator.update([1], [prediction((0, 0.9, [10, 10, 40, 50]), masks=True)])
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)


def test_run_lengths_of_many_masks_are_those_of_pycocotools(device):
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((5, 37, 23)) < np.array([0, 0.1, 0.5, 0.9, 1])[:, None, None])
    boxes = [(0, 0.5, [0, 0, 1, 1])] * 5
    results = to_coco_results([1], [{**prediction(*boxes), "masks": masks.to(device)}])
    for mask, result in zip(masks, results, strict=True):
        encoded = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert result["segmentation"] == {"size": [37, 23], "counts": encoded["counts"].decode()}


def test_ids_beyond_the_precision_of_floats(content):
    """Exporters hash file names into 64 bits."""
    large = {1: 2**62 + 1, 2: 2**62 + 2, 3: 5}
    for image in content["images"]:
        image["id"] = large[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = large[annotation["image_id"]]
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    ids, predictions = perfect()
    evaluator.update([large[image_id] for image_id in ids], predictions)
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)


def test_objects_that_cannot_be_compared_are_refused(content):
    del content["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match="annotation 1 has no bbox"):
        CocoEvaluator(content)
    assert CocoEvaluator(content, "segm").image_ids == [1, 2, 3]
    del content["annotations"][0]["area"]
    with pytest.raises(ValueError, match="annotation 1 has neither an area nor a bbox"):
        CocoEvaluator(content, "segm")


def test_polygons_need_the_size_of_their_image(content):
    del content["images"][0]["height"]
    with pytest.raises(ValueError, match="annotation 1: polygons need the height and width of their image"):
        CocoEvaluator(content, "segm")
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    evaluator.update(*perfect())
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)


def test_objects_without_area_or_crowd_entries(content):
    expected = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    expected.update(*perfect())
    for entry in content["annotations"][:3]:
        del entry["iscrowd"], entry["area"]
    evaluator = CocoEvaluator(content, category_ids=CATEGORY_IDS)
    evaluator.update(*perfect())
    assert evaluator.summarize() == expected.summarize()


def test_detections_of_unknown_categories_count_nothing(content):
    ids, predictions = perfect()
    predictions[0] = prediction((5, 0.9, TRUTH[0][3]), (9, 0.8, TRUTH[1][3]), (77, 0.95, TRUTH[1][3]))
    predictions[1] = prediction((5, 0.7, TRUTH[2][3]))
    evaluator = CocoEvaluator(content)
    evaluator.update(ids, predictions)
    assert evaluator.summarize()["AP"] == pytest.approx(1.0)
    assert len(evaluator.results) == 4
