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

#include "ms_deform_attn_cells.cuh"
#include "tensor_cores.cuh"

namespace groupdetr {
namespace {

constexpr int kTileCells = 3, kTileColumns = kTileCells + 1;  // pixels have two rows
constexpr int kTileRun = 128;                                 // sorted samples that a warp walks over
constexpr int kChunk = 16;
constexpr int32_t kLargestTileMap = 1 << 23;  // pixels of a row or column, whose numbers are floats here

// Divides numbers below 2^31 by one that the host knows, without a division: by a multiplication with 2^(31 + shift)
// over the divisor, rounded up, where 2^shift is at least the divisor, and the error therefore too small to matter.
struct Divisor {
  uint32_t factor;
  int32_t shift;

  explicit Divisor(int32_t divisor) : factor(0), shift(0) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }

  __device__ __forceinline__ int32_t divide(int32_t number) const {
    return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(number), factor) >> shift);
  }
};

// A lane's channels of a row, kVectors times kVector adjacent ones; four lanes have the row.
template <typename T, int kVector, int kVectors>
struct QuarterRow {
  static constexpr int kWords = kVector / 2;
  uint32_t word[kVectors][kWords] = {};

  // A lane's first channel of a vector; `quarter` is 0 to 3.
  static __device__ __forceinline__ int32_t channel(int vector, int32_t quarter) {
    return (vector * 4 + quarter) * kVector;
  }

  __device__ __forceinline__ void load(const T* row, int32_t channels, int32_t quarter) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (channel(v, quarter) >= channels) continue;
      if constexpr (kWords == 4) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + channel(v, quarter)));
        memcpy(word[v], &raw, sizeof(raw));
      } else {
        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(row + channel(v, quarter)));
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

// Weights are multiplied by kFactor, and may be up to kLargest, where neither they nor what rounding leaves of them
// exceed the range of T. Samples with larger ones are added up alone.
template <typename T>
struct WeightRange {
  static constexpr float kFactor = 1, kLargest = 0x1p100f;
};
template <>
struct WeightRange<__half> {
  static constexpr float kFactor = 0x1p15f, kLargest = 1.875f;
};

// The tile at hand, of which a lane has one pixel.
struct Tile {
  float row, column;  // of its first pixel
  int32_t pixel;      // the lane's among those of all levels, -1 if it is outside of the map
};

// What a lane knows of a sample: which of the lane's two pixels it touches, and how.
struct TileSample {
  float left, right;  // weights of the lane's pixels along x, for those that are touched
  float y_weight;     // along y
  bool touches_left, touches_right, between;

  // `column` and `lower` are those of the lane's first pixel.
  __device__ __forceinline__ TileSample(float x, float low_x, float y, float low_y, float column, bool lower) {
    const float fraction = x - low_x, rest = 1 - fraction, offset = low_x - column, y_fraction = y - low_y;
    between = offset == 0;
    touches_left = between || offset == -1;
    touches_right = between || offset == 1;
    left = between ? rest : fraction;
    right = between ? fraction : rest;
    y_weight = lower ? y_fraction : 1 - y_fraction;
  }
};

template <typename T, int kVector, int kVectors>
struct TileSums {
  using Row = QuarterRow<T, kVector, kVectors>;
  // Of the numbers of a word of the lane's pixel, twice: those of the rounded weights, and of what was left of them.
  float of_word[kVectors][Row::kWords][4] = {};

  // Adds them to the gradient of the lane's pixel, if there is one, and forgets them. All lanes must call it.
  __device__ __forceinline__ void flush(float* pixel, int32_t channels, int32_t quarter) {
    constexpr float kUnit = 1 / WeightRange<T>::kFactor;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float sums[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k] = (of_word[v][k / 2][k % 2] + of_word[v][k / 2][2 + k % 2]) * kUnit;
      if constexpr (kVector == 4) {
        if (pixel != nullptr && Row::channel(v, quarter) < channels) {
          add_four(pixel + Row::channel(v, quarter), make_float4(sums[0], sums[1], sums[2], sums[3]));
        }
      } else {
        // Two lanes exchange halves, so that together they write 32 adjacent bytes at a time, a sector of the cache.
        static_assert(kVector == 8);
        const bool odd = quarter & 1;
        float halves[2][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float other = __shfl_xor_sync(kAllLanes, odd ? sums[k] : sums[4 + k], 1);
          halves[0][k] = odd ? other : sums[k];
          halves[1][k] = odd ? sums[4 + k] : other;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t channel = Row::channel(v, (quarter & ~1) + i) + 4 * odd;
          if (pixel != nullptr && channel < channels) {
            add_four(pixel + channel, make_float4(halves[i][0], halves[i][1], halves[i][2], halves[i][3]));
          }
        }
      }
    }
    memset(of_word, 0, sizeof(of_word));
  }
};

// Adds a sample whose weight is too large for T to the gradients of its pixels, a lane its channels.
template <typename T, int kVector, int kVectors>
__device__ __forceinline__ void add_alone(const SortedSample<float>& sample,
                                          const QuarterRow<T, kVector, kVectors>& grad, const DeformLevel& level,
                                          float* sums_of_map, int32_t row_size, int32_t channels, int32_t quarter) {
  using Row = QuarterRow<T, kVector, kVectors>;
  const AxisCorners<float> x = axis_corners(sample.x, level.width), y = axis_corners(sample.y, level.height);
#pragma unroll 1
  for (int corner = 0; corner < 4; ++corner) {
    const float x_weight = corner & 1 ? x.high_weight : x.low_weight;
    const float weight = sample.attention * (corner & 2 ? y.high_weight : y.low_weight) * x_weight;
    if (weight == 0) continue;  // as corners outside the map have
    const int32_t row = corner & 2 ? y.high : y.low, column = corner & 1 ? x.high : x.low;
    float* const pixel = sums_of_map + (level.start + static_cast<int64_t>(row) * level.width + column) * row_size;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (Row::channel(v, quarter) >= channels) continue;
#pragma unroll
      for (int word = 0; word < Row::kWords; word += 2) {
        const float2 first = unpack<T>(grad.word[v][word]), second = unpack<T>(grad.word[v][word + 1]);
        add_four(pixel + Row::channel(v, quarter) + 2 * word,
                 make_float4(weight * first.x, weight * first.y, weight * second.x, weight * second.y));
      }
    }
  }
}

// The gradients of all samples that touch a pixel, and that of value, to which it adds. Lane 4 * g + quarter has
// samples g and g + 8 of a chunk and pixel g of the tile, and there the channels of the quarter.
template <typename T, int kVector, int kVectors>
__global__ void __launch_bounds__(kDeformThreads, kVectors == 1 ? 8 : 4)
    deform_backward_tiles(const __grid_constant__ DeformProblem p, const __grid_constant__ DeformBins bins,
                          const __grid_constant__ Divisor samples_of_query, const T* __restrict__ value,
                          const T* __restrict__ grad_out, const int32_t* __restrict__ starts,
                          const SortedSample<float>* __restrict__ sorted, float* __restrict__ grad_value,
                          float* __restrict__ grad_locations, float* __restrict__ grad_weights) {
  if constexpr (kHasTensorCores) {
    using Row = QuarterRow<T, kVector, kVectors>;
    const int32_t lane = threadIdx.x % kWarpSize, group = lane / 4, quarter = lane % 4;
    // Of the dots, a lane has those of two pixels of a row: left and right ones, upper and lower ones.
    const bool lower = quarter / 2, odd = quarter % 2;
    const int32_t row_size = p.heads * p.channels, samples = p.levels * p.points;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kDeformThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int64_t maps = static_cast<int64_t>(p.images) * p.heads;
    for (int64_t map = blockIdx.y; map < maps; map += gridDim.y) {
      const int32_t* const of_map = starts + map * (bins.count + 1);
      const int64_t image = map / p.heads, head = map % p.heads;
      const T* const values_of_map = value + image * p.pixels * row_size + head * p.channels;
      float* const sums_of_map = grad_value + image * p.pixels * row_size + head * p.channels;
      const T* const grads_of_map = grad_out + image * p.queries * row_size + head * p.channels;
      const SortedSample<float>* const samples_of_map = sorted + map * p.queries * samples;
      const int64_t first_place = (image * p.queries * p.heads + head) * samples;
      // Lane l knows where the sorted samples of level l end.
      int32_t level_end = INT32_MAX;
      if (lane < p.levels) level_end = of_map[lane + 1 < p.levels ? bins.start[lane + 1] : bins.count];
      int32_t position = static_cast<int32_t>(warp * kTileRun);
      const int32_t end = min(position + kTileRun, of_map[bins.count]);

      SortedSample<float> next[2];
      const auto load_next = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t place = position + group + 8 * i;
          next[i] = {0, 0, 0, 0};
          if (place < end) next[i] = samples_of_map[place];
        }
      };
      load_next();
      Tile tile = {-2, 0, -1};
      Row values;
      TileSums<T, kVector, kVectors> sums;
      const auto add_sums = [&] {
        float* const pixel = tile.pixel < 0 ? nullptr : sums_of_map + static_cast<int64_t>(tile.pixel) * row_size;
        sums.flush(pixel, p.channels, quarter);
      };
      int32_t level = 0, limit = position;  // where samples of another level or warp begin
      while (position < end) {
        if (position >= limit) {
          level = __popc(__ballot_sync(kAllLanes, level_end <= position));
          limit = min(__shfl_sync(kAllLanes, level_end, level), end);
          tile.row = -2;  // which no sample is in, so that the next tile begins
        }
        const DeformLevel& map_of_level = p.level[level];
        const SortedSample<float> own[2] = {next[0], next[1]};
        const float low_x[2] = {floorf(own[0].x), floorf(own[1].x)}, low_y[2] = {floorf(own[0].y), floorf(own[1].y)};
        const float first_x = __shfl_sync(kAllLanes, low_x[0], 0), first_y = __shfl_sync(kAllLanes, low_y[0], 0);
        if (first_y != tile.row || first_x >= tile.column + kTileCells) {
          add_sums();
          const int32_t row = static_cast<int32_t>(first_y);
          const int32_t column = (static_cast<int32_t>(first_x) + 1) / kTileCells * kTileCells - 1;
          const int32_t y = row + group / kTileColumns, x = column + group % kTileColumns;
          const bool inside = y >= 0 && y < map_of_level.height && x >= 0 && x < map_of_level.width;
          tile = {first_y, static_cast<float>(column), inside ? map_of_level.start + y * map_of_level.width + x : -1};
          values = {};
          if (inside) values.load(values_of_map + static_cast<int64_t>(tile.pixel) * row_size, p.channels, quarter);
        }

        Row grads[2];
        bool belongs[2];
        int32_t query[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          belongs[i] = position + group + 8 * i < limit && low_y[i] == tile.row && low_x[i] < tile.column + kTileCells;
          query[i] = samples_of_query.divide(own[i].index);
          if (belongs[i]) {
            grads[i].load(grads_of_map + static_cast<int64_t>(query[i]) * row_size, p.channels, quarter);
          }
        }
        position += (__popc(__ballot_sync(kAllLanes, belongs[0])) + __popc(__ballot_sync(kAllLanes, belongs[1]))) / 4;
        load_next();

        // Weights as columns of samples, rounded, and what is left of them.
        const float column = tile.column + static_cast<float>(2 * odd);
        const TileSample at[2] = {{own[0].x, low_x[0], own[0].y, low_y[0], column, lower},
                                  {own[1].x, low_x[1], own[1].y, low_y[1], column, lower}};
        float attention[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          attention[i] = belongs[i] ? own[i].attention : 0;
          if (!(fabsf(attention[i]) <= WeightRange<T>::kLargest)) {
            add_alone(own[i], grads[i], map_of_level, sums_of_map, row_size, p.channels, quarter);
            attention[i] = 0;
          }
        }
        __syncwarp();  // the products want all lanes side by side
        uint32_t weights[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float factor = attention[i] * WeightRange<T>::kFactor * at[i].y_weight;
          const float left = at[i].touches_left ? factor * at[i].left : 0;
          const float right = at[i].touches_right ? factor * at[i].right : 0;
          const uint32_t rounded = pack<T>(left, right);
          const float2 back = unpack<T>(rounded);
          weights[2 * i] = transposed(rounded);
          weights[2 * i + 1] = transposed(pack<T>(left - back.x, right - back.y));
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
        const float sum = (odd ? across[1] : across[0]) + __shfl_xor_sync(kAllLanes, odd ? across[0] : across[1], 1);
        const float x_slope = (odd ? slope[1] : slope[0]) + __shfl_xor_sync(kAllLanes, odd ? slope[0] : slope[1], 1);
        const float y_weight = odd ? at[1].y_weight : at[0].y_weight;
        const float by_weight = y_weight * sum, by_x = y_weight * x_slope, by_y = lower ? sum : -sum;
        // Of the rows, the lanes of the upper one sum up the slope along x, those of the lower one the value.
        const float whole = (lower ? by_weight : by_x) + __shfl_xor_sync(kAllLanes, lower ? by_x : by_weight, 2);
        const float y_slope = by_y + __shfl_xor_sync(kAllLanes, by_y, 2);
        if (odd ? belongs[1] : belongs[0]) {
          const int64_t of_query = static_cast<int64_t>(odd ? query[1] : query[0]) * samples * (p.heads - 1);
          const int64_t place = first_place + of_query + (odd ? own[1].index : own[0].index);
          if (lower) {
            grad_weights[place] = whole;
          } else {
            const float attention = odd ? own[1].attention : own[0].attention;
            const float width = static_cast<float>(map_of_level.width),
                        height = static_cast<float>(map_of_level.height);
            reinterpret_cast<float2*>(grad_locations)[place] =
                make_float2(attention * width * whole, attention * height * y_slope);
          }
        }
      }
      add_sums();
    }
  }
}

template <typename T>
constexpr bool kHasTiles = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;
constexpr int32_t kMostTileChannels = 64;

}  // namespace

// Whether deform_backward_tiles serves a problem, on a GPU whose kernels have tensor cores.
template <typename T, typename... Pointers>
bool fits_tiles(const DeformProblem& p, const Pointers*... pointers) {
  bool fits = kHasTiles<T> && p.channels <= kMostTileChannels && vectors_fit<T>(p, pointers...);
  for (int32_t level = 0; level < p.levels; ++level) {
    fits = fits && p.level[level].height <= kLargestTileMap && p.level[level].width <= kLargestTileMap;
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
  if constexpr (kHasTiles<T>) {
    if (maps_of(p) == 0 || samples_of_map(p) == 0) return cudaSuccess;
    const auto kernel = p.channels <= 16   ? &deform_backward_tiles<T, 4, 1>
                        : p.channels <= 32 ? &deform_backward_tiles<T, 8, 1>
                                           : &deform_backward_tiles<T, 8, 2>;
    const int64_t runs = (samples_of_map(p) + kTileRun - 1) / kTileRun;
    scratch.ordered = nullptr;
    return until_error(
        [&] {
          return launch_deform_sort<kTileCells>(p, locations, weights, grad_locations, grad_weights, scratch, stream);
        },
        [&] {
          return launch_deform(kernel, runs, kDeformThreads / kWarpSize, maps_of(p), stream, p, bins_of<kTileCells>(p),
                               Divisor(p.levels * p.points), value, grad_out, scratch.starts, scratch.samples,
                               grad_value, grad_locations, grad_weights);
        });
  }
  return cudaSuccess;
}

}  // namespace groupdetr
