import torch
from torch.nn import functional as F

from groupdetr_fast.losses.points import _smallest, sample_maps, sample_masks, uncertain_points


def test_samples_are_bilinear():
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    # cell centres at 0.25 and 0.75; the middle of all four; a corner, where three of the four neighbours are outside
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [1.0, 1.0]]])
    expected = torch.tensor([[[0.0, 1.0, 2.0, 1.5, 0.75]]])
    torch.testing.assert_close(sample_maps(maps, points), expected)


def test_interpolating_features_or_masks_is_the_same():
    """The products of embeddings with sampled features are samples of the products."""
    embeddings, features, points = torch.randn(1, 6, 8), torch.randn(1, 8, 9, 7), torch.rand(1, 50, 2)
    masks = torch.einsum("bqd,bdhw->bqhw", embeddings, features)
    torch.testing.assert_close(embeddings @ sample_maps(features, points), sample_maps(masks, points))


def test_masks_smaller_than_the_frame_are_those_padded_to_it():
    masks, points = torch.rand(3, 13, 21) < 0.5, torch.rand(3, 400, 2)
    padded = F.pad(masks, (0, 11, 0, 19)).float()[:, None]
    expected = sample_maps(padded, points)[:, 0]
    assert (expected == 0).any()
    torch.testing.assert_close(sample_masks(masks, points, (32, 32)), expected)


def test_points_are_drawn_where_the_mask_is_uncertain():
    x = (torch.arange(64) + 0.5) / 64
    edges = torch.tensor([0.25, 0.5])
    logits = (20 * (x - edges[:, None]))[:, None, None, :].expand(2, 1, 64, 64)  # zero along a vertical line
    points = uncertain_points(logits, 1000, 3.0, 0.75)
    assert points.shape == (2, 1000, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    for own, edge in zip(points, edges, strict=True):
        distance = (own[:, 0] - edge).abs()
        # the 750 of 3000 uniform points that are nearest lie in a band that is a quarter of the image wide
        near = distance < 0.14
        assert near[:750].float().mean() > 0.95  # not all: logits fade to zero at the borders, too
        assert 0.2 < near[750:].float().mean() < 0.36  # the others are uniform


def test_of_equal_logits_those_are_kept_that_topk_keeps():
    """And where there are none, the smallest; with one, all and none of them to keep."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20, 300, generator=generator)
    values[::2] = (values[::2] * 20).round()
    for count in (0, 1, 60, 300):
        kept = _smallest(values, count).sort(1).values
        expected = (-values).topk(count, dim=1).indices.sort(1).values
        assert torch.equal(kept, expected)


def test_no_masks():
    assert uncertain_points(torch.zeros(0, 1, 8, 8), 10, 3.0, 0.75).shape == (0, 10, 2)
    assert sample_masks(torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0, 10, 2), (8, 8)).shape == (0, 10)
