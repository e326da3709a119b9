"""How often the walks over sorted samples of deformable attention's backward pass go on, and sorting counts in memory.

    python benchmarks deformable_tiles

Of the kernel on tensor cores (csrc/cuda/ms_deform_attn_tiles.cuh), which sorts samples by tile, and of the other one
(ms_deform_attn_sorted.cuh), which sorts them by cell: counted from the samples of the cases that a GPU is timed with,
without one.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from harness import cases

from .loops import constant
from .operators import goes_by_tiles


class Walks(NamedTuple):
    """What the walks over the samples of all images and heads do.

    ``samples`` are those that touch their map. ``turns`` are how often some of one bin are taken together,
    ``beginnings`` how often another bin begins, ``pixels`` how many pixels get sums in memory where bins end.
    ``counts`` are how often sorting in shared memory (ms_deform_attn_chunks.cuh) adds to a count in memory, which other
    sorting does for each sample.
    """

    samples: int
    turns: int
    beginnings: int
    pixels: int
    counts: int


def by_tile(case: cases.Deformable) -> Walks:
    cells = constant("kTileCells")
    return _walks(case, cells, run=constant("kTileRun"), at_once=constant("kChunk"))


def by_cell(case: cases.Deformable) -> Walks:
    return _walks(case, 1, run=constant("kRun"), at_once=1)


def _walks(case: cases.Deformable, cells: int, *, run: int, at_once: int) -> Walks:
    counts = np.zeros(len(Walks._fields), int)
    for bins, queries, pixels_of_bin in _bins(case, cells):
        chunks = queries // _queries_of_chunk(case, len(pixels_of_bin))
        chunk_counts = len(np.unique(np.stack([chunks, bins]), axis=1).T)
        bins = np.sort(bins)
        # Walks of `run` samples each; within a walk, samples of one bin are neighbours.
        pieces = np.stack([np.arange(len(bins)) // run, bins])
        (_, found), numbers = np.unique(pieces, axis=1, return_counts=True)
        turns = (-(-numbers // at_once)).sum()
        counts += (len(bins), turns, len(numbers), pixels_of_bin[found].sum(), chunk_counts)
    return Walks(*map(int, counts))


def _queries_of_chunk(case: cases.Deformable, bins: int) -> int:
    """As ``chunks_of`` in csrc has it."""
    samples = len(case.levels) * case.points
    queries = case.queries or sum(height * width for height, width in case.levels)
    wanted = queries * samples * case.heads // constant("kBlocksOfImage")
    wanted = max(min(max(wanted, constant("kLeastSamples")), constant("kMostSamples")), bins)
    count = -(-queries // max(-(-wanted // samples), 1))
    return -(-queries // count)


def _bins(case: cases.Deformable, cells: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image and head: bins and queries of the samples that touch their map; how many pixels of it a bin has."""
    _, locations, _ = case.make()
    sizes = np.array(case.levels)[:, ::-1]  # widths first
    places = locations.detach().numpy() * sizes[:, None].astype(np.float32) - np.float32(0.5)
    corners = np.floor(places).astype(int)  # [images, queries, heads, levels, points, 2]
    pixels, starts = [], []
    for width, height in sizes:
        starts.append(sum(map(len, pixels)))
        columns = np.arange(width // cells + 1) * cells - 1
        in_columns = np.minimum(columns + cells, width - 1) - np.maximum(columns, 0) + 1
        rows = np.arange(height + 1) - 1
        in_rows = np.minimum(rows + 1, height - 1) - np.maximum(rows, 0) + 1
        pixels.append(np.outer(in_rows, in_columns).ravel())
    bins_in_row = sizes[:, 0] // cells + 1
    x, y = corners[..., 0], corners[..., 1]
    touches = ((corners >= -1) & (corners < sizes[:, None])).all(-1)
    bins = np.array(starts)[:, None] + (y + 1) * bins_in_row[:, None] + (x + 1) // cells
    pixels_of_bin = np.concatenate(pixels)
    for image in range(bins.shape[0]):
        for head in range(bins.shape[2]):
            touching = touches[image, :, head]
            yield bins[image, :, head][touching], np.nonzero(touching)[0], pixels_of_bin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("  ".join(["case", "by", *Walks._fields]))
    for case in cases.GPU_DEFORMABLE:
        if goes_by_tiles(case):
            for name, count in (("tile", by_tile), ("cell", by_cell)):
                print("  ".join(map(str, [case, name, *count(case)])))
