// Runs CUDA kernels on the CPU, for tests. Every CUDA thread is a fiber; the fibers of a block take turns on one CPU
// thread, blocks run one after the other. Compile kernels against include/, which has stand-ins for CUDA's headers, and
// launch them with cudaLaunchKernelEx. A launch returns an error, explained by cuda_on_cpu_error(), if
//   - lanes of a warp disagree about a warp-wide call or its mask, or threads of a block about a barrier;
//   - a shuffle reads a lane that does not take part, or threads wait for each other for ever;
//   - two threads use the same memory without a barrier between them. This needs -fsanitize=thread, whose calls before
//     every load and store machine.cpp and races.cpp answer; there is no ThreadSanitizer in it.
//
// cuda_on_cpu_schedule() selects the order of the threads. Schedule 0 runs each thread until it has to wait, in the
// order of their indices. The others are random but reproducible: any thread that can run may be next, and threads lose
// their turn at atomics, at barriers and, with -fsanitize=thread, at loads and stores.
//
// Static arrays in shared memory have to be declared `static __shared__`; dynamic shared memory is
// `extern __shared__ double dynamic_shared_memory[]`, outside of any namespace. It is full of random bytes when a block
// starts. A kernel gets more than 48 KiB of it after cudaFuncSetAttribute alone, and at most what an H100 has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 227 << 10;
constexpr size_t kDynamicSharedWithoutAsking = 48 << 10;

struct Extent {
  unsigned x, y, z;
};

using Site = std::source_location;

// What the lanes of a mask contributed to a warp-wide call.
struct Contributions {
  uint64_t values[kWarpSize];
  uint32_t lanes;  // those that took part
};

// Waits until all lanes of `mask` have made the call. With `orders_memory`, what they did before happened before what
// they do afterwards.
Contributions exchange(const char* name, const Site& site, uint32_t mask, uint64_t value, bool orders_memory = false);

// Waits until all threads of the block have made the call; the number of those whose predicate is not zero.
int barrier(const char* name, const Site& site, bool predicate);

// To be called before an atomic operation; `code` is where the kernel calls it.
void before_atomic(const volatile void* address, size_t bytes, const void* code);

// Gives other threads a turn, sometimes.
void preemption_point();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int lane();
uint32_t unfinished_lanes();

// Lets launches of the kernel at `code` ask for so many bytes of dynamic shared memory; false if no block gets as many.
bool allow_dynamic_shared(const void* code, size_t bytes);

// Launches `kernel`, whose code lies at `code`. False, and the launch is over, if something went wrong.
bool launch(Extent grid, Extent block, size_t dynamic_shared, const void* code, const std::function<void()>& kernel);

}  // namespace cuda_on_cpu

extern "C" {
__attribute__((visibility("default"))) void cuda_on_cpu_schedule(uint64_t schedule, bool ignore_races);
__attribute__((visibility("default"))) const char* cuda_on_cpu_error();
}
