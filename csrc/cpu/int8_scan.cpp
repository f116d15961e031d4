#include "cpu/int8_scan.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>

#include "cpu/int8_scan_kernels.h"

namespace evakernels::cpu {
namespace {

constexpr int64_t kBlock = 256;  // rows whose codes stay in the cache for all queries
constexpr int64_t kTask = 16 * kBlock;

decltype(&baseline::int8_products) products_for(Isa isa) { return EVAKERNELS_OF_ISA(isa, int8_products); }

struct Candidate {
  float low;
  float high;
  int64_t row;
};

// The rows that may be among the nearest of those seen.
class Nearest {
 public:
  explicit Nearest(int64_t top) : top_(static_cast<size_t>(top)) {}

  // No row whose score can't reach this is among them.
  float bound() const { return bound_; }

  void add(const Candidate& candidate) {
    found_.push_back(candidate);
    if (found_.size() >= limit_) drop();
  }

  void add(const Nearest& other) { found_.insert(found_.end(), other.found_.begin(), other.found_.end()); }

  std::vector<int64_t> rows() {
    drop();
    std::vector<int64_t> rows;
    for (const Candidate& candidate : found_) rows.push_back(candidate.row);
    std::sort(rows.begin(), rows.end());
    return rows;
  }

 private:
  void drop() {
    if (found_.size() > top_) {
      const auto least = found_.begin() + static_cast<int64_t>(top_) - 1;
      std::nth_element(found_.begin(), least, found_.end(),
                       [](const Candidate& a, const Candidate& b) { return a.low > b.low; });
      bound_ = least->low;
      std::erase_if(found_, [this](const Candidate& candidate) { return candidate.high < bound_; });
    }
    limit_ = std::max(kRoom, 2 * found_.size());
  }

  static constexpr size_t kRoom = 1024;

  size_t top_;
  size_t limit_ = kRoom;
  float bound_ = -std::numeric_limits<float>::infinity();
  std::vector<Candidate> found_;
};

void scan_block(const Int8Scan& scan, Isa isa, int64_t first, int64_t count, std::vector<Nearest>& nearest) {
  const Int8Rows rows{scan.codes, scan.numbers, first, scan.compared, scan.dim};
  int32_t products[kBlock];
  for (int64_t i = 0; scan.numbers && i < count; ++i) __builtin_prefetch(scan.about + rows.number(i));
  for (int64_t q = 0; q < scan.count; ++q) {
    products_for(isa)(rows, scan.queries + q * scan.dim, count, products);
    const Int16Query& query = scan.about_queries[q];
    for (int64_t i = 0; i < count; ++i) {
      const Int8Row& row = scan.about[rows.number(i)];
      const float score = static_cast<float>(products[i]) * (row.factor * query.factor);
      const float error = query.length * row.rest + query.error;
      if (score + error >= nearest[q].bound()) nearest[q].add({score - error, score + error, rows.number(i)});
    }
  }
}

}  // namespace

std::vector<std::vector<int64_t>> int8_scan(const Int8Scan& scan, Isa isa, int threads) {
  const int64_t tasks = (scan.compared + kTask - 1) / kTask;
  const auto workers = static_cast<size_t>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(tasks, 1)));
  std::vector<std::vector<Nearest>> found(workers, std::vector<Nearest>(scan.count, Nearest(scan.top)));
  std::atomic<int64_t> next = 0;
  const auto work = [&](size_t worker) {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t end = std::min(scan.compared, (task + 1) * kTask);
      for (int64_t row = task * kTask; row < end; row += kBlock) {
        scan_block(scan, isa, row, std::min(kBlock, end - row), found[worker]);
      }
    }
  };
  {
    std::vector<std::jthread> others;
    for (size_t worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    work(0);
  }
  std::vector<std::vector<int64_t>> rows;
  for (int64_t q = 0; q < scan.count; ++q) {
    for (size_t worker = 1; worker < workers; ++worker) found[0][q].add(found[worker][q]);
    rows.push_back(found[0][q].rows());
  }
  return rows;
}

}  // namespace evakernels::cpu
