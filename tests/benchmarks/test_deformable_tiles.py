"""Walks over sorted samples of deformable attention."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpu import deformable_tiles, loops
from gpu.operators import goes_by_tiles, sorts_samples
from harness import cases

CASE = replace(cases.Deformable(40, near=True), batch=1, heads=2, levels=((5, 7), (3, 1)), points=3)


@pytest.mark.parametrize(("cells", "run", "at_once"), [(3, 16, 4), (1, 5, 1), (2, 1000, 16)])
def test_walks_are_those_of_a_walk_sample_by_sample(cells, run, at_once):
    samples = turns = beginnings = pixels = 0
    locations = CASE.make()[1].detach().numpy()
    for head in range(CASE.heads):
        walk = sorted(bins_of(locations[0, :, head], cells))
        samples += len(walk)
        for first in range(0, len(walk), run):
            piece = walk[first : first + run]
            for one in set(piece):
                level, row, column = one
                height, width = CASE.levels[level]
                turns += math.ceil(piece.count(one) / at_once)
                beginnings += 1
                rows = [y for y in (row, row + 1) if 0 <= y < height]
                columns = [x for x in range(column * cells - 1, column * cells + cells) if 0 <= x < width]
                pixels += len(rows) * len(columns)
    found = deformable_tiles._walks(CASE, cells, run=run, at_once=at_once)
    assert found[:4] == (samples, turns, beginnings, pixels)
    assert samples < locations.size / 2  # some lie outside


@pytest.mark.parametrize(("least", "queries"), [(1, 4), (100, 14), (10000, 40)])
def test_a_chunk_counts_each_of_its_bins_once(monkeypatch, least, queries):
    """The maps have 6 * 3 + 4 = 22 bins of three cells, and a query has 6 samples; chunks are of one size."""
    constants = {"kLeastSamples": least, "kMostSamples": least, "kBlocksOfImage": 132}
    monkeypatch.setattr(deformable_tiles, "constant", constants.__getitem__)
    locations = CASE.make()[1].detach().numpy()
    expected = sum(
        len(set(bins_of(locations[0, first : first + queries, head], 3)))
        for head in range(CASE.heads)
        for first in range(0, 40, queries)
    )
    assert deformable_tiles._walks(CASE, 3, run=16, at_once=4).counts == expected


def bins_of(locations, cells):
    for query, level, point in np.ndindex(locations.shape[:-1]):
        height, width = CASE.levels[level]
        x, y = locations[query, level, point] * np.float32([width, height]) - np.float32(0.5)
        if -1 <= math.floor(x) < width and -1 <= math.floor(y) < height:
            yield level, math.floor(y), (math.floor(x) + 1) // cells


def test_what_tiles_are_for():
    by_name = {str(case): goes_by_tiles(case) for case in cases.GPU_DEFORMABLE}
    assert by_name == {"encoder near": True, "encoder": True, "decoder2700 near": False, "decoder9900 near": True}
    assert not goes_by_tiles(cases.GPU_DEFORMABLE[0], torch.float32)
    assert loops.constant("kSamplesOfPixel") == 4
    assert all(sorts_samples(case, shared_sort=True) for case in cases.GPU_DEFORMABLE)
    assert not sorts_samples(replace(cases.GPU_DEFORMABLE[0], queries=900), shared_sort=True)


def test_a_walk_and_its_constants():
    tiles, found = deformable_tiles.by_tile(CASE), deformable_tiles.by_cell(CASE)
    assert tiles.samples == found.samples == found.turns
    assert tiles.turns <= tiles.samples
