// Fibers, their schedule, and the calls in which threads wait for each other.

#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

alignas(128) double dynamic_shared_memory[cuda_on_cpu::kMaxDynamicShared / sizeof(double)];

// The linker's names for the ends of the memory that `static __shared__` arrays lie in: the section given by the
// attribute, but those of templates, where g++ ignores it, are with all uninitialised variables.
extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace cuda_on_cpu {

Machine machine;

// --- Fibers ---

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64 only"
#endif

// Saves the registers that a function must preserve, and continues on another stack where that one has been left.
extern "C" void cuda_on_cpu_switch_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl cuda_on_cpu_switch_stack
.hidden cuda_on_cpu_switch_stack
cuda_on_cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace {

void to_scheduler() { cuda_on_cpu_switch_stack(&machine.current->stack_pointer, machine.scheduler_stack_pointer); }

void finish_meetings_of(int warp);
void finish_barrier();

void fiber() {
  machine.kernel();
  Thread& self = *machine.current;
  self.finished = true;
  ++machine.num_finished;
  machine.warps[self.warp()].unfinished_lanes &= ~(1u << self.lane());
  finish_meetings_of(self.warp());
  finish_barrier();
  to_scheduler();
}

void* new_stack(int thread) {
  constexpr size_t kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(machine.stacks + (thread + 1) * kStackBytes);
  void** stack_pointer = top - 2 - kSavedRegisters;  // `ret` leaves the stack aligned as at the start of a function
  std::fill(stack_pointer, top, nullptr);
  stack_pointer[kSavedRegisters] = reinterpret_cast<void*>(&fiber);
  return stack_pointer;
}

void resume(int thread) {
  machine.current = &machine.threads[thread];
  const unsigned x = machine.block.x, y = machine.block.y;
  const unsigned index = thread;
  threadIdx = {index % x, index / x % y, index / (x * y)};
  cuda_on_cpu_switch_stack(&machine.scheduler_stack_pointer, machine.current->stack_pointer);
  machine.current = nullptr;
}

void wait_in(const char* name, const Site& site) {
  machine.current->waits_for = name;
  machine.current->waits_at = site;
  to_scheduler();
}

void wake(Thread& thread) {
  thread.waits_for = nullptr;
  if (&thread != machine.current) machine.runnable.push_back(thread.index);
}

bool same_place(const char* name, const Site& site, const char* other_name, const Site& other) {
  return site.line() == other.line() && site.column() == other.column() && std::strcmp(name, other_name) == 0 &&
         std::strcmp(site.file_name(), other.file_name()) == 0;
}

std::string place(const char* name, const Site& site) {
  const char* file = std::strrchr(site.file_name(), '/');
  return std::string(name) + " (" + (file ? file + 1 : site.file_name()) + ":" + std::to_string(site.line()) + ")";
}

}  // namespace

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  machine.error = "block " + std::to_string(machine.block_index);
  if (machine.current) machine.error += ", thread " + std::to_string(machine.current->index);
  machine.error += std::string(": ") + message;
  while (true) to_scheduler();
}

// --- The schedule ---

uint64_t Machine::random() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

void preemption_point() {
  if (machine.schedule == 0) return;
  constexpr uint64_t kRarity[] = {2, 10, 50};
  if (machine.random() % kRarity[machine.schedule % 3] != 0) return;
  machine.runnable.push_back(machine.current->index);
  to_scheduler();
}

namespace {

int next_thread() {
  auto& runnable = machine.runnable;
  if (machine.schedule > 0) std::swap(runnable.front(), runnable[machine.random() % runnable.size()]);
  const int thread = runnable.front();
  runnable.pop_front();
  return thread;
}

// Also fills the gaps between arrays that AddressSanitizer watches.
__attribute__((no_sanitize_address)) void fill_with_garbage(void* memory, size_t bytes) {
  for (size_t index = 0; index < bytes; ++index)
    static_cast<char*>(memory)[index] = static_cast<char>(machine.random());
}

void report_deadlock() {
  std::string waits;
  for (const Thread& thread : machine.threads) {
    const std::string where = thread.finished ? "" : place(thread.waits_for, thread.waits_at);
    if (where.empty() || waits.find(where) != std::string::npos) continue;
    waits += (waits.empty() ? "" : ", ") + where + " from thread " + std::to_string(thread.index);
  }
  machine.error = "block " + std::to_string(machine.block_index) + ": deadlock; threads wait in " + waits +
                  (machine.num_finished > 0 ? "; others have finished" : "");
}

void run_block() {
  const Extent& grid = machine.grid;
  const unsigned index = machine.block_index;
  blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
  forget_shared_accesses();
  char* dynamic = reinterpret_cast<char*>(dynamic_shared_memory);
  ASAN_UNPOISON_MEMORY_REGION(dynamic, kMaxDynamicShared);
  fill_with_garbage(dynamic, machine.dynamic_shared);
  ASAN_POISON_MEMORY_REGION(dynamic + machine.dynamic_shared, kMaxDynamicShared - machine.dynamic_shared);
  fill_with_garbage(__start_cuda_shared, __stop_cuda_shared - __start_cuda_shared);

  machine.num_finished = 0;
  machine.num_barriers = 0;
  machine.barrier_count = 0;
  machine.at_barrier.clear();
  machine.warps.assign((machine.num_threads + kWarpSize - 1) / kWarpSize, {});
  machine.threads.assign(machine.num_threads, {});
  machine.runnable.clear();
  for (int index = 0; index < machine.num_threads; ++index) {
    Thread& thread = machine.threads[index];
    thread.index = index;
    thread.stack_pointer = new_stack(index);
    thread.clock[thread.lane()] = 1;
    machine.warps[thread.warp()].unfinished_lanes |= 1u << thread.lane();
    machine.runnable.push_back(index);
  }
  while (!machine.runnable.empty() && machine.error.empty()) resume(next_thread());
  if (machine.error.empty() && machine.num_finished < machine.num_threads) report_deadlock();
}

}  // namespace

bool allow_dynamic_shared(const void* code, size_t bytes) {
  if (bytes > kMaxDynamicShared) return false;
  machine.allowed_dynamic_shared[code] = std::max(bytes, kDynamicSharedWithoutAsking);
  return true;
}

bool launch(Extent grid, Extent block, size_t dynamic_shared, const void* code, const std::function<void()>& kernel) {
  const auto allowed = machine.allowed_dynamic_shared.find(code);
  const size_t most_shared =
      allowed == machine.allowed_dynamic_shared.end() ? kDynamicSharedWithoutAsking : allowed->second;
  machine.error.clear();
  machine.random_state = machine.schedule;
  machine.kernel = kernel;
  machine.grid = grid;
  machine.block = block;
  machine.dynamic_shared = dynamic_shared;
  blockDim = {block.x, block.y, block.z};
  gridDim = {grid.x, grid.y, grid.z};
  machine.num_threads = block.x * block.y * block.z;
  if (machine.num_threads < 1 || machine.num_threads > kMaxThreads || dynamic_shared > most_shared ||
      grid.x * grid.y * grid.z == 0) {
    machine.error = "the launch configuration is not valid";
    return false;
  }
  if (machine.stacks == nullptr) {
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    machine.stacks = static_cast<char*>(stacks);
  }
  forget_accesses();
  std::vector<int> blocks(grid.x * grid.y * grid.z);
  for (size_t index = 0; index < blocks.size(); ++index) blocks[index] = static_cast<int>(index);
  if (machine.schedule > 0) {
    for (size_t index = blocks.size(); index > 1; --index)
      std::swap(blocks[index - 1], blocks[machine.random() % index]);
  }
  for (const int index : blocks) {
    machine.block_index = index;
    run_block();
    if (!machine.error.empty()) return false;
  }
  return true;
}

// --- Waiting for each other ---

int lane() { return machine.current->lane(); }

uint32_t unfinished_lanes() { return machine.warps[machine.current->warp()].unfinished_lanes; }

namespace {

bool is_complete(const Meeting& meeting) {
  return (meeting.mask & unfinished_lanes() & ~meeting.contributions.lanes) == 0;
}

void finish(const Meeting& meeting, int warp) {
  std::vector<Thread*> lanes;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (meeting.contributions.lanes >> lane & 1) lanes.push_back(&machine.threads[warp * kWarpSize + lane]);
  }
  if (meeting.orders_memory) join_clocks(lanes);
  for (Thread* thread : lanes) wake(*thread);
}

void finish_meetings_of(int warp) {
  std::erase_if(machine.warps[warp].meetings, [&](const auto& meeting) {
    if (!is_complete(*meeting)) return false;
    finish(*meeting, warp);
    return true;
  });
}

void finish_barrier() {
  const size_t waiting = machine.at_barrier.size();
  if (waiting == 0 || waiting + machine.num_finished < static_cast<size_t>(machine.num_threads)) return;
  ++machine.num_barriers;
  machine.barrier_result = machine.barrier_count;
  machine.barrier_count = 0;
  for (const int thread : std::exchange(machine.at_barrier, {})) wake(machine.threads[thread]);
}

}  // namespace

Contributions exchange(const char* name, const Site& site, uint32_t mask, uint64_t value, bool orders_memory) {
  Thread& self = *machine.current;
  if (!(mask >> self.lane() & 1)) fail("the mask of %s lacks the calling lane", place(name, site).c_str());
  auto& meetings = machine.warps[self.warp()].meetings;
  const auto open =
      std::find_if(meetings.begin(), meetings.end(), [&](const auto& m) { return (m->mask & mask) != 0; });
  std::shared_ptr<Meeting> meeting;
  if (open == meetings.end()) {
    meeting = std::make_shared<Meeting>(Meeting{name, site, mask, orders_memory, {}});
    meetings.push_back(meeting);
  } else {
    meeting = *open;
    if (!same_place(name, site, meeting->name, meeting->site)) {
      fail("lanes disagree about the call: %s, others are in %s", place(name, site).c_str(),
           place(meeting->name, meeting->site).c_str());
    }
    if (meeting->mask != mask) {
      fail("lanes disagree about the mask of %s: %#x, others have %#x", place(name, site).c_str(), mask, meeting->mask);
    }
  }
  meeting->contributions.values[self.lane()] = value;
  meeting->contributions.lanes |= 1u << self.lane();
  if (is_complete(*meeting)) {
    std::erase(meetings, meeting);
    finish(*meeting, self.warp());
    preemption_point();
  } else {
    wait_in(name, site);
  }
  return meeting->contributions;
}

int barrier(const char* name, const Site& site, bool predicate) {
  if (!machine.at_barrier.empty()) {
    const Thread& other = machine.threads[machine.at_barrier.front()];
    if (!same_place(name, site, other.waits_for, other.waits_at)) {
      fail("threads disagree about the barrier: %s, others are in %s", place(name, site).c_str(),
           place(other.waits_for, other.waits_at).c_str());
    }
  }
  machine.at_barrier.push_back(machine.current->index);
  machine.barrier_count += predicate;
  const uint32_t before = machine.num_barriers;
  finish_barrier();
  if (machine.num_barriers == before) wait_in(name, site);
  const int result = machine.barrier_result;
  preemption_point();
  return result;
}

void before_atomic(const volatile void* address, size_t bytes, const void* code) {
  check_access(address, bytes, true, true, code);
  preemption_point();
}

bool is_shared_memory(const void* address) {
  const char* at = static_cast<const char*>(address);
  return (at >= __bss_start && at < _end) || (at >= __start_cuda_shared && at < __stop_cuda_shared);
}

}  // namespace cuda_on_cpu

void cuda_on_cpu_schedule(uint64_t schedule, bool ignore_races) {
  cuda_on_cpu::machine.schedule = schedule;
  cuda_on_cpu::machine.ignores_races = ignore_races;
}

const char* cuda_on_cpu_error() { return cuda_on_cpu::machine.error.c_str(); }
