// Counts the samples of multi-scale deformable attention by bin, and writes them to their places, in shared memory.
//
// A block has a chunk, the samples of one head and of some queries side by side. First every block counts the samples
// of its chunk by bin in shared memory, and adds its counts to those of the whole map, which tells it how many samples
// of other chunks come before its own in each bin (one atomic for a bin and chunk, where ms_deform_attn_sorting.cuh has
// one for a sample). When the counts are summed up, every block copies to shared memory where its samples of each bin
// begin, and moves on from there, sample by sample.
//
// Where a map has more bins than shared memory has room for, several blocks have the same chunk, and each of them a
// window of the bins. Free of torch: pointers and sizes only.
#pragma once

#include <algorithm>

#include "ms_deform_attn_cells.cuh"

extern __shared__ double dynamic_shared_memory[];

namespace groupdetr {

// How the samples of a map are shared out among blocks.
struct DeformChunks {
  int32_t queries, count;        // of a chunk, and how many chunks there are
  int32_t window_bins, windows;  // bins of a window, and how many windows there are
};

namespace {

constexpr int kAtOnce = 4;      // samples that a lane works on at once
constexpr int kBinsAtOnce = 8;  // the same of bins
constexpr int kChunkThreads = 512;
constexpr int64_t kLeastSamples = 4096, kMostSamples = 16384;  // of a chunk, unless there are more bins
constexpr int64_t kBlocksOfImage = 132;                        // wanted, of chunks that have more than the least
constexpr int64_t kWindowBins = 12 << 10;  // 48 KiB of shared memory, which every GPU gives without asking

// As many share a multiprocessor as registers allow without spills.
template <typename A>
constexpr int kChunkBlocks = sizeof(A) == sizeof(float) ? 3 : 2;

}  // namespace

// A block has to add up, or to copy, the counts of all bins, which should not take longer than its samples do: a chunk
// has as many samples as bins. That also bounds the memory of `offsets`, by a number for a sample and one for a bin.
template <int kCells = 1>
DeformChunks chunks_of(const DeformProblem& p) {
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t bins = bins_of<kCells>(p).count, samples = std::max(p.levels * p.points, 1);
  const int64_t for_blocks = std::clamp(samples_of_map(p) * p.heads / kBlocksOfImage, kLeastSamples, kMostSamples);
  const int64_t most_queries = std::max<int64_t>(parts(std::max(for_blocks, bins), samples), 1);
  const int64_t count = parts(p.queries, most_queries);
  // As many windows as it takes, of as many bins each.
  const int64_t window_bins = bins == 0 ? 1 : parts(bins, parts(bins, kWindowBins));
  const int64_t windows = std::max<int64_t>(parts(bins, window_bins), 1);
  return {static_cast<int32_t>(count == 0 ? 0 : parts(p.queries, count)), static_cast<int32_t>(count),
          static_cast<int32_t>(window_bins), static_cast<int32_t>(windows)};
}

// Whether chunks should serve. Each window of the bins reads all samples again.
template <int kCells = 1>
bool fits_chunks(const DeformProblem& p) {
  constexpr int32_t kMostWindows = 4;
  return chunks_of<kCells>(p).windows <= kMostWindows;
}

// Of [images, heads, chunks, bins].
template <int kCells = 1>
int64_t offsets_size(const DeformProblem& p) {
  return maps_of(p) * chunks_of<kCells>(p).count * bins_of<kCells>(p).count;
}

namespace {

// What a block has to do: its chunk of the queries, and its window of the bins.
struct ChunkOfBlock {
  int32_t chunk, first_query, queries, first_bin, bins;

  __device__ __forceinline__ ChunkOfBlock(const DeformProblem& p, const DeformBins& of_map,
                                          const DeformChunks& chunks) {
    chunk = static_cast<int32_t>(blockIdx.x);
    first_query = chunk * chunks.queries;
    queries = min(chunks.queries, p.queries - first_query);
    first_bin = static_cast<int32_t>(blockIdx.z) * chunks.window_bins;
    bins = static_cast<int32_t>(min(int64_t{chunks.window_bins}, of_map.count - first_bin));
  }

  // Whether a bin is in the window, counted from its first one.
  __device__ __forceinline__ bool has(int32_t bin_of_window) const {
    return static_cast<uint32_t>(bin_of_window) < static_cast<uint32_t>(bins);
  }

  // Where, among all samples of the problem, those of the chunk and of a head of an image begin.
  __device__ __forceinline__ int64_t first_sample(const DeformProblem& p, int64_t map) const {
    return ((map / p.heads * p.queries + first_query) * p.heads + map % p.heads) * (p.levels * p.points);
  }

  // Where the chunk's offsets of its window begin.
  __device__ __forceinline__ int64_t offsets(const DeformBins& of_map, const DeformChunks& chunks, int64_t map) const {
    return (map * chunks.count + chunk) * of_map.count + first_bin;
  }
};

// Of a query and all heads.
__device__ __forceinline__ int64_t samples_of_row(const DeformProblem& p) {
  return static_cast<int64_t>(p.heads) * (p.levels * p.points);
}

// Where samples of a level lie.
template <typename A, int kCells>
struct BinsOfLevel {
  A width, height;
  int32_t start, in_row;

  __device__ __forceinline__ BinsOfLevel(const DeformProblem& p, const DeformBins& bins, int32_t level)
      : width(static_cast<A>(p.level[level].width)),
        height(static_cast<A>(p.level[level].height)),
        start(bins.start[level]),
        in_row(bins_in_row<kCells>(p.level[level].width)) {}

  // Of a sample at these pixels; -1 if it touches none.
  __device__ __forceinline__ int32_t bin(A x, A y) const {
    const bool inside = is_inside(x, y, width, height);
    const uint32_t column = cell_on_axis(inside ? x : A(0)), row = cell_on_axis(inside ? y : A(0));
    return inside ? start + static_cast<int32_t>(row) * in_row + static_cast<int32_t>(column / kCells) : -1;
  }
};

// Calls run(query, index, bin, x, y, weight) for the samples of a chunk and head; queries are counted from the first
// one of the chunk, and weights are 0 if they are null. A lane always has the same of a query's samples, if they are
// not more than threads, and so the same level.
template <typename A, int kCells, typename Run>
__device__ __forceinline__ void for_samples(const DeformProblem& p, const DeformBins& bins, const ChunkOfBlock& own,
                                            int64_t first, const A* __restrict__ locations,
                                            const A* __restrict__ weights, const Run& run) {
  const int32_t samples = p.levels * p.points, lanes = min(samples, kChunkThreads), at_once = kChunkThreads / lanes;
  const int32_t first_query = static_cast<int32_t>(threadIdx.x) / lanes;
  const int64_t row = samples_of_row(p);
  if (first_query >= at_once) return;
  for (int32_t index = static_cast<int32_t>(threadIdx.x) % lanes; index < samples; index += lanes) {
    const BinsOfLevel<A, kCells> level(p, bins, index / p.points);
    for (int32_t query = first_query; query < own.queries; query += at_once * kAtOnce) {
      A x[kAtOnce] = {}, y[kAtOnce] = {}, weight[kAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (query + k * at_once >= own.queries) continue;
        const int64_t place = first + (query + k * at_once) * row + index;
        x[k] = __ldg(locations + place * 2);
        y[k] = __ldg(locations + place * 2 + 1);
        if (weights != nullptr) weight[k] = __ldg(weights + place);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (query + k * at_once >= own.queries) continue;
        const A pixel_x = to_pixels(x[k], level.width), pixel_y = to_pixels(y[k], level.height);
        run(query + k * at_once, index, level.bin(pixel_x, pixel_y), pixel_x, pixel_y, weight[k]);
      }
    }
  }
}

// Counts the samples of each bin, and gives each chunk its offsets: where, among the samples of a bin, its own begin.
// Gradients of samples that touch no pixel become 0, unless their pointers are null.
template <typename A, int kCells>
__global__ void __launch_bounds__(kChunkThreads, kChunkBlocks<A>)
    deform_count_chunks(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformChunks chunks,
                        const __grid_constant__ DeformBins bins, const A* __restrict__ locations,
                        int32_t* __restrict__ counts, int32_t* __restrict__ offsets, A* __restrict__ grad_locations,
                        A* __restrict__ grad_weights) {
  int32_t* const counts_of_chunk = reinterpret_cast<int32_t*>(dynamic_shared_memory);
  const ChunkOfBlock own(p, bins, chunks);
  for (int64_t map = blockIdx.y; map < static_cast<int64_t>(p.images) * p.heads; map += gridDim.y) {
    for (int32_t bin = threadIdx.x; bin < own.bins; bin += kChunkThreads) counts_of_chunk[bin] = 0;
    __syncthreads();
    const int64_t first = own.first_sample(p, map), row = samples_of_row(p);
    for_samples<A, kCells>(p, bins, own, first, locations, nullptr,
                           [&](int32_t query, int32_t index, int32_t bin_of_map, A, A, A) {
                             const int32_t bin = bin_of_map - own.first_bin;
                             if (own.has(bin)) {
                               atomicAdd(&counts_of_chunk[bin], 1);
                             } else if (bin_of_map < 0 && own.first_bin == 0 && grad_weights != nullptr) {
                               const int64_t place = first + query * row + index;
                               grad_locations[place * 2] = grad_locations[place * 2 + 1] = grad_weights[place] = A(0);
                             }
                           });
    __syncthreads();
    int32_t* const of_map = counts + map * (bins.count + 1) + own.first_bin;
    int32_t* const to = offsets + own.offsets(bins, chunks, map);
    for (int32_t first = threadIdx.x; first < own.bins; first += kChunkThreads * kBinsAtOnce) {
      int32_t before[kBinsAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kBinsAtOnce; ++k) {
        const int32_t bin = first + k * kChunkThreads;
        const int32_t count = bin < own.bins ? counts_of_chunk[bin] : 0;
        if (count > 0) before[k] = atomicAdd(&of_map[bin], count);
      }
#pragma unroll
      for (int k = 0; k < kBinsAtOnce; ++k) {
        const int32_t bin = first + k * kChunkThreads;
        if (bin < own.bins) to[bin] = before[k];
      }
    }
    // Every lane sets those counts to 0 for the next map that it has read itself.
  }
}

// Writes every sample that touches its map to its place among the sorted ones.
template <typename A, int kCells>
__global__ void __launch_bounds__(kChunkThreads, kChunkBlocks<A>)
    deform_scatter_chunks(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformChunks chunks,
                          const __grid_constant__ DeformBins bins, const A* __restrict__ locations,
                          const A* __restrict__ weights, const int32_t* __restrict__ starts,
                          const int32_t* __restrict__ offsets, SortedSample<A>* __restrict__ sorted) {
  int32_t* const next_of_bin = reinterpret_cast<int32_t*>(dynamic_shared_memory);
  const ChunkOfBlock own(p, bins, chunks);
  for (int64_t map = blockIdx.y; map < static_cast<int64_t>(p.images) * p.heads; map += gridDim.y) {
    const int32_t* const starts_of_map = starts + map * (bins.count + 1) + own.first_bin;
    const int32_t* const offsets_of_chunk = offsets + own.offsets(bins, chunks, map);
#pragma unroll 4
    for (int32_t bin = threadIdx.x; bin < own.bins; bin += kChunkThreads) {
      next_of_bin[bin] = __ldg(starts_of_map + bin) + __ldg(offsets_of_chunk + bin);
    }
    __syncthreads();
    const int32_t samples = p.levels * p.points;
    SortedSample<A>* const to = sorted + map * p.queries * samples;
    for_samples<A, kCells>(p, bins, own, own.first_sample(p, map), locations, weights,
                           [&](int32_t query, int32_t index, int32_t bin_of_map, A x, A y, A weight) {
                             const int32_t bin = bin_of_map - own.first_bin;
                             if (!own.has(bin)) return;
                             const int32_t place = atomicAdd(&next_of_bin[bin], 1);
                             to[place] = {x, y, weight, (own.first_query + query) * samples + index};
                           });
    __syncthreads();
  }
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_deform_chunks(const Kernel& kernel, const DeformProblem& p, const DeformChunks& chunks,
                                 cudaStream_t stream, const Arguments&... arguments) {
  const int64_t maps = maps_of(p);
  if (chunks.count == 0 || maps == 0 || p.levels * p.points == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(chunks.count, static_cast<unsigned>(maps < kMaxGridY ? maps : kMaxGridY), chunks.windows);
  config.blockDim = dim3(kChunkThreads);
  config.dynamicSmemBytes = chunks.window_bins * sizeof(int32_t);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p, chunks, arguments...);
}

}  // namespace
}  // namespace groupdetr
