// Which of several kernels, or ways of one, serves. The environment says when the extension is loaded; after that the
// functions of the module, for tests and benchmarks of each (groupdetr_fast/testing.py).
#pragma once

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace groupdetr {

// 1 or 0 where the variable is just that.
inline int asked_for(const char* variable, int otherwise) {
  const char* const value = std::getenv(variable);
  const std::string_view text = value == nullptr ? "" : value;
  return text == "1" ? 1 : text == "0" ? 0 : otherwise;
}

// Whether the backward pass of deformable attention goes by tiles (cuda/ms_deform_attn_tiles.cuh) where it can: 1 by
// default, which takes an H200 0.78 to 0.85 of the other kernel's time (docs/gpu_kernels.md), or 0.
inline std::atomic<int> deformable_tiles = asked_for("GROUPDETR_FAST_DEFORMABLE_TILES", 1);

// Whether that pass sorts samples by counting them in shared memory (cuda/ms_deform_attn_chunks.cuh), and then from
// fewer samples on: 1, or 0 by default, as no GPU has timed it.
inline std::atomic<int> deformable_shared_sort = asked_for("GROUPDETR_FAST_DEFORMABLE_SHARED_SORT", 0);

// Whether its forward pass goes by products on tensor cores (cuda/ms_deform_attn_products.cuh) where it can: 1, or 0 by
// default, as no GPU has timed it.
inline std::atomic<int> deformable_products = asked_for("GROUPDETR_FAST_DEFORMABLE_PRODUCTS", 0);

// Whether the assignment's kernel (cuda/linear_assignment.cuh) copies costs to shared memory where they fit: the same,
// about 0.7 of the time with 20 targets, as long with 60 and more.
inline std::atomic<int> assignment_shared_costs = asked_for("GROUPDETR_FAST_ASSIGNMENT_SHARED_COSTS", 1);

// Whether it adds up in fixed point where that is exact: 1, 0, or -1 for what suits the GPU. Results are proved equal.
inline std::atomic<int> assignment_fixed_point = asked_for("GROUPDETR_FAST_ASSIGNMENT_FIXED_POINT", -1);

}  // namespace groupdetr
