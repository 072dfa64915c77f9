// Counting CPU allocator: current and peak bytes of torch's tensors, like the statistics of the caching allocator on
// CUDA. A block's size is stored in the 64 bytes before it, for its release.

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace sltrain {
namespace {

constexpr size_t kHeader = 64;  // keeps torch's alignment

std::atomic<int64_t> now{0}, peak{0};

void count(void* block, int64_t change) {
  const int64_t after = now.fetch_add(change, std::memory_order_relaxed) + change;
  int64_t most = peak.load(std::memory_order_relaxed);
  while (after > most && !peak.compare_exchange_weak(most, after, std::memory_order_relaxed)) {
  }
  if (c10::memoryProfilingEnabled())
    c10::reportMemoryUsageToProfiler(block, change, after, 0, c10::Device(c10::DeviceType::CPU));
}

void release(void* block) {
  if (block == nullptr) return;
  char* base = static_cast<char*>(block) - kHeader;
  size_t bytes;
  std::memcpy(&bytes, base, sizeof(bytes));
  count(block, -static_cast<int64_t>(bytes));
  c10::free_cpu(base);
}

struct CountedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    char* base = static_cast<char*>(c10::alloc_cpu(bytes + kHeader));
    std::memcpy(base, &bytes, sizeof(bytes));
    void* block = base + kHeader;
    count(block, static_cast<int64_t>(bytes));
    return {block, block, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void count_cpu_bytes() {
  static const bool once = [] {
    c10::SetCPUAllocator(new CountedAllocator, 1);  // never destroyed: blocks may outlive everything else
    return true;
  }();
  (void)once;
}

// (current bytes, peak bytes since the last reset); `reset` restarts the peak from the current bytes
std::tuple<int64_t, int64_t> cpu_bytes(bool reset) {
  const int64_t alive = now.load(), most = peak.load();
  if (reset) peak.store(alive);
  return {alive, most};
}

}  // namespace
}  // namespace sltrain

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def("count_cpu_bytes() -> ()", &sltrain::count_cpu_bytes);
  m.def("cpu_bytes(bool reset) -> (int, int)", &sltrain::cpu_bytes);
}
