// Finds pairs of accesses to the same memory, at least one of them a write and not both atomic, that no barrier orders:
// neither __syncthreads of their block nor __syncwarp of their warp, and different blocks always are unordered. Such a
// pair is found whatever the schedule, as long as both accesses happen. Like ThreadSanitizer, this remembers only the
// latest few accesses to each word.
//
// g++ -fsanitize=thread puts calls of the functions at the end of this file before the loads and stores of kernels.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kWordBytes = 8;

struct Access {
  int block, thread;
  uint32_t num_barriers, time;  // what they were at the access
  uint8_t bytes;                // of the word, as a bit set
  bool write, atomic;
  const void* code;
};

struct Word {
  std::array<Access, 6> accesses;
  size_t count = 0;
};

std::unordered_map<uintptr_t, Word> shared_words, global_words;

bool happened_before(const Access& past, const Thread& now) {
  if (past.block != machine.block_index) return false;
  if (past.thread == now.index || past.num_barriers < machine.num_barriers) return true;
  return past.thread / kWarpSize == now.warp() && past.time <= now.clock[past.thread % kWarpSize];
}

const char* verb(const Access& access) { return access.atomic ? "an atomic" : access.write ? "a write" : "a read"; }

unsigned long offset_in_library(const void* code) {
  Dl_info info;
  return dladdr(code, &info) ? static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) : 0;
}

void check_word(Word& word, const Access& now, const Thread& self, bool shared) {
  size_t kept = 0;
  for (size_t index = 0; index < word.count; ++index) {
    const Access& past = word.accesses[index];
    const bool before = happened_before(past, self);
    if ((past.bytes & now.bytes) && (past.write || now.write) && !(past.atomic && now.atomic) && !before) {
      fail("race in %s memory: %s at <code+%#lx> and %s of block %d, thread %d at <code+%#lx>",
           shared ? "shared" : "global", verb(now), offset_in_library(now.code), verb(past), past.block, past.thread,
           offset_in_library(past.code));
    }
    // An access that is ordered before this one tells nothing more than this one, if this one conflicts with as much.
    const bool replaced =
        before && (past.bytes & ~now.bytes) == 0 && (now.write || !past.write) && (past.atomic || !now.atomic);
    if (!replaced) word.accesses[kept++] = past;
  }
  if (kept == word.accesses.size()) {
    std::copy(word.accesses.begin() + 1, word.accesses.end(), word.accesses.begin());
    --kept;
  }
  word.accesses[kept++] = now;
  word.count = kept;
}

bool is_own_stack(const char* at) {
  if (at < machine.stacks || at >= machine.stacks + kMaxThreads * kStackBytes) return false;
  const int owner = static_cast<int>((at - machine.stacks) / kStackBytes);
  if (owner != machine.current->index) fail("access to local memory of thread %d", owner);
  return true;
}

}  // namespace

void forget_shared_accesses() { shared_words.clear(); }

void forget_accesses() { global_words.clear(); }

void join_clocks(const std::vector<Thread*>& lanes) {
  uint32_t joined[kWarpSize] = {};
  for (const Thread* thread : lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) joined[lane] = std::max(joined[lane], thread->clock[lane]);
  }
  for (Thread* thread : lanes) {
    std::memcpy(thread->clock, joined, sizeof(joined));
    ++thread->clock[thread->lane()];
  }
}

void check_access(const volatile void* address, size_t bytes, bool write, bool atomic, const void* code) {
  const Thread* self = machine.current;
  const char* at = const_cast<const char*>(static_cast<const volatile char*>(address));
  if (self == nullptr || machine.ignores_races || is_own_stack(at)) return;
  const bool shared = is_shared_memory(at);
  auto& words = shared ? shared_words : global_words;
  for (size_t done = 0; done < bytes;) {
    const uintptr_t word = reinterpret_cast<uintptr_t>(at + done) / kWordBytes;
    const size_t offset = reinterpret_cast<uintptr_t>(at + done) % kWordBytes;
    const size_t count = std::min(bytes - done, kWordBytes - offset);
    const auto set = static_cast<uint8_t>(((1u << count) - 1) << offset);
    const Access now = {
        machine.block_index, self->index, machine.num_barriers, self->clock[self->lane()], set, write, atomic, code};
    check_word(words[word], now, *self, shared);
    done += count;
  }
}

namespace {

void before_access(void* address, size_t bytes, bool write, const void* code) {
  if (machine.current == nullptr || is_own_stack(static_cast<char*>(address))) return;
  check_access(address, bytes, write, false, code);
  preemption_point();
}

}  // namespace
}  // namespace cuda_on_cpu

#define HOOK(name, bytes, write) \
  void __tsan_##name(void* address) { cuda_on_cpu::before_access(address, bytes, write, __builtin_return_address(0)); }
#define HOOKS(bytes)                        \
  HOOK(read##bytes, bytes, false)           \
  HOOK(write##bytes, bytes, true)           \
  HOOK(unaligned_read##bytes, bytes, false) \
  HOOK(unaligned_write##bytes, bytes, true) \
  HOOK(volatile_read##bytes, bytes, false)  \
  HOOK(volatile_write##bytes, bytes, true)

extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* address, unsigned long bytes) {
  cuda_on_cpu::before_access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  cuda_on_cpu::before_access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
