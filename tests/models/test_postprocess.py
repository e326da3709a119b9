import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast.models import DetectorOutput


def make_output(num_groups=2, size=3, classes=4):
    groups = gd.QueryGroups(num_groups, size)
    logits = torch.full((2, 1, groups.length, classes), -9.0)
    boxes = torch.full((2, 1, groups.length, 4), 0.5)
    return DetectorOutput(logits, boxes, groups)


def test_best_pairs_of_the_last_layer_in_pixels():
    out = make_output()
    out.logits[0] = 9  # earlier layers do not count
    out.logits[-1, 0, 1, 2] = 2.0
    out.logits[-1, 0, 0, 3] = 1.0
    out.logits[-1, 0, 1, 0] = 0.0  # one query may give several detections
    out.logits[-1, 0, 4, 1] = 5.0  # of group 1
    out.boxes[-1, 0, 1] = torch.tensor([0.5, 0.25, 0.2, 0.1])
    (found,) = gd.postprocess(out, [(200, 100)], top_k=3)
    assert found["labels"].tolist() == [2, 3, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    torch.testing.assert_close(found["boxes"][0], torch.tensor([40.0, 40.0, 60.0, 60.0]))
    assert torch.equal(found["boxes"][0], found["boxes"][2])
    (other,) = gd.postprocess(out, torch.tensor([[200, 100]]), top_k=1, group=1)
    assert other["labels"].tolist() == [1]


def test_fewer_pairs_than_top_k():
    (found,) = gd.postprocess(make_output(), [(10, 10)])
    assert found["scores"].shape == (12,)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"image_sizes must have shape \[1, 2\], got \[2, 2\]"):
        gd.postprocess(make_output(), [(1, 1), (2, 2)])
