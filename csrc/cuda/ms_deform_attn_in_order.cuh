// The gradient of value of multi-scale deformable attention in a fixed order of additions.
//
// The four cells around a pixel lie in two runs of the sorted samples. A warp adds these up and writes the pixel's
// gradient once, in the type of value.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_sorting.cuh"

namespace groupdetr {
namespace {

constexpr int kTile = kDeformThreads / kWarpSize;  // height and width, in pixels, of what a block sums up

template <typename A>
struct WeightedQuery {
  A weight;
  int32_t query;
};

// The weight, along an axis, of a pixel that is less than one away.
template <typename A>
__device__ __forceinline__ A weight_at(A position, int32_t pixel) {
  const A distance = position - static_cast<A>(pixel);
  return A(1) - (distance < A(0) ? -distance : distance);
}

// Sums up the gradient of value in the order of the sorted samples. A block has a square of pixels, whose cells it
// reads several times, and a warp one of its columns, pixel by pixel; its groups of lanes take turns with the samples.
template <typename T, int kVector>
__global__ void __launch_bounds__(kDeformThreads, 8)
    deform_gather(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformBins cells, int32_t group_size,
                  const int32_t* __restrict__ starts, const SortedSample<DeformArithmetic<T>>* __restrict__ sorted,
                  const T* __restrict__ grad_out, T* __restrict__ grad_value) {
  using A = DeformArithmetic<T>;
  static __shared__ WeightedQuery<A> queries_of_block[kTile][kWarpSize];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  WeightedQuery<A>* const queries = queries_of_block[warp];
  const DeformGroup group = own_group(group_size);
  const int32_t row_size = p.heads * p.channels, samples = p.levels * p.points;
  // Levels with few pixels have the longest sums, and come first.
  int32_t level = p.levels, tile = blockIdx.x, tiles_in_row = 0;
  for (int32_t tiles = 0;; tile -= tiles) {
    if (--level < 0) return;
    tiles_in_row = (p.level[level].width + kTile - 1) / kTile;
    tiles = tiles_in_row * ((p.level[level].height + kTile - 1) / kTile);
    if (tile < tiles) break;
  }
  const DeformLevel& size = p.level[level];
  const int32_t first_row = tile / tiles_in_row * kTile, column = tile % tiles_in_row * kTile + warp;
  if (column >= size.width) return;
  for (int64_t map = blockIdx.y; map < static_cast<int64_t>(p.images) * p.heads; map += gridDim.y) {
    const int64_t image = map / p.heads, head = map % p.heads;
    const T* const grads = grad_out + image * p.queries * row_size + head * p.channels;
    const SortedSample<A>* const of_map = sorted + map * p.queries * samples;
    for (int32_t row = first_row; row < min(first_row + kTile, size.height); ++row) {
      // Of the cells above and below the pixel, those left and right of it: two runs of samples.
      const int32_t* const above =
          starts + map * (cells.count + 1) + cells.start[level] + static_cast<int64_t>(row) * (size.width + 1) + column;
      const int32_t* const below = above + size.width + 1;
      const int32_t above_begin = above[0], above_count = above[2] - above_begin;
      const int32_t below_begin = below[0], count = above_count + below[2] - below_begin;
      const int64_t pixel = image * p.pixels + size.start + static_cast<int64_t>(row) * size.width + column;
      for (int32_t chunk = 0; chunk < p.channels; chunk += group.size * kVector) {
        const int32_t channel = chunk + group.lane * kVector;
        const bool has_channels = channel < p.channels;
        A sums[kVector] = {};
        for (int32_t first = 0; first < count; first += kWarpSize) {
          const int32_t own = first + lane;
          if (own < count) {
            const bool is_above = own < above_count;
            const SortedSample<A> sample = of_map[is_above ? above_begin + own : below_begin + own - above_count];
            const A weight = sample.attention * weight_at(sample.x, column) * weight_at(sample.y, row);
            queries[lane] = {weight, sample.index / samples};
          }
          __syncwarp();
          const int32_t end = min(kWarpSize, count - first);
#pragma unroll 4
          for (int32_t s = lane / group.size; s < end; s += kWarpSize / group.size) {
            if (!has_channels) continue;
            const WeightedQuery<A> query = queries[s];
            A values[kVector];
            load_channels<kVector>(grads + static_cast<int64_t>(query.query) * row_size + channel, values);
#pragma unroll
            for (int k = 0; k < kVector; ++k) sums[k] += query.weight * values[k];
          }
          __syncwarp();
        }
        for (int32_t step = group.size; step < kWarpSize; step *= 2) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) sums[k] += __shfl_xor_sync(kAllLanes, sums[k], step);
        }
        if (lane < group.size && has_channels) {
          store_channels<kVector>(grad_value + pixel * row_size + head * p.channels + channel, sums);
        }
      }
    }
  }
}

inline int64_t tiles_of(const DeformProblem& p) {
  int64_t tiles = 0;
  for (int32_t level = 0; level < p.levels; ++level) {
    const int64_t rows = (p.level[level].height + kTile - 1) / kTile,
                  columns = (p.level[level].width + kTile - 1) / kTile;
    tiles += rows * columns;
  }
  return tiles;
}

}  // namespace

// Writes the gradient of value, bit by bit the same in every run.
template <typename T>
cudaError_t launch_deform_grad_value_in_order(const DeformProblem& p, const DeformArithmetic<T>* locations,
                                              const DeformArithmetic<T>* weights, const T* grad_out, T* grad_value,
                                              const DeformScratch<DeformArithmetic<T>>& scratch, cudaStream_t stream) {
  if (maps_of(p) == 0) return cudaSuccess;
  const bool vectors = vectors_fit<T>(p, grad_out, grad_value);
  const auto gather = vectors ? &deform_gather<T, kVectorSize<T>> : &deform_gather<T, 1>;
  DeformArithmetic<T>* const no_gradients = nullptr;
  return until_error(
      [&] { return launch_deform_sort(p, locations, weights, no_gradients, no_gradients, scratch, stream); },
      [&] {
        return launch_deform(gather, tiles_of(p), 1, maps_of(p), stream, p, bins_of(p),
                             deform_group_size(p, vectors ? kVectorSize<T> : 1), scratch.starts, scratch.ordered,
                             grad_out, grad_value);
      });
}

}  // namespace groupdetr
