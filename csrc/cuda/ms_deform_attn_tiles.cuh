// The backward pass of multi-scale deformable attention by tiles, on tensor cores, for half and bfloat16.
//
// A tile is 2 rows of 4 pixels, those of 3 cells next to each other. The samples are sorted by tile, and a warp walks
// over some of them, 16 of a tile at a time (a chunk). Of a chunk, two products of matrices are what the pixels have to
// do with it:
//
//   dots, 16 samples x 8 pixels       gradients of the results [16 x channels] * values [channels x 8]
//   sums, 8 pixels x channels         weights of the samples at the pixels [8 x 16] * gradients of the results
//
// A weight is rounded to the type of value, and what that leaves is rounded again: rows 8 to 15 of the second product.
// The two together are as good as a float32 to 2^-16 in bfloat16. From the dots follow the gradients of locations and
// weights; the sums are added to the gradient of value where the next tile begins.
//
// A gradient of the result that is not finite makes that of all pixels of its tile NaN, also where no weight is.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_sorting.cuh"
#include "tensor_cores.cuh"

namespace groupdetr {
namespace {

constexpr int kTileCells = 3, kTileColumns = kTileCells + 1;  // pixels have two rows
constexpr int kTileRun = 128;                                 // sorted samples that a warp walks over
constexpr int kChunk = 16;
constexpr int kTileBlocks = kHasVectorAtomics ? 6 : 5;  // with 32 channels; as many as registers allow without spills

// A lane's channels of a row, kVectors times kVector adjacent ones; four lanes have the row. kFull tells that it has no
// fewer channels than they.
template <typename T, int kVector, int kVectors, bool kFull>
struct QuarterRow {
  static constexpr int kWords = kVector / 2;
  uint32_t word[kVectors][kWords] = {};

  // The first channel of a lane's vector; `quarter` is 0 to 3.
  static __device__ __forceinline__ int32_t channel(int vector, int32_t quarter) {
    return (vector * 4 + quarter) * kVector;
  }

  // `from` is the row from the lane's first channel on.
  __device__ __forceinline__ void load(const T* from, int32_t channels, int32_t quarter) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!kFull && channel(v, quarter) >= channels) continue;
      if constexpr (kWords == 4) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + channel(v, 0)));
        memcpy(word[v], &raw, sizeof(raw));
      } else {
        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from + channel(v, 0)));
        memcpy(word[v], &raw, sizeof(raw));
      }
    }
  }
};

__device__ __forceinline__ void add_four(float* to, float4 values) {
  if constexpr (kHasVectorAtomics) {
    add_vector(to, values);
  } else {
    atomicAdd(to, values.x);
    atomicAdd(to + 1, values.y);
    atomicAdd(to + 2, values.z);
    atomicAdd(to + 3, values.w);
  }
}

// What the lanes of a warp share of a sample.
struct alignas(16) StagedSample {
  float x, y;  // between the pixels around it
  float attention;
  uint32_t place;  // among the samples of the image
};
struct alignas(8) StagedPlace {
  uint32_t cell;   // 4 times the number of its tile, and which of the tile's cells it is in
  uint32_t grads;  // where the gradient of its result is in that of the image, in units of kVectorSize channels

  // Whether two cells are of the same tile.
  static __device__ __forceinline__ bool share_tile(uint32_t cell, uint32_t other) { return (cell ^ other) < 4; }
};
struct alignas(8) StagedTile {
  int32_t row;                // of its first pixels, from -1
  uint32_t column_and_level;  // column + 1 of its first pixel, and the level in the four highest bits
};
constexpr int kLevelShift = 28;
static_assert(kMaxDeformLevels <= 1 << (32 - kLevelShift));
constexpr uint32_t kNoCell = 0xffffffff;  // of no tile

struct Staged {
  StagedSample sample;
  StagedPlace place;
  StagedTile tile;
};

// A chunk may reach beyond the samples, where nothing but the place means anything.
__device__ __forceinline__ Staged* staged_of_warp() {
  static __shared__ Staged of_block[kDeformThreads / kWarpSize][kTileRun + kChunk];
  return of_block[threadIdx.x / kWarpSize];
}

// The same number, in a register: without this, compilers save registers and compute it again wherever it is needed.
// Not for pointers to what is written: compilers would no longer know that they are of global memory.
template <typename Number>
__device__ __forceinline__ Number in_register(Number number) {
#if defined(__CUDACC__)
  if constexpr (sizeof(number) == 8) {
    asm volatile("" : "+l"(number));
  } else {
    asm volatile("" : "+r"(number));
  }
#endif
  return number;
}

// What a lane has to do with a chunk.
struct TileLane {
  int32_t group, quarter;  // lane 4 * group + quarter
  bool lower, odd;         // of the pixels whose dots it has: those of the lower row, columns 2 and 3

  static __device__ __forceinline__ TileLane own() {
    const int32_t lane = in_register(static_cast<int32_t>(threadIdx.x % kWarpSize));
    return {lane / 4, lane % 4, lane % 4 / 2 != 0, lane % 2 != 0};
  }
};

// What a lane knows of a sample in a chunk: which of its two pixels the sample touches, and the weights along an axis.
struct TouchedPixels {
  bool touches_left, touches_right, between;
  float left, right, y_weight;

  __device__ __forceinline__ TouchedPixels(const StagedSample& sample, uint32_t cell, const TileLane& lane) {
    const int32_t offset = static_cast<int32_t>(cell % 4) - 2 * lane.odd;
    between = offset == 0;
    touches_left = between || offset == -1;
    touches_right = between || offset == 1;
    const float rest = 1 - sample.x;
    left = between ? rest : sample.x;
    right = between ? sample.x : rest;
    y_weight = lane.lower ? sample.y : 1 - sample.y;
  }
};

template <typename T, int kVector, int kVectors, bool kFull>
struct TileSums {
  using Row = QuarterRow<T, kVector, kVectors, kFull>;
  // Of the numbers of a word of the lane's pixel, twice: those of the rounded weights, and of what was left of them.
  float of_word[kVectors][Row::kWords][4] = {};

  // Where add_to() adds a lane's first sums, from the channels of a pixel on.
  static __device__ __forceinline__ int32_t first_channel(const TileLane& lane) {
    return kVector == 4 ? Row::channel(0, lane.quarter) : Row::channel(0, lane.quarter & ~1) + 4 * lane.odd;
  }

  // Adds them to the gradient of a pixel, from the lane's first channel on, if `adds`. All lanes must call it.
  __device__ __forceinline__ void add_to(float* pixel, bool adds, int32_t channels, const TileLane& lane) {
    constexpr float kUnit = 1 / WeightRange<T>::kFactor;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float sums[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k] = (of_word[v][k / 2][k % 2] + of_word[v][k / 2][2 + k % 2]) * kUnit;
      const auto add = [&](int32_t channel, const float* four) {
        if (adds && (kFull || first_channel(lane) + channel < channels)) {
          add_four(pixel + channel, make_float4(four[0], four[1], four[2], four[3]));
        }
      };
      if constexpr (kVector == 4) {
        add(Row::channel(v, 0), sums);
      } else {
        // Two lanes exchange halves, so that together they write 32 adjacent bytes at a time, a sector of the cache.
        static_assert(kVector == 8);
        float first[4], second[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float other = __shfl_xor_sync(kAllLanes, lane.odd ? sums[k] : sums[4 + k], 1);
          first[k] = lane.odd ? other : sums[k];
          second[k] = lane.odd ? sums[4 + k] : other;
        }
        add(Row::channel(v, 0), first);
        add(Row::channel(v, 0) + kVector, second);
      }
    }
  }
};

// Adds a sample whose weight is beyond WeightRange to the gradients of its pixels, all channels by one lane.
template <typename T>
__device__ __forceinline__ void add_alone(const SortedSample<float>& sample, const T* grad, const DeformLevel& level,
                                          float* sums_of_map, int32_t row_size, int32_t channels) {
  const AxisCorners<float> x = axis_corners(sample.x, level.width), y = axis_corners(sample.y, level.height);
#pragma unroll 1
  for (int corner = 0; corner < 4; ++corner) {
    const float x_weight = corner & 1 ? x.high_weight : x.low_weight;
    const float weight = sample.attention * (corner & 2 ? y.high_weight : y.low_weight) * x_weight;
    if (weight == 0) continue;  // as corners outside the map have
    const int32_t row = corner & 2 ? y.high : y.low, column = corner & 1 ? x.high : x.low;
    float* const pixel = sums_of_map + (level.start + static_cast<int64_t>(row) * level.width + column) * row_size;
#pragma unroll 1
    for (int32_t channel = 0; channel < channels; channel += kVectorSize<T>) {
      float grads[kVectorSize<T>];
      load_channels<kVectorSize<T>>(grad + channel, grads);
#pragma unroll
      for (int k = 0; k < kVectorSize<T>; k += 4) {
        add_four(pixel + channel + k,
                 make_float4(weight * grads[k], weight * grads[k + 1], weight * grads[k + 2], weight * grads[k + 3]));
      }
    }
  }
}

// The gradients of all samples that touch a pixel, and that of value, to which it adds. Lane 4 * g + quarter has
// samples g and g + 8 of a chunk and pixel g of the tile, and there the channels of the quarter.
template <typename T, int kVector, int kVectors, bool kFull>
__global__ void __launch_bounds__(kDeformThreads, kVectors == 1 ? kTileBlocks : 4)
    deform_backward_tiles(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformBins bins,
                          const __grid_constant__ Divisor samples_of_query, const __grid_constant__ Divisor points,
                          const T* __restrict__ value, const T* __restrict__ grad_out,
                          const int32_t* __restrict__ starts, const SortedSample<float>* __restrict__ sorted,
                          float* __restrict__ grad_value, float* __restrict__ grad_locations,
                          float* __restrict__ grad_weights) {
  if constexpr (kHasTensorCores) {
    using Row = QuarterRow<T, kVector, kVectors, kFull>;
    Staged* const staged = staged_of_warp();
    const TileLane lane = TileLane::own();
    const int32_t row_size = p.heads * p.channels, samples = p.levels * p.points;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kDeformThreads / kWarpSize) + threadIdx.x / kWarpSize;
    for (int64_t map = blockIdx.y; map < p.images * p.heads; map += gridDim.y) {
      const int32_t image = static_cast<int32_t>(map) / p.heads, head = static_cast<int32_t>(map) % p.heads;
      const int64_t first_value = static_cast<int64_t>(image) * p.pixels * row_size + head * p.channels;
      const int64_t first_item = static_cast<int64_t>(image) * p.queries * p.heads;
      const T* const grads_of_map = grad_out + first_item * p.channels + head * p.channels;
      const int64_t total = starts[(map + 1) * (bins.count + 1) - 1], begin = warp * kTileRun;
      const int32_t count = static_cast<int32_t>(max(min(total - begin, int64_t{kTileRun}), int64_t{0}));

#pragma unroll 1
      for (int32_t index = threadIdx.x % kWarpSize; index < count; index += kWarpSize) {
        const SortedSample<float> sample = sorted[map * p.queries * samples + begin + index];
        const int32_t query = samples_of_query.divide(sample.index), point = sample.index - query * samples;
        const int32_t level = points.divide(point);
        const DeformLevel& size = p.level[level];
        const int32_t row = __float2int_rd(sample.y), column = __float2int_rd(sample.x);
        const uint32_t cells = column + 1, tile = cells / kTileCells;
        const uint32_t number = bins.start[level] + (row + 1) * bins_in_row<kTileCells>(size.width) + tile;
        const uint32_t grads = static_cast<uint32_t>(query) * (row_size / kVectorSize<T>);
        staged[index].sample = {sample.x - static_cast<float>(column), sample.y - static_cast<float>(row),
                                sample.attention, (static_cast<uint32_t>(query) * p.heads + head) * samples + point};
        staged[index].place = {number * 4 + cells % kTileCells, grads};
        staged[index].tile = {row, tile * kTileCells | static_cast<uint32_t>(level) << kLevelShift};
        if (!(fabsf(sample.attention) <= WeightRange<T>::kLargest)) {
          add_alone(sample, grads_of_map + static_cast<int64_t>(grads) * kVectorSize<T>, size, grad_value + first_value,
                    row_size, p.channels);
        }
      }
      if (lane.group < kChunk / 4) staged[count + 4 * lane.group + lane.quarter].place = {kNoCell, 0};
      __syncwarp();

      Row values;
      TileSums<T, kVector, kVectors, kFull> sums;
      uint32_t tile = kNoCell;
      int32_t pixel = -1;  // the lane's pixel of the tile, unless that is outside of the map
      float width = 0, height = 0;
      const int64_t first_sum = in_register(first_value + sums.first_channel(lane));
      const T* const grads_of_lane = in_register(grads_of_map + Row::channel(0, lane.quarter));
      float* const grad_weights_of_image = grad_weights + first_item * samples;
      float2* const grad_locations_of_image = reinterpret_cast<float2*>(grad_locations) + first_item * samples;
      const Staged* own = staged + lane.group;
      const Staged* const end = own + count;
      while (own < end) {
        const StagedPlace places[2] = {own[0].place, own[8].place};
        const uint32_t first = __shfl_sync(kAllLanes, places[0].cell, 0);
        if (!StagedPlace::share_tile(first, tile)) {
          sums.add_to(grad_value + (first_sum + static_cast<int64_t>(pixel) * row_size), pixel >= 0, p.channels, lane);
          sums = {};
          tile = first;
          const StagedTile at = own[-lane.group].tile;
          const DeformLevel& size = p.level[at.column_and_level >> kLevelShift];
          const int32_t y = at.row + lane.group / kTileColumns;
          const int32_t x = static_cast<int32_t>(at.column_and_level << 4 >> 4) - 1 + lane.group % kTileColumns;
          width = static_cast<float>(size.width);
          height = static_cast<float>(size.height);
          const bool inside = y >= 0 && y < size.height && x >= 0 && x < size.width;
          pixel = inside ? size.start + y * size.width + x : -1;
          values = {};
          if (inside) {
            values.load(value + first_value + static_cast<int64_t>(pixel) * row_size + Row::channel(0, lane.quarter),
                        p.channels, lane.quarter);
          }
        }

        Row grads[2];
        const bool belongs[2] = {StagedPlace::share_tile(places[0].cell, first),
                                 StagedPlace::share_tile(places[1].cell, first)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!belongs[i]) continue;
          grads[i].load(grads_of_lane + static_cast<uint64_t>(places[i].grads) * kVectorSize<T>, p.channels,
                        lane.quarter);
        }
        const StagedSample samples_of_lane[2] = {own[0].sample, own[8].sample};
        const TouchedPixels at[2] = {{samples_of_lane[0], places[0].cell, lane},
                                     {samples_of_lane[1], places[1].cell, lane}};
        own += (__popc(__ballot_sync(kAllLanes, belongs[0])) + __popc(__ballot_sync(kAllLanes, belongs[1]))) / 4;

        // Weights as columns of samples, rounded, and what is left of them.
        uint32_t weights[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float attention = samples_of_lane[i].attention;
          const bool counts = belongs[i] && fabsf(attention) <= WeightRange<T>::kLargest;
          const float factor = attention * WeightRange<T>::kFactor * at[i].y_weight;
          const float left = counts && at[i].touches_left ? factor * at[i].left : 0;
          const float right = counts && at[i].touches_right ? factor * at[i].right : 0;
          const SplitPair parts = split<T>(left, right);
          weights[2 * i] = transposed(parts.rounded);
          weights[2 * i + 1] = transposed(parts.rest);
        }

        float dots[4] = {};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int word = 0; word < Row::kWords; word += 2) {
            add_product<T>(dots,
                           {grads[0].word[v][word], grads[1].word[v][word], grads[0].word[v][word + 1],
                            grads[1].word[v][word + 1]},
                           {values.word[v][word], values.word[v][word + 1]});
          }
#pragma unroll
          for (int word = 0; word < Row::kWords; ++word) {
            add_product<T>(sums.of_word[v][word], weights,
                           {transposed(grads[0].word[v][word]), transposed(grads[1].word[v][word])});
          }
        }

        // Summed up over the columns of the tile, as they are, and their slope.
        float across[2], slope[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float left = at[i].touches_left ? dots[2 * i] : 0, right = at[i].touches_right ? dots[2 * i + 1] : 0;
          across[i] = at[i].left * left + at[i].right * right;
          slope[i] = at[i].between ? right - left : left - right;
        }
        // Even lanes go on with the first sample, odd ones with the second.
        const bool odd = lane.odd, lower = lane.lower;
        const float sum = (odd ? across[1] : across[0]) + __shfl_xor_sync(kAllLanes, odd ? across[0] : across[1], 1);
        const float x_slope = (odd ? slope[1] : slope[0]) + __shfl_xor_sync(kAllLanes, odd ? slope[0] : slope[1], 1);
        const float y_weight = odd ? at[1].y_weight : at[0].y_weight;
        const float by_weight = y_weight * sum, by_x = y_weight * x_slope, by_y = lower ? sum : -sum;
        // Of the rows, the lanes of the upper one sum up the slope along x, those of the lower one the value.
        const float whole = (lower ? by_weight : by_x) + __shfl_xor_sync(kAllLanes, lower ? by_x : by_weight, 2);
        const float y_slope = by_y + __shfl_xor_sync(kAllLanes, by_y, 2);
        if (odd ? belongs[1] : belongs[0]) {
          const uint32_t place = odd ? samples_of_lane[1].place : samples_of_lane[0].place;
          const float attention = odd ? samples_of_lane[1].attention : samples_of_lane[0].attention;
          if (lower) {
            grad_weights_of_image[place] = whole;
          } else {
            grad_locations_of_image[place] = make_float2(attention * width * whole, attention * height * y_slope);
          }
        }
        __syncwarp();  // the next products want all lanes side by side, and another map overwrites what is staged
      }
      sums.add_to(grad_value + (first_sum + static_cast<int64_t>(pixel) * row_size), pixel >= 0, p.channels, lane);
    }
  }
}

constexpr int32_t kMostTileChannels = 64;

}  // namespace

// Whether deform_backward_tiles serves a problem, on a GPU whose kernels have tensor cores. It numbers the samples and
// the vectors of gradients of an image in 32 bits.
template <typename T, typename... Pointers>
bool fits_tiles(const DeformProblem& p, const Pointers*... pointers) {
  const int64_t items = static_cast<int64_t>(p.queries) * p.heads, samples = static_cast<int64_t>(p.levels) * p.points;
  bool fits = kIsHalf<T> && p.channels <= kMostTileChannels && vectors_fit<T>(p, pointers...) &&
              items <= UINT32_MAX / (kMostTileChannels / kVectorSize<T>) && items * samples <= UINT32_MAX;
  for (int32_t level = 0; level < p.levels; ++level) {
    fits = fits && p.level[level].width < 1 << kLevelShift;
  }
  return fits;
}

// Writes the gradients of locations and weights, and adds that of value to `grad_value`, in any order. For problems
// that fits_tiles() answers for; `scratch.ordered` is not used.
template <typename T>
cudaError_t launch_deform_backward_tiles(const DeformProblem& p, const T* value, const DeformArithmetic<T>* locations,
                                         const DeformArithmetic<T>* weights, const T* grad_out,
                                         DeformArithmetic<T>* grad_value, DeformArithmetic<T>* grad_locations,
                                         DeformArithmetic<T>* grad_weights, DeformScratch<DeformArithmetic<T>> scratch,
                                         cudaStream_t stream) {
  if (!fits_tiles<T>(p, value, grad_out, grad_value)) return cudaErrorInvalidValue;
  if constexpr (kIsHalf<T>) {
    if (maps_of(p) == 0 || samples_of_map(p) == 0) return cudaSuccess;
    const auto kernel = p.channels == 16   ? &deform_backward_tiles<T, 4, 1, true>
                        : p.channels == 32 ? &deform_backward_tiles<T, 8, 1, true>
                        : p.channels == 64 ? &deform_backward_tiles<T, 8, 2, true>
                        : p.channels < 32  ? &deform_backward_tiles<T, 8, 1, false>
                                           : &deform_backward_tiles<T, 8, 2, false>;
    const int64_t runs = (samples_of_map(p) + kTileRun - 1) / kTileRun;
    scratch.ordered = nullptr;
    return until_error(
        [&] {
          return launch_deform_sort<kTileCells>(p, locations, weights, grad_locations, grad_weights, scratch, stream);
        },
        [&] {
          return launch_deform(kernel, runs, kDeformThreads / kWarpSize, maps_of(p), stream, p, bins_of<kTileCells>(p),
                               Divisor(p.levels * p.points), Divisor(p.points), value, grad_out, scratch.starts,
                               scratch.samples, grad_value, grad_locations, grad_weights);
        });
  }
  return cudaSuccess;
}

}  // namespace groupdetr
