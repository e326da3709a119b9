// Matching costs on the CPU: blocks of queries are laid out coordinate by coordinate, and every loop over a block is
// vector code. Targets of one class share their class costs.

#include "../matching_cost.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common.h"
#include "simd.h"

namespace groupdetr {
namespace {

constexpr int64_t kBlock = 256;  // queries; their logits and coordinates stay in the first two caches

template <typename T>
struct QueryBlock {
  alignas(64) T cx[kBlock], cy[kBlock], width[kBlock], height[kBlock];
  alignas(64) T left[kBlock], top[kBlock], right[kBlock], bottom[kBlock], area[kBlock];
  alignas(64) T class_costs[kBlock];
};

template <typename T>
ALWAYS_INLINE void load_boxes(const T* boxes, int64_t query_stride, int64_t coordinate_stride, int64_t count,
                              QueryBlock<T>& block) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = boxes + i * query_stride;
    block.cx[i] = from[0];
    block.cy[i] = from[coordinate_stride];
    block.width[i] = from[2 * coordinate_stride];
    block.height[i] = from[3 * coordinate_stride];
  }
  for (int64_t i = 0; i < count; ++i) {
    const Box<T> box = make_box(block.cx[i], block.cy[i], block.width[i], block.height[i]);
    block.left[i] = box.left;
    block.top[i] = box.top;
    block.right[i] = box.right;
    block.bottom[i] = box.bottom;
    block.area[i] = box.area;
  }
}

template <bool kSquare, typename T, typename L>
ALWAYS_INLINE void compute_class_costs(const L* logits, int64_t query_stride, int64_t count,
                                       const CostWeights<T>& weights, QueryBlock<T>& block) {
  for (int64_t i = 0; i < count; ++i) block.class_costs[i] = static_cast<T>(logits[i * query_stride]);
  for (int64_t i = 0; i < count; ++i) block.class_costs[i] = class_cost<kSquare>(block.class_costs[i], weights);
}

template <typename T>
ALWAYS_INLINE void write_costs(const QueryBlock<T>& block, const Box<T>& target, int64_t count,
                               const CostWeights<T>& weights, T* __restrict cost) {
  for (int64_t i = 0; i < count; ++i) {
    const Box<T> query{block.cx[i],  block.cy[i],    block.width[i],  block.height[i], block.left[i],
                       block.top[i], block.right[i], block.bottom[i], block.area[i]};
    cost[i] = block.class_costs[i] + box_cost(query, target, weights);
  }
}

struct Batch {
  torch::stable::Tensor logits, boxes, labels, target_boxes, num_targets, cost;
  int64_t images, queries, classes, max_targets;
};

// Position of each image's targets, by class; targets of one class in their order.
std::vector<int64_t> order_by_class(const int64_t* labels, const int64_t* label_strides, const Batch& batch) {
  std::vector<int64_t> order(batch.images * batch.max_targets);
  for (int64_t image = 0; image < batch.images; ++image) {
    const auto begin = order.begin() + image * batch.max_targets;
    std::iota(begin, begin + batch.max_targets, 0);
    const int64_t* own = labels + image * label_strides[0];
    std::sort(begin, begin + batch.max_targets, [&](int64_t a, int64_t b) {
      const int64_t label_a = own[a * label_strides[1]], label_b = own[b * label_strides[1]];
      return label_a != label_b ? label_a < label_b : a < b;
    });
  }
  return order;
}

// L is the dtype of the logits.
template <typename T, typename L>
void compute(const Batch& batch, const CostWeights<T>& weights) {
  const L* logits = batch.logits.const_data_ptr<L>();
  const T* boxes = batch.boxes.const_data_ptr<T>();
  const int64_t* labels = batch.labels.const_data_ptr<int64_t>();
  const T* target_boxes = batch.target_boxes.const_data_ptr<T>();
  const int64_t* num_targets = batch.num_targets.const_data_ptr<int64_t>();
  T* cost = batch.cost.mutable_data_ptr<T>();

  const int64_t leading = batch.logits.dim() - 2;  // the last of these dimensions counts images
  const int64_t* sizes = batch.logits.sizes().data();
  const int64_t* logit_strides = batch.logits.strides().data();
  const int64_t* box_strides = batch.boxes.strides().data();
  const int64_t* label_strides = batch.labels.strides().data();
  const int64_t* target_strides = batch.target_boxes.strides().data();
  const int64_t count_stride = batch.num_targets.stride(0);
  const std::vector<int64_t> order = order_by_class(labels, label_strides, batch);

  const int64_t blocks = (batch.queries + kBlock - 1) / kBlock;
  const int64_t problems = batch.cost.numel() / (batch.queries * batch.max_targets);
  const auto work = [&](int64_t begin, int64_t end) {
    with_simd([&]<int kBytes>() __attribute__((always_inline)) {
      QueryBlock<T> block;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t problem = task / blocks, image = problem % batch.images;
        const int64_t first = task % blocks * kBlock;
        const int64_t count = batch.queries - first < kBlock ? batch.queries - first : kBlock;
        int64_t targets = num_targets[image * count_stride];
        targets = targets < 0 ? 0 : targets < batch.max_targets ? targets : batch.max_targets;
        T* own_cost = cost + problem * batch.max_targets * batch.queries + first;
        const L* own_logits =
            logits + leading_offset(problem, leading, sizes, logit_strides) + first * logit_strides[leading];
        load_boxes(boxes + leading_offset(problem, leading, sizes, box_strides) + first * box_strides[leading],
                   box_strides[leading], box_strides[leading + 1], count, block);

        bool has_costs = false;
        int64_t label_of_costs = 0;
        for (int64_t position = 0; position < batch.max_targets; ++position) {
          const int64_t target = order[image * batch.max_targets + position];
          T* row = own_cost + target * batch.queries;
          if (target >= targets) {
            for (int64_t i = 0; i < count; ++i) row[i] = 0;
            continue;
          }
          const int64_t label = labels[image * label_strides[0] + target * label_strides[1]];
          if (!has_costs || label != label_of_costs) {
            const int64_t query_stride = logit_strides[leading], class_stride = logit_strides[leading + 1];
            if (label < 0 || label >= batch.classes) {
              for (int64_t i = 0; i < count; ++i) block.class_costs[i] = std::numeric_limits<T>::quiet_NaN();
            } else if (weights.gamma == 2) {
              compute_class_costs<true>(own_logits + label * class_stride, query_stride, count, weights, block);
            } else {
              compute_class_costs<false>(own_logits + label * class_stride, query_stride, count, weights, block);
            }
            has_costs = true;
            label_of_costs = label;
          }
          const T* box = target_boxes + image * target_strides[0] + target * target_strides[1];
          const int64_t stride = target_strides[2];
          write_costs(block, make_box(box[0], box[stride], box[2 * stride], box[3 * stride]), count, weights, row);
        }
      }
    });
  };
  constexpr int64_t kCostsPerThread = 1 << 14;
  const int64_t grain = kCostsPerThread / (batch.max_targets * std::min(kBlock, batch.queries)) + 1;
  torch::stable::parallel_for(0, problems * blocks, grain, work);
}

torch::stable::Tensor matching_cost(const torch::stable::Tensor& logits, const torch::stable::Tensor& boxes,
                                    const torch::stable::Tensor& target_labels,
                                    const torch::stable::Tensor& target_boxes, const torch::stable::Tensor& num_targets,
                                    double class_weight, double l1_weight, double giou_weight, double alpha,
                                    double gamma) {
  using torch::headeronly::ScalarType;
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims >= 3 && boxes.dim() == dims, "matching_cost: logits and boxes must have 3 or more dimensions");
  STD_TORCH_CHECK(target_labels.dim() == 2 && target_boxes.dim() == 3 && num_targets.dim() == 1,
                  "matching_cost: targets must be labels [B, T], boxes [B, T, 4] and num_targets [B]");
  const int64_t images = logits.size(dims - 3), queries = logits.size(dims - 2), classes = logits.size(dims - 1);
  const int64_t max_targets = target_labels.size(1);
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < dims - 1; ++dim) {
    STD_TORCH_CHECK(boxes.size(dim) == logits.size(dim), "matching_cost: boxes must have the leading shape of logits");
    if (dim < dims - 2) shape.push_back(logits.size(dim));
  }
  shape.push_back(max_targets);
  shape.push_back(queries);
  STD_TORCH_CHECK(boxes.size(dims - 1) == 4 && target_boxes.size(2) == 4, "matching_cost: boxes need 4 coordinates");
  STD_TORCH_CHECK(target_labels.size(0) == images && target_boxes.size(0) == images && num_targets.size(0) == images &&
                      target_boxes.size(1) == max_targets,
                  "matching_cost: targets must belong to the images of logits");
  const ScalarType dtype = logits.scalar_type();
  const ScalarType box_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(boxes.scalar_type() == box_dtype && target_boxes.scalar_type() == box_dtype,
                  "matching_cost: boxes must have the dtype of logits, or float32 where that is lower");
  STD_TORCH_CHECK(target_labels.scalar_type() == ScalarType::Long && num_targets.scalar_type() == ScalarType::Long,
                  "matching_cost: labels and num_targets must be int64");
  STD_TORCH_CHECK(boxes.is_cpu() && target_labels.is_cpu() && target_boxes.is_cpu() && num_targets.is_cpu(),
                  "matching_cost: all tensors must lie on one device");
  const Batch batch{logits, boxes,   target_labels, target_boxes, num_targets, torch::stable::new_empty(boxes, shape),
                    images, queries, classes,       max_targets};
  if (batch.cost.numel() == 0) return batch.cost;
  const auto run = [&]<typename T, typename L>() {
    compute<T, L>(batch, {static_cast<T>(class_weight), static_cast<T>(l1_weight), static_cast<T>(giou_weight),
                          static_cast<T>(alpha), static_cast<T>(gamma)});
  };
  switch (dtype) {
    case ScalarType::Float:
      run.template operator()<float, float>();
      break;
    case ScalarType::Double:
      run.template operator()<double, double>();
      break;
    case ScalarType::Half:
      run.template operator()<float, torch::headeronly::Half>();
      break;
    case ScalarType::BFloat16:
      run.template operator()<float, torch::headeronly::BFloat16>();
      break;
    default:
      STD_TORCH_CHECK(false, "matching_cost: logits must be float32, float64, float16 or bfloat16");
  }
  return batch.cost;
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CPU, m) { m.impl("matching_cost", TORCH_BOX(&groupdetr::matching_cost)); }
