// What every CUDA kernel file of this package uses besides common.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "common.h"

namespace groupdetr {

// The stream that torch queues work on for a device. Kernels go to it, so that they wait for their inputs and can be
// captured in a CUDA graph.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.11 does not have.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace groupdetr
