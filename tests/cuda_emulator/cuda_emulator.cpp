// The scheduler of the fibers. This file is compiled without sanitizers, whose business is the kernels'
// memory; it tells them of fibers and of what orders their accesses.
#include "cuda_emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#ifdef EVAKERNELS_WATCH_THREAD
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef EVAKERNELS_WATCH_ADDRESS
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#endif

namespace cuda_emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpSize = 32;

enum class State { Ready, AtBarrier, InWarp, Done };

// The lanes of a mask on their way into one warp function.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  const char* what;
  int line;
  std::array<uint64_t, kWarpSize> values;
  std::array<int, kWarpSize> sources;
};

struct Fiber {
  uint3 index;
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  void* sanitizer = nullptr;
  State state = State::Done;
  const char* what = "";
  int line = 0;
  uint64_t received = 0;
  unsigned barriers = 0;
  unsigned meetings = 0;
  unsigned round = 0;
  uint32_t priority = 0;
  std::vector<Copy> copies;
};

struct Warp {
  std::vector<Meeting> meetings;
  char order[2];  // addresses that stand for what a meeting orders, in turn
};

struct Shared {
  void* data;
  size_t size;
  uint64_t block;  // that it was last filled for
};

// Which of the threads that could run does so next.
enum class Policy {
  Any,          // anyone, at random
  FavourWarps,  // a warp runs as far as it can: shows a barrier missing before memory is used again
  FavourThreads,
};

struct Machine {
  dim3 grid, block;
  uint3 block_index;
  uint64_t blocks_run = 0;
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / kWarpSize};
  std::vector<int> ready;  // a heap by priority, unless anyone may be next
  int threads = 0;
  int alive = 0;
  int at_barrier = 0;
  int barrier_line = 0;
  Fiber* current = nullptr;  // null: no kernel runs
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_sanitizer = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::map<const void*, Shared> shared;
  size_t dynamic_bytes = 0;
  std::map<size_t, Shared> dynamic;  // by size
  char order[2];                     // what a barrier orders, in turn
  // What a block begins after, and what comes after its end: no thread of it begins after the end of another.
  char order_of_starts, order_of_ends;
  bool failed = false;
  char message[256];
  Policy policy = Policy::FavourWarps;
  uint64_t random = 1;
};

Machine machine;
Observer* observer = nullptr;
std::mutex one_launch_at_a_time;

// For the thread sanitizer: what was done before release comes before what is done after acquire.
void release(void* address) {
#ifdef EVAKERNELS_WATCH_THREAD
  __tsan_release(address);
#else
  (void)address;
#endif
}

void acquire(void* address) {
#ifdef EVAKERNELS_WATCH_THREAD
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

uint32_t draw() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return static_cast<uint32_t>(machine.random >> 16);
}

__attribute__((naked, noinline)) void switch_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

void to_scheduler() {
  Fiber& self = *machine.current;
#ifdef EVAKERNELS_WATCH_THREAD
  constexpr unsigned kOrdersNothing = 1;
  __tsan_switch_to_fiber(machine.scheduler_sanitizer, kOrdersNothing);
#endif
#ifdef EVAKERNELS_WATCH_ADDRESS
  __sanitizer_start_switch_fiber(self.state == State::Done ? nullptr : &self.sanitizer, nullptr, 0);
#endif
  switch_stacks(&self.stack_pointer, machine.scheduler_stack_pointer);
#ifdef EVAKERNELS_WATCH_ADDRESS
  __sanitizer_finish_switch_fiber(self.sanitizer, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  machine.current = &fiber;
#ifdef EVAKERNELS_WATCH_THREAD
  constexpr unsigned kOrdersNothing = 1;
  __tsan_switch_to_fiber(fiber.sanitizer, kOrdersNothing);
#endif
#ifdef EVAKERNELS_WATCH_ADDRESS
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  switch_stacks(&machine.scheduler_stack_pointer, fiber.stack_pointer);
#ifdef EVAKERNELS_WATCH_ADDRESS
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

int number_of(const Fiber& fiber) { return static_cast<int>(&fiber - machine.fibers.data()); }

struct RunsLater {
  bool operator()(int a, int b) const { return machine.fibers[a].priority < machine.fibers[b].priority; }
};

void make_ready(Fiber& fiber) {
  fiber.state = State::Ready;
  machine.ready.push_back(number_of(fiber));
  if (machine.policy != Policy::Any) std::push_heap(machine.ready.begin(), machine.ready.end(), RunsLater());
}

void open_barrier_if_all_are_there() {
  if (machine.alive == 0 || machine.at_barrier < machine.alive) return;
  machine.at_barrier = machine.barrier_line = 0;
  for (int i = 0; i < machine.threads; ++i) {
    if (machine.fibers[i].state == State::AtBarrier) make_ready(machine.fibers[i]);
  }
}

void run_thread() {
#ifdef EVAKERNELS_WATCH_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  acquire(&machine.order_of_starts);
  (*machine.kernel)();
  if (!machine.current->copies.empty()) fail("a thread ends before the copies that it began", 0);
  release(&machine.order_of_ends);
  machine.current->state = State::Done;
  --machine.alive;
  open_barrier_if_all_are_there();
  to_scheduler();
  std::abort();  // A thread that has ended runs no further.
}

void* new_stack() {
  void* stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  return stack;
}

void prepare(Fiber& fiber, int number) {
  const dim3& block = machine.block;
  const unsigned n = static_cast<unsigned>(number);
  fiber.index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
  fiber.barriers = fiber.meetings = fiber.round = 0;
  fiber.copies.clear();
  if (!fiber.stack) fiber.stack = new_stack();
#ifdef EVAKERNELS_WATCH_THREAD
  if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
#endif
  // What switch_stacks takes from a stack: six registers and where to go on.
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  make_ready(fiber);
}

void draw_priorities() {
  std::array<uint32_t, kMaxThreads / kWarpSize> of_warp;
  for (uint32_t& priority : of_warp) priority = draw() << 16;
  for (int i = 0; i < machine.threads; ++i) {
    const bool warps = machine.policy == Policy::FavourWarps;
    machine.fibers[i].priority = warps ? of_warp[i / kWarpSize] | (draw() & 0xFFFF) : draw();
  }
}

// The thread to run, which is no longer among the ready ones.
Fiber& take_ready() {
  std::vector<int>& ready = machine.ready;
  if (machine.policy == Policy::Any) {
    std::swap(ready[draw() % ready.size()], ready.back());
  } else {
    if (draw() % 1024 == 0) {
      draw_priorities();
      std::make_heap(ready.begin(), ready.end(), RunsLater());
    }
    std::pop_heap(ready.begin(), ready.end(), RunsLater());
  }
  Fiber& next = machine.fibers[ready.back()];
  ready.pop_back();
  return next;
}

void report_deadlock() {
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::Done) continue;
    char what[128];
    std::snprintf(what, sizeof what, "deadlock: thread %d of %d waits for ever in %s", i, machine.threads,
                  fiber.what);
    return fail(what, fiber.line);
  }
}

void run_block() {
  ++machine.blocks_run;
  machine.alive = machine.threads;
  machine.at_barrier = machine.barrier_line = 0;
  machine.ready.clear();
  for (Warp& warp : machine.warps) warp.meetings.clear();
  draw_priorities();
  for (int i = 0; i < machine.threads; ++i) prepare(machine.fibers[i], i);
  release(&machine.order_of_starts);
  while (!machine.ready.empty() && !machine.failed) to_fiber(take_ready());
  machine.current = nullptr;
  acquire(&machine.order_of_ends);
  if (observer) observer->block_ends(machine.fibers[0].barriers);
  if (machine.alive > 0 && !machine.failed) report_deadlock();
}

uint64_t seed() {
  const char* text = std::getenv("EVAKERNELS_EMULATOR_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 1;
}

}  // namespace

const uint3& thread_index() { return machine.current->index; }
const uint3& block_index() { return machine.block_index; }
const dim3& block_size() { return machine.block; }
const dim3& grid_size() { return machine.grid; }
int lane() { return number_of(*machine.current) % kWarpSize; }

void watch(Observer* watcher) { observer = watcher; }
int running_thread() { return machine.current ? number_of(*machine.current) : -1; }
unsigned meetings_so_far() { return machine.current->barriers + machine.current->meetings; }
unsigned& current_round() { return machine.current->round; }

bool is_private(const void* address) {
  const auto lies_in = [&](const void* begin, size_t size) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(begin) < size;
  };
  return lies_in(machine.current->stack, kStackBytes) || lies_in(&machine, sizeof machine) ||
         lies_in(machine.fibers.data(), machine.fibers.size() * sizeof(Fiber));
}

void fail(const char* what, int line) {
  if (machine.failed) return;
  machine.failed = true;
  std::snprintf(machine.message, sizeof machine.message, "emulated block (%u, %u, %u): %s (line %d)",
                machine.block_index.x, machine.block_index.y, machine.block_index.z, what, line);
}

void synchronize_block(int line) {
  Fiber& self = *machine.current;
  self.what = "__syncthreads";
  self.line = line;
  if (machine.barrier_line && machine.barrier_line != line) {
    fail("threads of one block wait at different __syncthreads", line);
  }
  machine.barrier_line = line;
  self.state = State::AtBarrier;
  ++machine.at_barrier;
  // Two in turn: who leaves a barrier late must not see what others did before they came to the next one.
  void* order = &machine.order[self.barriers++ % 2];
  release(order);
  open_barrier_if_all_are_there();
  to_scheduler();
  acquire(order);
}

namespace {

// A lane's way through a warp function: what lane `source` brought, when all lanes of the mask have come. The
// last one calls `work`, if there is any.
uint64_t meet(unsigned mask, uint64_t value, int source, void (*work)(const uint64_t*), const char* what,
              int line) {
  Fiber& self = *machine.current;
  const int number = number_of(self), first = number - number % kWarpSize, own = number % kWarpSize;
  Warp& warp = machine.warps[number / kWarpSize];
  self.what = what;
  self.line = line;
  unsigned expected = 0;
  for (int i = 0; i < kWarpSize && first + i < machine.threads; ++i) {
    if (!(mask >> i & 1)) continue;
    expected |= 1u << i;
    if (machine.fibers[first + i].state == State::Done)
      fail("a warp function names a lane that has exited", line);
  }
  if (!(expected >> own & 1)) fail("a lane calls a warp function that doesn't name it", line);
  if (!(expected >> (source & 31) & 1)) fail("a shuffle reads a lane that its mask doesn't name", line);

  Meeting* meeting = nullptr;
  for (Meeting& open : warp.meetings) {
    if (open.mask == mask) meeting = &open;
  }
  if (!meeting) meeting = &warp.meetings.emplace_back(Meeting{mask, 0, what, line, {}, {}});
  if (meeting->line != line || meeting->what != what)
    fail("lanes of one mask are at different warp functions", line);
  meeting->values[own] = value;
  meeting->sources[own] = source & 31;
  meeting->arrived |= 1u << own;
  self.state = State::InWarp;
  void* order = &warp.order[self.meetings++ % 2];
  release(order);
  if (meeting->arrived == expected) {
    if (work) work(meeting->values.data());
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(expected >> i & 1)) continue;
      machine.fibers[first + i].received = meeting->values[meeting->sources[i]];
      make_ready(machine.fibers[first + i]);
    }
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
  }
  to_scheduler();
  acquire(order);
  return self.received;
}

}  // namespace

uint64_t exchange(unsigned mask, uint64_t value, int source, const char* what, int line) {
  return meet(mask, value, source, nullptr, what, line);
}

void work_together(uint64_t value, void (*work)(const uint64_t* values), const char* what, int line) {
  if (machine.threads % kWarpSize != 0) fail("a warp function that needs a whole warp", line);
  if (!machine.failed) meet(~0u, value, 0, work, what, line);
}

void begin_copy(void* to, const void* from, int bytes) {
  const unsigned place = observer ? observer->place(__builtin_return_address(0)) : 0;
  machine.current->copies.push_back({to, from, bytes, place});
}

bool next_copy(Copy& copy) {
  std::vector<Copy>& copies = machine.current->copies;
  if (copies.empty()) return false;
  copy = copies.back();
  copies.pop_back();
  return true;
}

namespace {

// Kept for ever, each in a piece of the heap of its own, which AddressSanitizer fences.
template <class Key>
void* memory_for(std::map<Key, Shared>& memories, Key key, size_t size, size_t alignment) {
  const auto found = memories.find(key);
  const bool is_new = found == memories.end();
  Shared& variable = is_new ? memories[key] : found->second;
  if (is_new) {
    const size_t whole = (size + alignment - 1) / alignment * alignment;
    variable = {std::aligned_alloc(alignment, whole), size, 0};
  }
  if (variable.block != machine.blocks_run) {
    variable.block = machine.blocks_run;
    // By hand: a memset would look like a write of this thread.
    volatile unsigned char* bytes = static_cast<unsigned char*>(variable.data);
    for (size_t i = 0; i < size; ++i) bytes[i] = 0xFF;
    if (is_new) release(&variable);
  }
  acquire(&variable);
  if (observer) observer->uses_shared_memory(variable.data, size);
  return variable.data;
}

}  // namespace

void* shared_memory(const void* key, size_t size, size_t alignment) {
  return memory_for(machine.shared, key, size, alignment);
}

void* dynamic_shared_memory() {
  return memory_for(machine.dynamic, machine.dynamic_bytes, machine.dynamic_bytes, 16);
}

const char* launch(const void* address, dim3 grid, dim3 block, size_t dynamic_bytes,
                   const std::function<void()>& kernel) {
  const std::lock_guard lock(one_launch_at_a_time);
  if (std::getenv("EVAKERNELS_EMULATOR_BREAKDOWN")) return "a breakdown, as asked for";
  machine.failed = false;
  machine.grid = grid;
  machine.block = block;
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  machine.dynamic_bytes = dynamic_bytes;
  machine.kernel = &kernel;
  machine.policy = static_cast<Policy>(seed() % 3);
  machine.random = (seed() + 1) * 0x9E3779B97F4A7C15u ^ machine.blocks_run;
  if (machine.random == 0) machine.random = 1;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (machine.threads < 1 || machine.threads > kMaxThreads || blocks == 0 ||
      dynamic_bytes > allowed_shared_memory(address))
    return "invalid configuration argument";
#ifdef EVAKERNELS_WATCH_THREAD
  machine.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  if (observer) observer->launch_begins(address, grid, block, dynamic_bytes);
  // No vector grows in one thread and shrinks in another, which would look like a race.
  machine.ready.reserve(kMaxThreads);
  for (Warp& warp : machine.warps) warp.meetings.reserve(kWarpSize);
  // The blocks too in another order: from a random one on, forwards or backwards. Who watches sees that of a
  // GPU.
  const uint64_t start = observer ? 0 : draw() % blocks;
  const bool backward = !observer && draw() % 2;
  for (uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    const uint64_t number = (start + (backward ? blocks - i : i)) % blocks;
    machine.block_index = {static_cast<unsigned>(number % grid.x),
                           static_cast<unsigned>(number / grid.x % grid.y),
                           static_cast<unsigned>(number / grid.x / grid.y)};
    run_block();
  }
  return machine.failed ? machine.message : nullptr;
}

}  // namespace cuda_emulator
