// The forward pass of multi-scale deformable attention on tensor cores, for half and bfloat16.
//
// A result is the sum of rows of value, weighted: the four corners of every sample. A warp works on 8 items (queries
// and heads), one sample of each at a time; four lanes share an item, and each loads 16 bytes of its four corners.
// Tensor cores multiply two channels of them at a time with the weights:
//
//   sums, 16 x 8   =   values, 16 x 16   *   weights, 16 x 8
//
// Lane 4 * g + t has rows g and g + 8 of values, its two channels, and of these the four columns of its corners. Row g
// holds those of four lanes, g and t = 0 ... 3, whose items differ. A column of weights is for one item: it has the
// item's weights where the corners are those of its lanes, and 0 elsewhere. So each lane gets the sums of its own rows
// and corners, column 2 * t + g / 4, in registers of its own, and no lane needs what another one has loaded.
//
// Weights are rounded to the type of value, and what that leaves is rounded again and multiplied, too. With weights
// beyond the range of the type a warp does without tensor cores. A value that is not finite makes results of up to four
// of the 8 items NaN, as 0 times infinity is.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_samples.cuh"
#include "tensor_cores.cuh"

namespace groupdetr {
namespace {

constexpr int kItemsOfWarp = 8, kLanesOfItem = kWarpSize / kItemsOfWarp;
constexpr int kStagedSamples = kWarpSize / kItemsOfWarp;  // of an item; each lane computes one
constexpr int kProductWarps = kDeformThreads / kWarpSize;
constexpr int kItemsOfTurn = kItemsOfWarp * kProductWarps;
constexpr int kSamplesAtOnce = 2;  // whose values are loaded before the first of them is multiplied

constexpr uint32_t kNoPlace = 0xffffffff;

// What a lane has to do. Eight lanes side by side load at the same time: 32 bytes of each of four items. Where there
// are 8 heads of 32 channels, these bytes lie in different lines of the first cache, and at different places of a line.
struct ProductLane {
  int32_t item, vector;  // of the warp's 8, and which of four times 16 bytes of channels
  bool supplies;         // weights, namely those of `supplied`
  int32_t supplied;
  int32_t staged_item, staged_sample;  // for which it computes the corners
  int32_t own_sums;                    // of the sums of a row, which are its own: 0 or 1

  static __device__ __forceinline__ ProductLane own() {
    const int32_t lane = threadIdx.x % kWarpSize, group = lane / 4, column = lane % 4;
    return {item_of(column, group / 4),
            group % 4 ^ (column & 2),
            group / 2 == column,
            item_of(column, group % 2),
            lane % kItemsOfWarp,
            lane / kItemsOfWarp,
            group / 4};
  }

 private:
  static __device__ __forceinline__ int32_t item_of(int32_t column, int32_t half) {
    return 2 * column + ((column ^ half) & 1);
  }
};

// Where a sample lies, and its weight, as they stand in memory.
struct GivenSample {
  float x = 0, y = 0, attention = 0;
  bool exists = false;

  __device__ __forceinline__ void load(const float* locations, const float* weights, int64_t place, bool exists_too) {
    exists = exists_too;
    if (!exists) return;
    x = __ldg(locations + place * 2);
    y = __ldg(locations + place * 2 + 1);
    attention = __ldg(weights + place);
  }
};

// What axis_corners() has of a position in (-1, size), but for slopes, in fewer instructions.
struct AxisPlaces {
  int32_t low, high;
  float low_weight, high_weight;

  __device__ __forceinline__ AxisPlaces(float position, int32_t size) {
    const int32_t whole = __float2int_rd(position);
    const float fraction = position - static_cast<float>(whole);
    low = max(whole, 0);
    high = min(whole + 1, size - 1);
    low_weight = whole >= 0 ? 1 - fraction : 0.f;
    high_weight = whole + 1 < size ? fraction : 0.f;
  }
};

// What a warp shares of its samples, [samples, items].
struct StagedCorners {
  uint4 places[kWarpSize];   // of the corners' rows in their map, in units of 16 bytes; kNoPlace if it touches no pixel
  uint4 weights[kWarpSize];  // rounded, of corners 0 and 1, 2 and 3; what rounding leaves of them. Or four floats

  // Stages the sample of the lane. Returns whether weights are staged as floats. All lanes must call it.
  template <typename T>
  __device__ __forceinline__ bool stage(const GivenSample& sample, const DeformLevel map, uint32_t row) {
    const float width = static_cast<float>(map.width), height = static_cast<float>(map.height);
    const float x = to_pixels(sample.x, width), y = to_pixels(sample.y, height);
    const bool inside = sample.exists && is_inside(x, y, width, height);
    const AxisPlaces columns(inside ? x : 0.f, map.width), rows(inside ? y : 0.f, map.height);
    const float attention = inside ? sample.attention : 0.f;
    const bool in_floats = __any_sync(kAllLanes, !(fabsf(attention) <= WeightRange<T>::kLargest));
    const float above = attention * rows.low_weight, below = attention * rows.high_weight;
    const float weight[4] = {above * columns.low_weight, above * columns.high_weight, below * columns.low_weight,
                             below * columns.high_weight};
    const uint32_t vectors = row / kVectorSize<T>;
    const uint32_t low_row = (map.start + rows.low * map.width) * vectors;
    const uint32_t high_row = (map.start + rows.high * map.width) * vectors;
    const uint32_t low_column = columns.low * vectors, high_column = columns.high * vectors;
    const int32_t lane = threadIdx.x % kWarpSize;
    places[lane] = make_uint4(inside ? low_row + low_column : kNoPlace, low_row + high_column, high_row + low_column,
                              high_row + high_column);
    if (in_floats) {
      weights[lane] = make_uint4(__float_as_uint(weight[0]), __float_as_uint(weight[1]), __float_as_uint(weight[2]),
                                 __float_as_uint(weight[3]));
    } else {
      constexpr float kFactor = WeightRange<T>::kFactor;
      const SplitPair upper = split<T>(weight[0] * kFactor, weight[1] * kFactor);
      const SplitPair lower = split<T>(weight[2] * kFactor, weight[3] * kFactor);
      weights[lane] = make_uint4(upper.rounded, lower.rounded, upper.rest, lower.rest);
    }
    return in_floats;
  }
};

// A lane's 16 bytes of the four corners of a sample. `from` is where they are in the first row of the map.
template <typename T>
struct CornerWords {
  uint32_t word[4][4] = {};

  __device__ __forceinline__ CornerWords(const T* from, const uint4& places, bool has_channels) {
    if (places.x == kNoPlace || !has_channels) return;
    const uint32_t place[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from) + place[c]);
      memcpy(word[c], &raw, sizeof(raw));
    }
  }

  // Adds the products with the column of weights that the lane supplies, in their two parts.
  __device__ __forceinline__ void add_to(float (&sums)[4][4], const uint4& weights) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t values[4] = {low_numbers(word[0][k], word[1][k]), high_numbers(word[0][k], word[1][k]),
                                  low_numbers(word[2][k], word[3][k]), high_numbers(word[2][k], word[3][k])};
      add_product<T>(sums[k], values, {weights.x, weights.y});
      add_product<T>(sums[k], values, {weights.z, weights.w});
    }
  }
};

// Adds up the first `count` of the staged samples. All lanes must call it.
template <typename T>
__device__ __forceinline__ void add_products(const T* from, const StagedCorners& staged, const ProductLane& lane,
                                             int32_t count, bool has_channels, float (&sums)[4][4]) {
#pragma unroll 1
  for (int32_t sample = 0; sample < count; sample += kSamplesAtOnce) {
    const int32_t first = sample * kItemsOfWarp, second = first + kItemsOfWarp;
    const CornerWords<T> corners(from, staged.places[first + lane.item], has_channels);
    const CornerWords<T> others(from, staged.places[second + lane.item], has_channels);
    corners.add_to(sums, lane.supplies ? staged.weights[first + lane.supplied] : make_uint4(0, 0, 0, 0));
    others.add_to(sums, lane.supplies ? staged.weights[second + lane.supplied] : make_uint4(0, 0, 0, 0));
  }
}

// The same without tensor cores, `factor` times.
template <typename T>
__device__ __forceinline__ void add_in_floats(const T* from, const StagedCorners& staged, const ProductLane& lane,
                                              int32_t count, bool has_channels, float factor, float (&sums)[4][4]) {
#pragma unroll 1
  for (int32_t sample = 0; sample < count; ++sample) {
    const int32_t place = sample * kItemsOfWarp + lane.item;
    const CornerWords<T> corners(from, staged.places[place], has_channels);
    const uint4 bits = staged.weights[place];
    const float weights[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                              __uint_as_float(bits.w)};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float low = 0, high = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 values = unpack<T>(corners.word[c][k]);
        low += weights[c] * values.x;
        high += weights[c] * values.y;
      }
      sums[k][0] += low * factor;
      sums[k][1] += low * factor;
      sums[k][2] += high * factor;
      sums[k][3] += high * factor;
    }
  }
}

// Block (x, y) has images y, y + gridDim.y, ... and of their items `turns` times kItemsOfTurn side by side, so that
// what one query reads is in the first cache for the next.
template <typename T>
__global__ void __launch_bounds__(kDeformThreads, 5)
    deform_forward_products(const __grid_constant__ DeformProblem p, const __grid_constant__ Divisor points,
                            const __grid_constant__ Divisor heads, int32_t turns, const T* __restrict__ value,
                            const float* __restrict__ locations, const float* __restrict__ weights,
                            T* __restrict__ out) {
  if constexpr (kHasTensorCores) {
    constexpr float kFactor = WeightRange<T>::kFactor;
    static __shared__ StagedCorners staged_of_block[kProductWarps];
    StagedCorners& staged = staged_of_block[threadIdx.x / kWarpSize];
    const ProductLane lane = ProductLane::own();
    const int32_t items = p.queries * p.heads, samples = p.levels * p.points, row = p.heads * p.channels;
    const int32_t begin = static_cast<int32_t>(blockIdx.x) * turns * kItemsOfTurn;
    const int32_t first_item = begin + static_cast<int32_t>(threadIdx.x) / kWarpSize * kItemsOfWarp;
    const int32_t end = min(items, begin + turns * kItemsOfTurn);
    for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
      const int64_t items_before = static_cast<int64_t>(image) * items;
      const auto load = [&](int32_t item, int32_t index) {
        const int32_t own = item + lane.staged_item, own_index = index + lane.staged_sample;
        GivenSample sample;
        sample.load(locations, weights, (items_before + own) * samples + own_index, own < end && own_index < samples);
        return sample;
      };
      GivenSample next = load(first_item, 0);
      for (int32_t item = first_item; item < end; item += kItemsOfTurn) {
        const int32_t own_item = item + lane.item, head = own_item - heads.divide(own_item) * p.heads;
        const T* const map = value + static_cast<int64_t>(image) * p.pixels * row + head * p.channels;
        for (int32_t channel = lane.vector * kVectorSize<T>, pass = 0; pass < p.channels;
             pass += kLanesOfItem * kVectorSize<T>) {
          const bool has_channels = own_item < end && pass + channel < p.channels;
          float sums[4][4] = {};
          for (int32_t first = 0; first < samples; first += kStagedSamples) {
            const GivenSample sample = next;
            // What the next turn of a loop stages is loaded while this one multiplies.
            const bool more = first + kStagedSamples < samples;
            const bool same_item = more || pass + kLanesOfItem * kVectorSize<T> < p.channels;
            next = load(same_item ? item : item + kItemsOfTurn, more ? first + kStagedSamples : 0);
            const int32_t index = first + lane.staged_sample;
            const bool in_floats =
                staged.stage<T>(sample, p.level[sample.exists ? points.divide(index) : 0], static_cast<uint32_t>(row));
            __syncwarp();
            const int32_t count = min(kStagedSamples, samples - first);
            if (in_floats) {
              add_in_floats(map + pass + channel, staged, lane, count, has_channels, kFactor, sums);
            } else {
              add_products(map + pass + channel, staged, lane, count, has_channels, sums);
            }
            __syncwarp();
          }
          if (has_channels) {
            float results[kVectorSize<T>];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              results[2 * k] = (lane.own_sums == 0 ? sums[k][0] : sums[k][1]) * (1 / kFactor);
              results[2 * k + 1] = (lane.own_sums == 0 ? sums[k][2] : sums[k][3]) * (1 / kFactor);
            }
            store_channels<kVectorSize<T>>(out + (items_before + own_item) * p.channels + pass + channel, results);
          }
        }
      }
    }
  }
}

}  // namespace

// Whether deform_forward_products serves a problem, on a GPU whose kernels have tensor cores. It numbers the 16 bytes
// of an image's values in 32 bits.
template <typename T, typename... Pointers>
bool fits_products(const DeformProblem& p, const Pointers*... pointers) {
  const int64_t vectors = static_cast<int64_t>(p.heads) * p.channels / kVectorSize<T>;
  return kIsHalf<T> && vectors_fit<T>(p, pointers...) && p.pixels * vectors < kNoPlace;
}

// For problems that fits_products() answers for.
template <typename T>
cudaError_t launch_deform_forward_products(const DeformProblem& p, const T* value, const float* locations,
                                           const float* weights, T* out, cudaStream_t stream) {
  if (!fits_products<T>(p, value, out)) return cudaErrorInvalidValue;
  if constexpr (kIsHalf<T>) {
    constexpr int64_t kEnoughBlocks = 4096;  // so that the last ones do not leave many multiprocessors idle
    constexpr int64_t kMostTurns = 16;
    const int64_t items = static_cast<int64_t>(p.queries) * p.heads;
    const int64_t most = items * p.images / kItemsOfTurn / kEnoughBlocks;
    const int32_t turns = static_cast<int32_t>(most < 1 ? 1 : most < kMostTurns ? most : kMostTurns);
    const auto divisor = [](int32_t size) { return Divisor(size > 0 ? size : 1); };
    return launch_deform(&deform_forward_products<T>, items, turns * kItemsOfTurn, p.images, stream, p,
                         divisor(p.points), divisor(p.heads), turns, value, locations, weights, out);
  }
  return cudaSuccess;
}

}  // namespace groupdetr
