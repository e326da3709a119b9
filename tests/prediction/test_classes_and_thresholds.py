"""Which detections are kept: classes by name and number, and their thresholds."""

import json

import numpy as np
import pytest
import torch
from blob_detector import NAMES, BlobDetector, draw

import groupdetr_fast as gd
from groupdetr_fast.models import DetectorOutput
from groupdetr_fast.prediction import InferenceSettings
from groupdetr_fast.prediction.selection import Selection

SETTINGS = InferenceSettings(("person", "car", "bus, red", "7", "dog", "dog"), (1, 2, 3, 4, 10, 11))
SCENE = draw(64, 64, [(0, 2, 2, 12, 12), (1, 20, 20, 50, 50), (2, 40, 2, 60, 22)])


def select(classes=None, thresholds=None, score_threshold=0.3):
    return Selection.of(SETTINGS, len(SETTINGS.class_names), score_threshold, classes, thresholds)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("person,car", {0, 1}),
        (" person , 5", {0, 5}),
        ("bus, red", {2}),
        (["bus, red", "car"], {1, 2}),
        ("7", {3}),  # a name goes before a number
        (3, {3}),
        ([0, "car"], {0, 1}),
        ("dog", {4, 5}),
        ("dog (11)", {5}),
    ],
)
def test_classes_by_name_and_by_number(classes, labels):
    assert select(classes).classes == labels


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("preson", "there is no class 'preson': did you mean 'person'\\?"),
        ("Car", "did you mean 'car'"),
        ("zebra", "there is no class 'zebra': there are person, car, bus, red, 7, dog"),
        (6, r"there is no class 6: the number of a class must be in \[0, 6\)"),
        (-1, "there is no class -1"),
        ("", "must name at least one class"),
        ([], "must name at least one class"),
        ([True], "a class is a name or a number, got True"),
        ([1.5], "a class is a name or a number, got 1.5"),
    ],
)
def test_classes_that_there_are_not(classes, message):
    with pytest.raises(ValueError, match=message):
        select(classes)


def test_a_model_without_names_has_numbers():
    assert Selection.of(InferenceSettings(), 91, 0.3, "17,3").classes == {3, 17}
    with pytest.raises(ValueError, match="the checkpoint has no names of classes; give their numbers"):
        Selection.of(InferenceSettings(), 91, 0.3, "cat")


@pytest.mark.parametrize("suffix", ["json", "yaml", None])
def test_thresholds_in_every_form(tmp_path, suffix):
    table = {"person": 0.25, "car": None, "dog (10)": 0.75}
    given = table
    if suffix:
        given = str(tmp_path / f"thresholds.{suffix}")
        (tmp_path / f"thresholds.{suffix}").write_text(json.dumps(table))  # which is yaml, too
    values = select(None, given, 0.5).for_postprocess(6)
    assert values.tolist() == [0.25, 0.5, 0.5, 0.5, 0.75, 0.5]
    assert select(None, "person=0.25,dog (10)=0.75,", 0.5).thresholds == ((0, 0.25), (4, 0.75))


def test_the_least_score_that_can_be():
    assert select().least == 0.3
    assert select(None, "person=0.1").least == 0.1
    assert select("car", "person=0.1").least == 0.3
    assert select("car", "person=0.1,car=0.6").least == 0.6
    assert select("car,dog", "car=0.6").least == 0.3


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ("preson=0.3", "did you mean 'person'"),
        ("person", "must look like person=0.3,car=0.5 or be a json or yaml file, got 'person'"),
        ("", "must look like"),
        ("=0.3", "must look like"),
        ("person=high", "the threshold of class 'person' must be in"),
        ({"person": 1.5}, "the threshold of class 'person' must be in"),
        ({"person": True}, "the threshold of class 'person' must be in"),
        ({"person": float("nan")}, "the threshold of class 'person' must be in"),
        ("nowhere.json", "there is no file nowhere.json"),
    ],
)
def test_thresholds_that_cannot_be(thresholds, message):
    with pytest.raises(ValueError, match=message):
        select(None, thresholds)


def test_names_that_older_yaml_takes_for_booleans(tmp_path):
    (tmp_path / "a.yaml").write_text("no: 0.25\non: 0.75\n")
    found = Selection.of(InferenceSettings(("no", "on"), (1, 2)), 2, 0.3, None, tmp_path / "a.yaml")
    assert found.thresholds == ((0, 0.25), (1, 0.75))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[0.3]", "must hold a table")])
def test_files_that_are_no_tables(tmp_path, suffix, text, message):
    (tmp_path / f"a.{suffix}").write_text(text)
    with pytest.raises(ValueError, match=f"class_thresholds: .*a.{suffix} {message}"):
        select(None, tmp_path / f"a.{suffix}")


def test_classes_and_thresholds_of_predictions():
    model = BlobDetector()
    every = gd.predict(model, SCENE)
    assert sorted(every["class_names"]) == sorted(NAMES)
    assert gd.predict(model, SCENE, classes="green")["class_names"] == ["green"]
    assert gd.predict(model, SCENE, classes=["red", 2])["class_names"] == ["blue", "red"]
    scores = dict(zip(every["class_names"], every["scores"].tolist(), strict=True))
    between = (scores["red"] + scores["green"]) / 2
    assert gd.predict(model, SCENE, class_thresholds={"red": between})["class_names"] == ["green", "blue"]
    found = gd.predict(model, SCENE, score_threshold=1.0, class_thresholds=f"red={scores['red'] - 0.01}")
    assert found["class_names"] == ["red"]
    with pytest.raises(ValueError, match="did you mean 'green'"):
        gd.predict(model, SCENE, classes="gren")
    assert model.batches, "the first predictions"


def test_what_is_left_out_takes_no_place_among_the_best():
    """Sure detections of other classes would fill top_k."""
    model = BlobDetector()
    many = [(1, x, y, x + 8, y + 8) for x in range(0, 60, 10) for y in range(0, 40, 10)]
    scene = draw(64, 64, [*many, (0, 2, 50, 7, 55)])
    assert gd.predict(model, scene, top_k=5, classes="red")["class_names"] == ["red"]
    assert gd.predict(model, scene, top_k=5, class_thresholds={"green": 1.0})["class_names"] == ["red"]


def output(logits, no_object=False):
    groups = gd.QueryGroups(1, logits.shape[0])
    return DetectorOutput(logits[None, None], torch.full((1, 1, logits.shape[0], 4), 0.5), groups, no_object=no_object)


def test_a_query_of_a_softmax_detector_is_of_its_best_class_whatever_is_wanted():
    logits = torch.tensor([[4.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    never = float("inf")
    (found,) = gd.postprocess(output(logits, True), [(8, 8)], score_threshold=torch.tensor([never, 0.1]))
    assert found["labels"].tolist() == [1]
    assert found["scores"].item() == pytest.approx(logits[1].softmax(0)[1].item())
    (found,) = gd.postprocess(output(logits), [(8, 8)], score_threshold=torch.tensor([never, 0.1, never]))
    assert found["labels"].tolist() == [1, 1]


def test_thresholds_are_one_for_each_class():
    with pytest.raises(ValueError, match="expected 3 thresholds, one for each class, got 2"):
        gd.postprocess(output(torch.zeros(2, 3)), [(8, 8)], score_threshold=torch.zeros(2))
    with pytest.raises(ValueError, match=r"thresholds must have the shape \[C\], got \[1, 3\]"):
        gd.postprocess(output(torch.zeros(2, 3)), [(8, 8)], score_threshold=torch.zeros(1, 3))


def test_scores_of_masks_are_compared_after_they_were_lowered():
    from groupdetr_fast.models import SegmentationOutput

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 1, 6, 5, generator=generator)
    embeddings, features = torch.randn(1, 1, 6, 8, generator=generator), torch.randn(1, 8, 8, 8, generator=generator)
    out = SegmentationOutput(
        logits, embeddings, features, torch.zeros(1, 32, 32, dtype=torch.bool), gd.QueryGroups(1, 6)
    )
    (every,) = gd.postprocess(out, [(32, 32)])
    thresholds = torch.tensor([0.1, 0.3, 0.5, float("inf")])
    (found,) = gd.postprocess(out, [(32, 32)], score_threshold=thresholds)
    kept = every["scores"] >= thresholds[every["labels"]]
    assert 0 < kept.sum() < len(kept)
    for name in ("scores", "labels", "boxes", "masks"):
        assert torch.equal(found[name], every[name][kept])


def test_boxes_go_to_the_host_as_they_are():
    out = output(torch.randn(5, 4))
    out.boxes = torch.rand(1, 1, 5, 4)
    (there,), (here,) = gd.postprocess(out, [(7, 9)]), gd.postprocess(out, [(7, 9)], device="cpu")
    assert all(torch.equal(there[name], here[name]) for name in ("scores", "labels", "boxes"))
    assert here["labels"].dtype == torch.int64
    assert np.array_equal(there["labels"], here["labels"])
