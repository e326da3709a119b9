// Sorts the samples of multi-scale deformable attention by the pixels that they touch.
//
// The samples of an image and head are counted by bin, which gives each its rank in its bin (an atomic), then the
// counts are summed up, then each sample is written to its place. ms_deform_attn_chunks.cuh counts and writes another
// way, in shared memory. Either way the order of a bin's samples depends on that in which atomics arrive; for results
// that are the same in every run the samples of a bin are put into the order of queries and points.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_chunks.cuh"

namespace groupdetr {
namespace {

constexpr int kSortGroup = kMinGroup;  // lanes for a query and head
constexpr int kScanThreads = 512, kScanItems = 8;

// Where a sample lies; its bin is -1 if it touches no pixel.
template <typename A, int kCells>
struct LocatedSample {
  int32_t bin;
  A x, y;  // in pixels

  __device__ __forceinline__ LocatedSample(const DeformProblem& p, const DeformBins& bins, int32_t level,
                                           const A* location, bool exists) {
    const A width = static_cast<A>(p.level[level].width), height = static_cast<A>(p.level[level].height);
    x = exists ? to_pixels(__ldg(location), width) : A(-1);
    y = exists ? to_pixels(__ldg(location + 1), height) : A(-1);
    const bool inside = is_inside(x, y, width, height);
    bin = inside ? bins.start[level] + cell_on_axis(y) * bins_in_row<kCells>(p.level[level].width) +
                       cell_on_axis(x) / kCells
                 : -1;
  }
};

// Counts the samples of each bin, and gives them their ranks. Gradients of samples that touch no pixel become 0,
// unless their pointers are null.
template <typename A, int kCells>
__global__ void __launch_bounds__(kDeformThreads)
    deform_count(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformBins bins,
                 const A* __restrict__ locations, int32_t* __restrict__ counts, int32_t* __restrict__ ranks,
                 A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  const DeformGroup group = own_group(kSortGroup);
  const int64_t items = static_cast<int64_t>(p.queries) * p.heads, item = own_item(group);
  if (item >= items) return;
  const int32_t head = static_cast<int32_t>(item) % p.heads, samples = p.levels * p.points;
  for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    int32_t* const of_map = counts + (static_cast<int64_t>(image) * p.heads + head) * (bins.count + 1);
    const int64_t begin = (image * items + item) * samples;
    for (int32_t first = group.lane; first < samples; first += kSortGroup * kAtOnce) {
      int32_t bin[kAtOnce], rank[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t index = first + k * kSortGroup;
        const bool exists = index < samples;
        bin[k] =
            LocatedSample<A, kCells>(p, bins, exists ? index / p.points : 0, locations + (begin + index) * 2, exists)
                .bin;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (bin[k] >= 0) rank[k] = atomicAdd(&of_map[bin[k]], 1);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t place = begin + first + k * kSortGroup;
        if (bin[k] >= 0) {
          ranks[place] = rank[k];
        } else if (grad_weights != nullptr && first + k * kSortGroup < samples) {
          grad_locations[place * 2] = grad_locations[place * 2 + 1] = grad_weights[place] = A(0);
        }
      }
    }
  }
}

// Turns the counts of each map into the starts of its bins, and the last of them, which is 0, into the number of
// samples. A block has one map at a time.
__global__ void __launch_bounds__(kScanThreads) deform_scan(int64_t bins, int64_t maps, int32_t* __restrict__ counts) {
  constexpr int32_t kWarps = kScanThreads / kWarpSize;
  static __shared__ int32_t totals[kWarps];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int64_t map = blockIdx.x; map < maps; map += gridDim.x) {
    int32_t* const of_map = counts + map * (bins + 1);
    int32_t before = 0;
    for (int64_t first = 0; first <= bins; first += kScanThreads * kScanItems) {
      const int64_t begin = first + threadIdx.x * kScanItems;
      int32_t items[kScanItems], sum = 0;
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        items[k] = begin + k <= bins ? of_map[begin + k] : 0;
        sum += items[k];
      }
      int32_t up_to_lane = sum;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int32_t lower = __shfl_up_sync(kAllLanes, up_to_lane, step);
        if (lane >= step) up_to_lane += lower;
      }
      if (lane == kWarpSize - 1) totals[warp] = up_to_lane;
      __syncthreads();
      int32_t start = before + up_to_lane - sum;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) start += totals[w];
        before += totals[w];
      }
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        if (begin + k <= bins) of_map[begin + k] = start;
        start += items[k];
      }
      __syncthreads();
    }
  }
}

// Writes every sample that touches its map to its place among the sorted ones.
template <typename A, int kCells>
__global__ void __launch_bounds__(kDeformThreads)
    deform_scatter(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformBins bins,
                   const A* __restrict__ locations, const A* __restrict__ weights, const int32_t* __restrict__ starts,
                   const int32_t* __restrict__ ranks, SortedSample<A>* __restrict__ sorted) {
  const DeformGroup group = own_group(kSortGroup);
  const int64_t items = static_cast<int64_t>(p.queries) * p.heads, item = own_item(group);
  if (item >= items) return;
  const int32_t query = static_cast<int32_t>(item) / p.heads, head = static_cast<int32_t>(item) % p.heads;
  const int32_t samples = p.levels * p.points;
  for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    const int64_t map = static_cast<int64_t>(image) * p.heads + head;
    const int32_t* const of_map = starts + map * (bins.count + 1);
    SortedSample<A>* const to = sorted + map * p.queries * samples;
    const int64_t begin = (image * items + item) * samples;
    for (int32_t first = group.lane; first < samples; first += kSortGroup * kAtOnce) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t index = first + k * kSortGroup;
        const bool exists = index < samples;
        const LocatedSample<A, kCells> own(p, bins, exists ? index / p.points : 0, locations + (begin + index) * 2,
                                           exists);
        if (own.bin < 0) continue;
        to[__ldg(of_map + own.bin) + __ldg(ranks + begin + index)] = {own.x, own.y, __ldg(weights + begin + index),
                                                                      query * samples + index};
      }
    }
  }
}

// Puts the samples of each bin into the order of their indices. A thread has one sample at a time.
template <typename A>
__global__ void __launch_bounds__(kDeformThreads)
    deform_order(int64_t bins, int64_t maps, int64_t samples_of_map, const int32_t* __restrict__ starts,
                 const SortedSample<A>* __restrict__ sorted, SortedSample<A>* __restrict__ ordered) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kDeformThreads + threadIdx.x;
  for (int64_t map = blockIdx.y; map < maps; map += gridDim.y) {
    const int32_t* const of_map = starts + map * (bins + 1);
    if (own >= of_map[bins]) continue;
    int64_t bin = 0;  // the last one that starts at or before the sample
    for (int64_t end = bins; end - bin > 1;) {
      const int64_t middle = (bin + end) / 2;
      (of_map[middle] <= own ? bin : end) = middle;
    }
    const SortedSample<A>* const from = sorted + map * samples_of_map;
    const SortedSample<A> sample = from[own];
    int32_t place = of_map[bin];
    for (int32_t other = of_map[bin]; other < of_map[bin + 1]; ++other) place += from[other].index < sample.index;
    ordered[map * samples_of_map + place] = sample;
  }
}

// The first error among calls that are made one after another.
template <typename... Calls>
cudaError_t until_error(const Calls&... calls) {
  cudaError_t status = cudaSuccess;
  static_cast<void>((((status = calls()) == cudaSuccess) && ...));
  return status;
}

// Sorts the samples into `scratch.samples`, or into `scratch.ordered`.
template <int kCells = 1, typename A>
cudaError_t launch_deform_sort(const DeformProblem& p, const A* locations, const A* weights, A* grad_locations,
                               A* grad_weights, const DeformScratch<A>& scratch, cudaStream_t stream) {
  const DeformBins bins = bins_of<kCells>(p);
  const int64_t maps = maps_of(p), samples = samples_of_map(p), items = static_cast<int64_t>(p.queries) * p.heads;
  constexpr int32_t kItems = kDeformThreads / kSortGroup;
  const bool in_chunks = scratch.offsets != nullptr;
  const DeformChunks chunks = in_chunks ? chunks_of<kCells>(p) : DeformChunks{};
  return until_error(
      [&] { return cudaMemsetAsync(scratch.starts, 0, starts_size<kCells>(p) * sizeof(int32_t), stream); },
      [&] {
        return in_chunks ? launch_deform_chunks(&deform_count_chunks<A, kCells>, p, chunks, stream, bins, locations,
                                                scratch.starts, scratch.offsets, grad_locations, grad_weights)
                         : launch_deform(&deform_count<A, kCells>, items, kItems, p.images, stream, p, bins, locations,
                                         scratch.starts, scratch.ranks, grad_locations, grad_weights);
      },
      [&] { return launch_deform<kScanThreads>(&deform_scan, maps, 1, 1, stream, bins.count, maps, scratch.starts); },
      [&] {
        return in_chunks ? launch_deform_chunks(&deform_scatter_chunks<A, kCells>, p, chunks, stream, bins, locations,
                                                weights, scratch.starts, scratch.offsets, scratch.samples)
                         : launch_deform(&deform_scatter<A, kCells>, items, kItems, p.images, stream, p, bins,
                                         locations, weights, scratch.starts, scratch.ranks, scratch.samples);
      },
      [&] {
        if (scratch.ordered == nullptr) return cudaSuccess;
        return launch_deform(&deform_order<A>, samples, kDeformThreads, maps, stream, bins.count, maps, samples,
                             scratch.starts, scratch.samples, scratch.ordered);
      });
}

}  // namespace
}  // namespace groupdetr
