"""Detections for the package supervision, and the tracks of a tracker."""

import sys

import numpy as np
import pytest
import torch
from blob_detector import BlobDetector, draw

import groupdetr_fast as gd


@pytest.fixture
def sv():
    return pytest.importorskip("supervision", reason="supervision (extra supervision) is not installed")


def scene(index):
    """Two squares that move towards each other and pass, in different rows."""
    return draw(64, 96, [(0, 4 + 3 * index, 4, 24 + 3 * index, 24), (1, 70 - 3 * index, 36, 90 - 3 * index, 56)])


def model():
    return BlobDetector(square=False, eval_short_side=64, eval_max_size=None)


def test_boxes_scores_classes_and_names(sv):
    found = gd.predict(model(), scene(0))
    detections = gd.to_supervision(found)
    assert isinstance(detections, sv.Detections)
    assert np.array_equal(detections.xyxy, found["boxes"].numpy())
    assert np.array_equal(detections.confidence, found["scores"].numpy())
    assert np.array_equal(detections.class_id, found["labels"].numpy())
    assert detections.data["class_name"].tolist() == found["class_names"]
    assert detections.mask is None
    red = detections[detections.data["class_name"] == "red"]
    assert red.class_id.tolist() == [0]


def test_no_detection_at_all(sv):
    detections = gd.to_supervision(gd.predict(model(), draw(64, 96, [])))
    assert len(detections) == 0
    assert detections.xyxy.shape == (0, 4)
    merged = sv.Detections.merge([detections, gd.to_supervision(gd.predict(model(), scene(0)))])
    assert len(merged) == 2


def test_masks(sv):
    masks = torch.zeros(2, 8, 9, dtype=torch.bool)
    masks[0, 2:4, 3:6], masks[1, 1, 1] = True, True
    detection = {
        "scores": torch.tensor([0.9, 0.5]),
        "labels": torch.tensor([1, 0]),
        "boxes": torch.tensor([[3.0, 2, 6, 4], [1, 1, 2, 2]]),
        "masks": masks,
        "class_names": ["b", "a"],
    }
    detections = gd.to_supervision(detection)
    assert detections.mask.dtype == bool
    assert np.array_equal(detections.mask, masks.numpy())
    assert detections.area.tolist() == [6, 1]


def tracker(sv):
    """ByteTrack, which has moved from supervision to a package of its own."""
    if hasattr(sv, "ByteTrack"):
        return sv.ByteTrack(frame_rate=10).update_with_detections
    trackers = pytest.importorskip(
        "trackers", reason="trackers, where supervision's ByteTrack is now, is not installed"
    )
    return trackers.ByteTrackTracker(frame_rate=10, minimum_consecutive_frames=1).update


def test_a_tracker_follows_objects_through_frames(sv):
    update = tracker(sv)
    tracks = {"red": [], "green": []}
    for index in range(15):
        tracked = update(gd.to_supervision(gd.predict(model(), scene(index))))
        for name, number in zip(tracked.data["class_name"], tracked.tracker_id, strict=True):
            tracks[str(name)].append(int(number))
    for numbers in tracks.values():
        known = [number for number in numbers if number >= 0]
        assert len(known) >= 12
        assert len(set(known)) == 1, "one track for each object"
    assert set(tracks["red"]) & set(tracks["green"]) <= {-1}


def test_what_is_no_detection_of_one_image():
    with pytest.raises(TypeError, match="expected the detections of one image, a dictionary, got list"):
        gd.to_supervision(gd.predict(model(), [scene(0)]))


def test_without_supervision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(
        ValueError, match=r"to_supervision needs supervision: pip install 'groupdetr_fast\[train,superv"
    ):
        gd.to_supervision(gd.predict(model(), scene(0)))
