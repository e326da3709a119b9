// What every CUDA kernel file of this package uses besides common.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>

#include "architectures.h"
#include "common.h"

// What only a torch with CUDA has. Weak, so that an extension with CUDA kernels also loads in a torch without, where
// nothing calls them.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t err, const char* filename,
                                                              const char* function_name, uint32_t line_number,
                                                              bool include_device_assertions, char** error_msg);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char* error_msg);
}

namespace groupdetr {

// The stream that torch queues work on for a device. Kernels go to it, so that they wait for their inputs and can be
// captured in a CUDA graph.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.11 does not have.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether this extension can run its kernels on a GPU: it has code for it that is not for an older architecture than
// `oldest`, and the driver is new enough for the CUDA runtime in it.
inline bool find_whether_served(int32_t device_index, int oldest) {
  int driver = 0, major = 0, minor = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver / 1000 >= CUDART_VERSION / 1000 &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index) == cudaSuccess &&
         has_code(kArchitectures, 10 * major + minor, oldest);
}

// The same, asked once a device.
template <int kOldest = 0>
bool is_served(int32_t device_index) {
  enum : char { kUnknown, kNo, kYes };
  static std::array<std::atomic<char>, 64> known = {};
  if (device_index < 0 || device_index >= static_cast<int32_t>(known.size())) {
    return find_whether_served(device_index, kOldest);
  }
  char answer = known[device_index].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    answer = find_whether_served(device_index, kOldest) ? kYes : kNo;
    known[device_index].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

}  // namespace groupdetr
