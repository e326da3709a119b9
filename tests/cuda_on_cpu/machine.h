// The state of the emulated GPU, shared by machine.cpp and races.cpp.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

struct Thread {
  int index;            // within the block
  void* stack_pointer;  // of the suspended fiber
  bool finished;
  const char* waits_for;  // name of the call that the thread waits in, or null
  Site waits_at;
  // For races.cpp: how much of each lane's past is known to have happened, in numbers of __syncwarp; the entry of the
  // own lane is the present.
  uint32_t clock[kWarpSize];

  int warp() const { return index / kWarpSize; }
  int lane() const { return index % kWarpSize; }
};

// A warp-wide call that some lanes still have to make.
struct Meeting {
  const char* name;
  Site site;
  uint32_t mask;
  bool orders_memory;
  Contributions contributions;
};

struct Warp {
  uint32_t unfinished_lanes = 0;
  std::vector<std::shared_ptr<Meeting>> meetings;
};

struct Machine {
  // The launch.
  std::function<void()> kernel;
  Extent grid, block;
  size_t dynamic_shared = 0;
  std::unordered_map<const void*, size_t> allowed_dynamic_shared;  // by code of kernels
  std::string error;

  // The block that runs.
  int block_index = 0;
  int num_threads = 0, num_finished = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> at_barrier;
  int barrier_count = 0, barrier_result = 0;
  uint32_t num_barriers = 0;
  std::deque<int> runnable;
  Thread* current = nullptr;  // null outside of kernels

  // The schedule.
  uint64_t schedule = 0, random_state = 0;
  bool ignores_races = false;
  uint64_t random();

  char* stacks = nullptr;
  void* scheduler_stack_pointer = nullptr;
};

constexpr size_t kStackBytes = 256 << 10;

extern Machine machine;

bool is_shared_memory(const void* address);

void forget_accesses();
void forget_shared_accesses();
void join_clocks(const std::vector<Thread*>& lanes);
void check_access(const volatile void* address, size_t bytes, bool write, bool atomic, const void* code);

}  // namespace cuda_on_cpu
