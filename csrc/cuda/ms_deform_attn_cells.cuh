// What sorting the samples of multi-scale deformable attention is about: bins of cells, and where samples lie.
//
// A sample touches the four pixels around it, those of a cell, the square between four neighbouring pixels. A bin is a
// cell, or several of a row.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_samples.cuh"

namespace groupdetr {

// Cells of a level with height x width pixels: (height + 1) x (width + 1), since samples between the rim of a map and
// its first pixels touch it too. Cell (row, column) has pixels of rows row - 1 and row, columns column - 1 and column.
// The cells of a row are in bins of kCells; the last one may have fewer.
struct DeformBins {
  int32_t start[kMaxDeformLevels];  // the level's first bin
  int64_t count;
};

template <int kCells>
__host__ __device__ constexpr int32_t bins_in_row(int32_t width) {
  return width / kCells + 1;
}

template <int kCells = 1>
DeformBins bins_of(const DeformProblem& p) {
  DeformBins bins = {};
  for (int32_t level = 0; level < p.levels; ++level) {
    const DeformLevel& map = p.level[level];
    bins.start[level] = static_cast<int32_t>(bins.count);
    if (map.height > 0 && map.width > 0) bins.count += (map.height + int64_t{1}) * bins_in_row<kCells>(map.width);
  }
  return bins;
}

template <typename A>
struct alignas(16) SortedSample {
  A x, y;  // in pixels
  A attention;
  int32_t index;  // in its image and head: of [queries, levels, points]
};

// Memory that sorting needs; contents do not matter.
template <typename A>
struct DeformScratch {
  int32_t* starts;           // [images, heads, bins + 1]
  int32_t* ranks;            // [images, queries, heads, levels, points], or null
  int32_t* offsets;          // of offsets_size() numbers, or null: then the ranks tell where samples go
  SortedSample<A>* samples;  // [images, heads, queries * levels * points]
  SortedSample<A>* ordered;  // the same, or null if the order may differ from run to run
};

inline int64_t maps_of(const DeformProblem& p) { return static_cast<int64_t>(p.images) * p.heads; }
inline int64_t samples_of_map(const DeformProblem& p) { return static_cast<int64_t>(p.queries) * p.levels * p.points; }
template <int kCells = 1>
int64_t starts_size(const DeformProblem& p) {
  return maps_of(p) * (bins_of<kCells>(p).count + 1);
}

namespace {

// The cell, of a row or column of them, that has a position in pixels.
template <typename A>
__device__ __forceinline__ int32_t cell_on_axis(A position) {
  const int32_t truncated = static_cast<int32_t>(position);
  return truncated + 1 - static_cast<int32_t>(static_cast<A>(truncated) > position);
}

}  // namespace
}  // namespace groupdetr
