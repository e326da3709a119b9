"""Tiles find what is small, once, and the whole image what is larger than a tile."""

import itertools

import pytest
import torch
from blob_detector import BlobDetector, draw
from torchvision.ops import box_iou

import groupdetr_fast as gd
from groupdetr_fast.prediction.tiles import Place, Tiling

TILE = 64  # which the detector sees as it is


def small_objects(seed, height, width, count=30):
    """Objects of 8 to 12 pixels, so far from each other that they are apart in the reduced image, too."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(height, width, dtype=torch.bool)
    objects = []
    while len(objects) < count:
        label, x, y, w, h = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((0, 3), (2, width - 15), (2, height - 15), (8, 13), (8, 13))
        )
        if not taken[max(0, y - 10) : y + h + 10, max(0, x - 10) : x + w + 10].any():
            taken[y : y + h, x : x + w] = True
            objects.append((label, x, y, x + w, y + h))
    return objects


def assert_found(found, objects, tolerance=1.0):
    """Every object once, in its place, and nothing else."""
    assert len(found["boxes"]) == len(objects)
    rows = sorted((label, *box) for label, box in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True))
    for row, expected in zip(rows, sorted(objects), strict=True):
        assert row == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("merge", ["nmm", "nms"])
@pytest.mark.parametrize("seed", range(3))
def test_every_small_object_is_found_once(seed, merge):
    height, width = 200, 310
    objects = small_objects(seed, height, width)
    scene, model = draw(height, width, objects), BlobDetector()
    assert len(gd.predict(model, scene)["boxes"]) < 20, "which are too small in the whole image"
    found = gd.predict(model, scene, tile=TILE, tile_overlap=0.25, tile_merge=merge)
    assert_found(found, objects)
    assert (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize("merge", ["nmm", "nms"])
def test_a_part_of_an_object_is_in_the_whole_of_it_which_iou_does_not_see(merge):
    """The seam leaves a third of it to one tile and two thirds to the other."""
    whole, third, rest = (0, 56, 40, 80, 64), (0, 56, 40, 64, 64), (0, 64, 40, 80, 64)
    scene, settings = draw(128, 128, [whole]), {"tile": TILE, "tile_overlap": 0.0, "tile_merge": merge}
    assert_found(gd.predict(BlobDetector(), scene, **settings), [whole])
    for match, expected in ((0.3, [whole]), (0.5, [whole, third]), (0.7, [whole, third, rest])):
        found = gd.predict(BlobDetector(), scene, **settings, tile_metric="iou", tile_match=match)
        assert_found(found, expected)


@pytest.mark.parametrize(("merge", "metric"), [*itertools.product(("nmm", "nms"), ("ios", "iou"))])
def test_an_overlap_of_just_what_is_asked_for_is_enough(merge, metric):
    box, half = [0.0, 0, 10, 10], [0.0, 0, 10, 5] if metric == "iou" else [5.0, 0, 15, 10]
    found = [
        (Place(0, 0, 64, 64), {"scores": torch.tensor([s]), "labels": torch.tensor([0]), "boxes": torch.tensor([b])})
        for s, b in ((0.9, box), (0.8, half))
    ]
    assert len(Tiling(64, merge=merge, metric=metric, match=0.5).join(found, 64, 64)["boxes"]) == 1
    assert len(Tiling(64, merge=merge, metric=metric, match=0.501).join(found, 64, 64)["boxes"]) == 2


def test_without_overlap_a_seam_doubles_what_it_cuts():
    """That the scenes above are of the difficult kind."""
    objects = [(0, 95, 95, 107, 107)]
    scene, model = draw(192, 192, objects), BlobDetector()
    assert_found(gd.predict(model, scene, tile=TILE, tile_overlap=0.25), objects)
    assert_found(
        gd.predict(model, draw(128, 128, [(0, 58, 58, 70, 70)]), tile=TILE, tile_overlap=0.5), [(0, 58, 58, 70, 70)]
    )
    cut = gd.predict(model, draw(128, 128, [(0, 58, 58, 70, 70)]), tile=TILE, tile_overlap=0.0, tile_whole=False)
    assert len(cut["boxes"]) == 4


@pytest.mark.parametrize("merge", ["nmm", "nms"])
def test_what_is_larger_than_a_tile_survives_by_the_whole_image(merge):
    large, small = (1, 40, 30, 160, 140), (1, 200, 150, 210, 160)
    scene, model = draw(192, 256, [large, small]), BlobDetector()
    found = gd.predict(model, scene, tile=TILE, tile_merge=merge)
    assert_found(found, [large, small], tolerance=4)  # the whole image is reduced to a quarter
    parts = gd.predict(model, scene, tile=TILE, tile_merge=merge, tile_whole=False)
    assert len(parts["boxes"]) > 3


def test_objects_of_different_classes_do_not_merge():
    objects = [(0, 10, 10, 40, 40), (1, 12, 12, 38, 38)]
    found = gd.predict(BlobDetector(), draw(100, 100, objects), tile=TILE)
    assert_found(found, objects, tolerance=2)


def test_tiles_share_batches_also_with_those_of_other_images():
    model = BlobDetector()
    images = [draw(100, 100, [(0, 10, 10, 20, 20)]), draw(64, 64, [(1, 5, 5, 25, 25)]), draw(70, 120, [])]
    found = gd.predict(model, images, tile=TILE, batch_size=4)
    # 4 tiles and the whole image, 1 tile, 2 x 3 tiles and the whole image
    assert sum(shape[0] for shape in model.batches) == 5 + 1 + 7
    assert [shape[0] for shape in model.batches] == [4, 4, 4, 1]
    assert [each["class_names"] for each in found] == [["red"], ["green"], []]
    assert_found(found[0], [(0, 10, 10, 20, 20)])


def test_an_image_no_larger_than_a_tile_is_detected_in_once():
    model = BlobDetector()
    scene = draw(64, 50, [(0, 10, 10, 20, 20)])
    tiled, plain = gd.predict(model, scene, tile=TILE), gd.predict(model, scene)
    assert len(model.batches) == 2
    assert torch.equal(tiled["boxes"], plain["boxes"])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 64), (63, 300), (1000, 641), (128, 128), (200, 77)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_image_and_overlap_enough(height, width, overlap):
    places = Tiling(64, overlap, whole=False).places(height, width)
    seen = torch.zeros(height, width, dtype=torch.int64)
    for top, left, tall, wide in places:
        assert (tall, wide) == (min(64, height), min(64, width))
        seen[top : top + tall, left : left + wide] += 1
    assert seen.min() == 1
    for starts in ({place.left for place in places}, {place.top for place in places}):
        for one, other in itertools.pairwise(sorted(starts)):
            assert 64 - (other - one) >= round(overlap * 64) - 1
    step = 64 - round(overlap * 64)
    rows, columns = (1 + max(0, -(-(side - 64) // step)) for side in (height, width))
    assert len(places) == rows * columns, "no more than needed"
    whole = Tiling(64, overlap).places(height, width)
    assert whole == places or whole == [*places, Place(0, 0, height, width)]


def greedily(boxes, scores, labels, metric, match, merge):
    """SAHI's rule, in plain Python."""

    def area(box):
        return max(0, box[2] - box[0]) * max(0, box[3] - box[1])

    def overlap(one, other):
        inner = area((*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:])))
        return inner / (min(area(one), area(other)) if metric == "ios" else area(one) + area(other) - inner)

    left = sorted(range(len(boxes)), key=lambda index: -scores[index])
    result = []
    while left:
        first = left.pop(0)
        near = [i for i in left if labels[i] == labels[first] and overlap(boxes[first], boxes[i]) >= match]
        left = [i for i in left if i not in near]
        box = boxes[first]
        for index in near if merge == "nmm" else ():
            if overlap(box, boxes[index]) >= match:
                box = (*map(min, box[:2], boxes[index][:2]), *map(max, box[2:], boxes[index][2:]))
        result.append((labels[first], scores[first], box))
    return result


@pytest.mark.parametrize(("merge", "metric"), [*itertools.product(("nmm", "nms"), ("ios", "iou"))])
def test_detections_are_joined_by_the_rule_of_sahi(merge, metric):
    generator = torch.Generator().manual_seed(0)
    whole = Place(0, 0, 1000, 1000)
    for count in (0, 1, 60):
        corner, size = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
        boxes = torch.cat((60 + 40 * corner, 60 + 40 * corner + 5 + 30 * size), dim=1)
        scores = torch.rand(count, generator=generator, dtype=torch.float64)
        labels = torch.randint(2, (count,), generator=generator)
        halves = [
            {"scores": scores[part], "labels": labels[part], "boxes": boxes[part]}
            for part in (slice(None, count // 2), slice(count // 2, None))
        ]
        tiling = Tiling(500, merge=merge, metric=metric, match=0.4)
        found = tiling.join([(whole, half) for half in halves], 1000, 1000)
        expected = greedily(*(each.tolist() for each in (boxes, scores, labels)), metric, 0.4, merge)
        assert found["labels"].tolist() == [row[0] for row in expected]
        assert found["scores"].tolist() == pytest.approx([row[1] for row in expected])
        for box, row in zip(found["boxes"].tolist(), expected, strict=True):
            assert box == pytest.approx(row[2])
        assert count < 60 or len(expected) < 50


def test_parts_at_a_seam_do_not_take_the_place_of_the_whole():
    """The part is surer than the whole, and two parts do not overlap each other."""
    place, other = Place(0, 0, 64, 64), Place(0, 64, 64, 64)
    part, rest = [[30.0, 10, 64, 40]], [[0.0, 10, 36, 40]]
    whole = [[30.0, 10, 100, 40]]
    label = torch.tensor([1])
    found = Tiling(64).join(
        [
            (place, {"scores": torch.tensor([0.9]), "labels": label, "boxes": torch.tensor(part)}),
            (other, {"scores": torch.tensor([0.8]), "labels": label, "boxes": torch.tensor(rest)}),
            (Place(0, 0, 64, 128), {"scores": torch.tensor([0.7]), "labels": label, "boxes": torch.tensor(whole)}),
        ],
        64,
        128,
    )
    assert found["boxes"].tolist() == whole
    assert found["scores"].tolist() == pytest.approx([0.9])
    assert box_iou(found["boxes"], torch.tensor(whole)).item() == 1


def test_masks_are_pasted_and_joined():
    left, right = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    left[0, 2:5, 4:8] = True
    right[0, 2:5, 0:6] = True
    detections = [
        (
            Place(0, column, 8, 8),
            {
                "scores": torch.tensor([score]),
                "labels": torch.tensor([0]),
                "boxes": torch.tensor([box]),
                "masks": mask,
            },
        )
        for column, score, box, mask in (
            (0, 0.6, [4.0, 2, 8, 5], left),
            (5, 0.8, [0.0, 2, 6, 5], right),
        )
    ]
    found = Tiling(8).join(detections, 8, 13)
    assert found["boxes"].tolist() == [[4, 2, 11, 5]]
    expected = torch.zeros(1, 8, 13, dtype=torch.bool)
    expected[0, 2:5, 4:11] = True
    assert torch.equal(found["masks"], expected)
    assert found["scores"].tolist() == pytest.approx([0.8])
    kept = Tiling(8, merge="nms").join(detections, 8, 13)
    assert kept["masks"].sum() == 18


def test_a_model_of_masks_in_tiles():
    model = gd.build_model(
        "mask2former_r50",
        num_classes=3,
        num_groups=1,
        num_queries=5,
        d_model=32,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        dim_feedforward=32,
        encoder_dim_feedforward=32,
        backbone="conv:8-16-16-16",
    )
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    found = gd.predict(
        model, image, tile=TILE, settings=BlobDetector().inference_settings, score_threshold=0.0, top_k=3
    )
    assert found["masks"].shape == (len(found["scores"]), 70, 90)
    assert len(found["scores"]) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 4}, "tile must be at least 8 pixels, got 4"),
        ({"tile": 64, "tile_overlap": 1.0}, r"tile_overlap must be in \[0, 1\), got 1.0"),
        ({"tile": 64, "tile_overlap": -0.1}, "tile_overlap must be in"),
        ({"tile": 64, "tile_match": 0.0}, r"tile_match must be in \(0, 1\], got 0.0"),
        ({"tile": 64, "tile_merge": "wbf"}, 'tile_merge must be "nmm" or "nms", got \'wbf\''),
        ({"tile": 64, "tile_metric": "giou"}, "tile_metric must be"),
    ],
)
def test_settings_that_make_no_tiles(settings, message):
    with pytest.raises(ValueError, match=message):
        gd.predict(BlobDetector(), draw(64, 64, []), **settings)
