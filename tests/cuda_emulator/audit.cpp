// Counts what the emulated kernels ask of memory. The compiler, told to instrument them for its thread
// sanitizer, calls a function before each load and store; these here stand in for the sanitizer's own.
//
// A warp's request is what its lanes access by the same instruction, called from the same places, for the
// same time since they last met. Lanes that skip an access in the middle of a loop are met with that of the
// next round, so that more sectors are counted than a GPU would fetch, not fewer; loops that tell which round
// it is, whose last round is short, or that meet, are exact.
//
// Global memory is all that isn't a stack, the emulator's, or this library's own. The results are given out
// by address: who allocated the tensors knows which is which (benchmarks/audit). Behind all requests is a
// cache as small as the GPU that is played, which tells what they come to in memory. The blocks that run at
// the same time share it: their requests reach it in turns, one of each, as if all were equally fast.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <list>
#include <map>
#include <unordered_map>
#include <vector>

#include "cuda_emulator.h"

namespace {

constexpr uintptr_t kSector = 32, kLine = 64;  // bytes; no tensor begins within a line of another
constexpr uintptr_t kWord = 4, kBanks = 32;
constexpr uintptr_t kWidest = 16;
constexpr int kWarpSize = 32;

struct Region {
  uintptr_t begin = 0;
  uintptr_t end = 0;

  bool holds(uintptr_t address) const { return address - begin < end - begin; }
};

struct Access {
  uintptr_t address;
  uintptr_t size;
  int lane;
};

// Of a line, in one direction.
struct Traffic {
  int64_t requests = 0;  // that begin in it
  int64_t bytes = 0;     // of these, different ones
  int64_t sectors = 0;
  uint8_t touched = 0;  // which of its sectors were

  void add_to(int64_t* sums) const {
    sums[0] += requests;
    sums[1] += bytes;
    sums[2] += sectors;
    sums[3] += __builtin_popcount(touched);
  }
};

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;  // of shared memory, of a block
  int64_t barriers = 0;
  int64_t shared_requests = 0;
  int64_t shared_phases = 0;  // a request of more than 128 bytes takes several
  int64_t shared_ways = 0;    // over all phases: of the bank that is asked for the most words
  int64_t worst_ways = 0;
  std::unordered_map<uintptr_t, std::array<Traffic, 2>> lines;  // loads and stores
};

constexpr uintptr_t kOdd = 0x9E3779B97F4A7C15;  // spreads the bits of what it multiplies

struct RequestKey {
  uintptr_t instruction;
  unsigned warp;
  unsigned meetings;
  unsigned times;  // since the last one
  unsigned part;   // of a long access
  bool stores;

  bool operator==(const RequestKey&) const = default;
};

struct HashOfKey {
  size_t operator()(const RequestKey& key) const {
    size_t hash = key.instruction;
    for (const unsigned part : {key.warp, key.meetings, key.times, key.part}) hash = (hash ^ part) * kOdd;
    return hash ^ hash >> 32;
  }
};

struct Round {
  unsigned meetings = 0;
  unsigned times = 0;
};

// The L2 cache: what wasn't used for the longest time makes room. Sectors are written to memory when they
// leave it, or at the end; one that is written as a whole isn't read first.
class Cache {
 public:
  void access(uintptr_t sector, bool stores) {
    const uintptr_t line = sector * kSector / kLine;
    const auto bit = static_cast<uint8_t>(1u << sector % (kLine / kSector));
    const auto found = lines_.find(line);
    if (found != lines_.end()) {
      order_.splice(order_.begin(), order_, found->second.place);
    } else {
      make_room();
      order_.push_front(line);
    }
    Line& held = lines_[line];
    held.place = order_.begin();
    if (!stores && !(held.valid & bit)) bytes_read += kSector;
    held.valid |= bit;
    if (stores) held.written |= bit;
  }

  void flush() {
    while (!order_.empty()) evict();
  }

  int64_t bytes_read = 0;
  int64_t bytes_written = 0;

 private:
  struct Line {
    std::list<uintptr_t>::iterator place;
    uint8_t valid = 0;
    uint8_t written = 0;
  };

  void make_room() {
    if (order_.size() >= cuda_emulator::kCacheBytes / kLine) evict();
  }

  void evict() {
    const auto found = lines_.find(order_.back());
    bytes_written += static_cast<int64_t>(kSector) * __builtin_popcount(found->second.written);
    lines_.erase(found);
    order_.pop_back();
  }

  std::list<uintptr_t> order_;  // the line that was used last comes first
  std::unordered_map<uintptr_t, Line> lines_;
};

// What a warp asks for at a time.
struct Request {
  uint64_t number;  // in the order of their first accesses
  std::vector<Access> accesses;
};

// Its different sectors.
struct CacheRequest {
  bool stores;
  std::vector<uintptr_t> sectors;
};

class Audit : public cuda_emulator::Observer {
 public:
  void begin() {
    launches_.clear();
    running_.clear();
    cache_ = {};
    watches_ = true;
    cuda_emulator::watch(this);
  }

  void end() {
    watches_ = false;
    cuda_emulator::watch(nullptr);
    finish_running();
    cache_.flush();
  }

  const Cache& cache() const { return cache_; }

  const std::vector<Launch>& launches() const { return launches_; }

  void launch_begins(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes) override {
    finish_running();
    running_at_a_time_ = cuda_emulator::kMultiprocessors * blocks_of_multiprocessor(dynamic_bytes);
    launches_.push_back(
        {.kernel = kernel, .grid = grid, .block = block, .dynamic_bytes = dynamic_bytes, .lines = {}});
    host_stack_ = stack_of_this_thread();
    library_ = this_library();
    shared_.clear();
  }

  void block_ends(unsigned barriers) override {
    launches_.back().barriers += barriers;
    std::vector<std::pair<const RequestKey, Request>*> in_order;
    for (auto& request : global_requests_) in_order.push_back(&request);
    std::sort(in_order.begin(), in_order.end(),
              [](const auto* a, const auto* b) { return a->second.number < b->second.number; });
    running_.emplace_back();
    for (auto* request : in_order) count_global(request->second.accesses, request->first.stores);
    for (const auto& [key, request] : shared_requests_) count_shared(request.accesses);
    global_requests_.clear();
    shared_requests_.clear();
    for (auto& rounds : rounds_) rounds.clear();
    for (auto& path : paths_) path.clear();
    if (running_.size() >= running_at_a_time_) finish_running();
  }

  void uses_shared_memory(const void* data, size_t size) override {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    shared_[begin] = {begin, begin + size};
  }

  unsigned place(const void* caller) override {
    const auto& path = paths_[cuda_emulator::running_thread()];
    uintptr_t hash = reinterpret_cast<uintptr_t>(caller) ^ (path.empty() ? 0 : path.back());
    hash = (hash ^ cuda_emulator::current_round()) * kOdd;
    return static_cast<unsigned>(hash >> 32);
  }

  void enter(uintptr_t caller) {
    const int thread = watches_ ? cuda_emulator::running_thread() : -1;
    if (thread < 0) return;
    auto& path = paths_[thread];
    path.push_back(((path.empty() ? 0 : path.back()) ^ caller) * kOdd);
  }

  void leave() {
    const int thread = watches_ ? cuda_emulator::running_thread() : -1;
    if (thread >= 0) paths_[thread].pop_back();
  }

  void access(uintptr_t address, uintptr_t size, bool stores, uintptr_t instruction) {
    const int thread = watches_ ? cuda_emulator::running_thread() : -1;
    if (thread < 0) return;
    if (cuda_emulator::is_private(reinterpret_cast<const void*>(address))) return;
    if (host_stack_.holds(address) || library_.holds(address)) return;
    instruction ^= paths_[thread].empty() ? 0 : paths_[thread].back();
    instruction ^= (cuda_emulator::current_round() + 1) * kOdd;
    Round& round = rounds_[thread][instruction];
    const unsigned meetings = cuda_emulator::meetings_so_far();
    if (round.meetings != meetings) round = {meetings, 0};
    auto& requests = is_shared(address) ? shared_requests_ : global_requests_;
    for (uintptr_t done = 0; done < size; done += kWidest) {
      const RequestKey key = {.instruction = instruction,
                              .warp = static_cast<unsigned>(thread / kWarpSize),
                              .meetings = meetings,
                              .times = round.times,
                              .part = static_cast<unsigned>(done / kWidest),
                              .stores = stores};
      Request& request = requests[key];
      if (request.accesses.empty()) request.number = requests_begun_++;
      request.accesses.push_back({address + done, std::min(kWidest, size - done), thread % kWarpSize});
    }
    ++round.times;
  }

 private:
  bool is_shared(uintptr_t address) const {
    const auto after = shared_.upper_bound(address);
    return after != shared_.begin() && std::prev(after)->second.holds(address);
  }

  // Two, as csrc/cuda plans attention, where the shared memory of a multiprocessor suffices: CUDA takes 1 KB
  // a block for itself.
  static size_t blocks_of_multiprocessor(size_t dynamic_bytes) {
    return 2 * dynamic_bytes + 1024 <= cuda_emulator::max_shared_memory() ? 2 : 1;
  }

  // The requests of the blocks that run at the same time reach the cache.
  void finish_running() {
    size_t most = 0;
    for (const auto& requests : running_) most = std::max(most, requests.size());
    for (size_t i = 0; i < most; ++i) {
      for (const auto& requests : running_) {
        if (i >= requests.size()) continue;
        for (const uintptr_t sector : requests[i].sectors) cache_.access(sector, requests[i].stores);
      }
    }
    running_.clear();
  }

  static Region stack_of_this_thread() {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
    return {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + size};
  }

  static Region this_library() {
    static const char inside = 0;
    Region region = {reinterpret_cast<uintptr_t>(&inside), 0};
    const auto look = [](dl_phdr_info* info, size_t, void* found) {
      Region all = {~uintptr_t{0}, 0};
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type != PT_LOAD) continue;
        all.begin = std::min(all.begin, info->dlpi_addr + part.p_vaddr);
        all.end = std::max(all.end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
      }
      Region& wanted = *static_cast<Region*>(found);
      if (!all.holds(wanted.begin)) return 0;
      wanted = all;
      return 1;
    };
    dl_iterate_phdr(look, &region);
    return region;
  }

  void count_global(std::vector<Access>& accesses, bool stores) {
    std::sort(accesses.begin(), accesses.end(),
              [](const Access& a, const Access& b) { return a.address < b.address; });
    auto& lines = launches_.back().lines;
    int64_t bytes = 0;
    uintptr_t byte = 0, sector = 0;  // the first that weren't counted yet
    CacheRequest& of_cache = running_.back().emplace_back(CacheRequest{stores, {}});
    for (const Access& access : accesses) {
      const uintptr_t end = access.address + access.size;
      if (end <= byte) continue;
      bytes += static_cast<int64_t>(end - std::max(byte, access.address));
      byte = end;
      for (sector = std::max(sector, access.address / kSector); sector * kSector < end; ++sector) {
        Traffic& line = lines[sector * kSector / kLine][stores];
        line.sectors += 1;
        line.touched |= static_cast<uint8_t>(1u << sector % (kLine / kSector));
        of_cache.sectors.push_back(sector);
      }
    }
    Traffic& first = lines[accesses.front().address / kLine][stores];
    first.requests += 1;
    first.bytes += bytes;
  }

  // A bank gives one word at a time, to all lanes that want it. Lanes with 8 bytes each are served in two
  // halves, those with 16 in four quarters.
  void count_shared(const std::vector<Access>& accesses) {
    Launch& launch = launches_.back();
    launch.shared_requests += 1;
    const uintptr_t widest = std::max_element(accesses.begin(), accesses.end(), [](auto& a, auto& b) {
                               return a.size < b.size;
                             })->size;
    const int phases = static_cast<int>(std::max(kWord, widest) / kWord);
    for (int phase = 0; phase < phases; ++phase) {
      std::array<std::vector<uintptr_t>, kBanks> words;
      for (const Access& access : accesses) {
        if (access.lane * phases / kWarpSize != phase) continue;
        for (uintptr_t byte = 0; byte < access.size; ++byte) {
          const uintptr_t word = (access.address + byte) / kWord;
          auto& bank = words[word % kBanks];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
      }
      size_t ways = 0;
      for (const auto& bank : words) ways = std::max(ways, bank.size());
      if (ways == 0) continue;
      launch.shared_phases += 1;
      launch.shared_ways += static_cast<int64_t>(ways);
      launch.worst_ways = std::max(launch.worst_ways, static_cast<int64_t>(ways));
    }
  }

  bool watches_ = false;
  std::vector<Launch> launches_;
  std::map<uintptr_t, Region> shared_;
  Region host_stack_, library_;
  Cache cache_;
  std::vector<std::vector<CacheRequest>> running_;  // of the blocks that the cache has not seen yet
  size_t running_at_a_time_ = 1;
  uint64_t requests_begun_ = 0;
  std::unordered_map<RequestKey, Request, HashOfKey> global_requests_, shared_requests_;
  std::array<std::unordered_map<uintptr_t, Round>, cuda_emulator::kMaxThreads>
      rounds_;                                                            // by thread and instruction
  std::array<std::vector<uintptr_t>, cuda_emulator::kMaxThreads> paths_;  // of calls, hashed, by thread
};

Audit audit;

}  // namespace

extern "C" {

#define EVAKERNELS_EXPORT __attribute__((visibility("default")))

EVAKERNELS_EXPORT void audit_begin() { audit.begin(); }

EVAKERNELS_EXPORT void audit_end() { audit.end(); }

EVAKERNELS_EXPORT int64_t audit_launches() { return static_cast<int64_t>(audit.launches().size()); }

// Where the kernel lies in this library, its grid and block, barriers of all blocks together, and what was
// counted of shared memory: 13 numbers.
EVAKERNELS_EXPORT void audit_launch(int64_t number, int64_t* out) {
  const Launch& launch = audit.launches()[number];
  Dl_info library = {};
  dladdr(launch.kernel, &library);
  const auto* const base = static_cast<const char*>(library.dli_fbase);
  const std::array<int64_t, 13> numbers = {static_cast<const char*>(launch.kernel) - base,
                                           launch.grid.x,
                                           launch.grid.y,
                                           launch.grid.z,
                                           launch.block.x,
                                           launch.block.y,
                                           launch.block.z,
                                           static_cast<int64_t>(launch.dynamic_bytes),
                                           launch.barriers,
                                           launch.shared_requests,
                                           launch.shared_phases,
                                           launch.shared_ways,
                                           launch.worst_ways};
  std::copy(numbers.begin(), numbers.end(), out);
}

// What a launch asked of the addresses [begin, end): requests, bytes, sectors and different sectors, of loads
// and then of stores: 8 numbers.
EVAKERNELS_EXPORT void audit_memory(int64_t number, uint64_t begin, uint64_t end, int64_t* out) {
  std::fill_n(out, 8, 0);
  for (const auto& [line, traffic] : audit.launches()[number].lines) {
    if (line < begin / kLine || line * kLine >= end) continue;
    for (int direction = 0; direction < 2; ++direction) traffic[direction].add_to(out + 4 * direction);
  }
}

// Bytes that all launches together read from memory and wrote to it, past the cache: 2 numbers.
EVAKERNELS_EXPORT void audit_cache(int64_t* out) {
  out[0] = audit.cache().bytes_read;
  out[1] = audit.cache().bytes_written;
}

#define EVAKERNELS_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define EVAKERNELS_ACCESS(name, size, stores)               \
  EVAKERNELS_EXPORT void __tsan_##name(uintptr_t address) { \
    audit.access(address, size, stores, EVAKERNELS_CALLER); \
  }
#define EVAKERNELS_ACCESSES(size)                      \
  EVAKERNELS_ACCESS(read##size, size, false)           \
  EVAKERNELS_ACCESS(write##size, size, true)           \
  EVAKERNELS_ACCESS(unaligned_read##size, size, false) \
  EVAKERNELS_ACCESS(unaligned_write##size, size, true)
EVAKERNELS_ACCESSES(1)
EVAKERNELS_ACCESSES(2)
EVAKERNELS_ACCESSES(4)
EVAKERNELS_ACCESSES(8)
EVAKERNELS_ACCESSES(16)
void __tsan_read_range(uintptr_t address, uintptr_t size) {
  audit.access(address, size, false, EVAKERNELS_CALLER);
}
void __tsan_write_range(uintptr_t address, uintptr_t size) {
  audit.access(address, size, true, EVAKERNELS_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(uintptr_t caller) { audit.enter(caller); }
void __tsan_func_exit() { audit.leave(); }
void __tsan_vptr_update(void**, void*) {}
}
