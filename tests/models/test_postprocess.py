import importlib
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

import groupdetr_fast as gd
from groupdetr_fast.models import DetectorOutput, SegmentationOutput
from groupdetr_fast.testing import peak_bytes

postprocess = importlib.import_module("groupdetr_fast.models.postprocess")  # whose name the function has, too


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


def test_low_scores_are_left_out():
    out = make_output()
    out.logits[-1, 0, 1, 2] = 2.0
    (found,) = gd.postprocess(out, [(10, 10)], score_threshold=0.5)
    assert found["labels"].tolist() == [2]
    assert found["boxes"].shape == (1, 4)


def make_masks(num_groups=2, size=3, classes=4):
    groups = gd.QueryGroups(num_groups, size)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, 50:], padding[0, :, 70:] = True, True
    logits = torch.randn(3, 2, groups.length, classes + 1)
    embeddings = torch.randn(3, 2, groups.length, 8)
    # features that vary slowly, so that masks have an inside
    features = F.interpolate(torch.randn(2, 8, 3, 4), (16, 24), mode="bilinear")
    return SegmentationOutput(logits, embeddings, features, padding, groups)


@pytest.mark.parametrize("group", [0, 1])
def test_masks_at_the_size_of_the_images(group):
    """As the repository's inference does it, image by image and pair by pair."""
    out, sizes = make_masks(), [(101, 140), (32, 48)]
    found = gd.postprocess(out, sizes, top_k=7, group=group)
    for image, (detection, size) in enumerate(zip(found, sizes, strict=True)):
        probability = out.logits[-1, image, 3 * group : 3 * group + 3].softmax(-1)[:, :4]
        expected = []
        for pair in probability.flatten().argsort(descending=True)[:7].tolist():
            embedding = out.mask_embeddings[-1, image, 3 * group + pair // 4]
            mask = torch.einsum("d,dhw->hw", embedding, out.mask_features[image])[None, None]
            mask = F.interpolate(mask, (64, 96), mode="bilinear", align_corners=False)
            height, width = ((50, 70), (64, 96))[image]
            mask = F.interpolate(mask[..., :height, :width], size, mode="bilinear", align_corners=False)[0, 0]
            inside = mask.sigmoid()[mask > 0]
            score = probability.flatten()[pair] * (inside.mean() if len(inside) else 0)
            expected.append((score, pair % 4, mask > 0))
        expected.sort(key=lambda detection: -detection[0])
        assert detection["masks"].shape == (7, *size)
        for index, (score, label, mask) in enumerate(expected):
            torch.testing.assert_close(detection["scores"][index], score, rtol=1e-4, atol=1e-5)
            assert detection["labels"][index] == label
            assert (detection["masks"][index] != mask).float().mean() < 1e-3


def test_boxes_enclose_the_masks():
    (found, _) = gd.postprocess(make_masks(), [(40, 60), (40, 60)])
    assert found["masks"].any()
    for mask, box in zip(found["masks"], found["boxes"].tolist(), strict=True):
        if mask.any():
            y, x = mask.nonzero(as_tuple=True)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        else:
            assert box == [0, 0, 0, 0]


def test_masks_with_low_scores_are_left_out():
    out = make_masks()
    everything, something = (gd.postprocess(out, [(9, 9)] * 2, score_threshold=t)[0] for t in (0.0, 0.2))
    kept = everything["scores"] >= 0.2
    assert 0 < kept.sum() < len(kept)
    assert {name: len(value) for name, value in something.items()} == dict.fromkeys(everything, kept.sum())


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 40), (0.3, 3), (0.9, 0)])
def test_memory_of_masks_is_that_of_those_to_be_returned(threshold, kept):
    """And of one at a time, while it is interpolated; 40 at once took 25 times as much."""
    out, size = make_masks(1, 40, 1), (1500, 2000)
    out.logits[-1, 0], out.mask_embeddings[-1, 0] = torch.tensor([-4.0, 4.0]), 20.0  # of certain pixels, and unlikely
    out.logits[-1, 0, :3] = torch.tensor([0.0, 0.5])
    out = SegmentationOutput(
        out.logits[:, :1], out.mask_embeddings[:, :1], out.mask_features[:1], out.padding[:1], out.groups
    )
    with patch.object(postprocess, "PIXELS_AT_ONCE", 1):
        found = []
        peak = peak_bytes(lambda: found.extend(gd.postprocess(out, [size], top_k=40, score_threshold=threshold)))
    assert found[0]["masks"].shape == (kept, *size)
    pixels = 1500 * 2000
    assert peak < (2 * kept + 12) * pixels


def test_masks_do_not_depend_on_how_many_are_made_at_once():
    out, sizes = make_masks(), [(101, 140), (32, 48)]
    expected = gd.postprocess(out, sizes, score_threshold=0.1)
    assert any(len(detection["scores"]) for detection in expected)
    with patch.object(postprocess, "PIXELS_AT_ONCE", 1):
        found = gd.postprocess(out, sizes, score_threshold=0.1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"image_sizes must have shape \[1, 2\], got \[2, 2\]"):
        gd.postprocess(make_output(), [(1, 1), (2, 2)])
