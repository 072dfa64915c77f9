// Runs the 8-bit Adam step, the scatter and the gather once through the host shim, for ThreadSanitizer to watch.

#include "adam8bit.h"
#include "launchers.h"

#include <cstdio>
#include <vector>

int main() {
  using namespace sltrain;
  constexpr int64_t kNumel = 256 * 40 + 77, kBlocks = 41;
  std::vector<float> p(kNumel, 0.5f), g(kNumel, 0.25f), absmax_m(kBlocks, 0.0f), absmax_v(kBlocks, 0.0f);
  std::vector<uint8_t> m8(kNumel, 0), v8(kNumel, 0);
  std::vector<uint32_t> tables(kTableWords, 0);
  int code = 0;
  for (int step = 1; step <= 2; ++step) {
    const sltrain_adam_tensor whole{p.data(), g.data(), m8.data(), v8.data(), absmax_m.data(), absmax_v.data(),
                                    kNumel, step, 0, 0, 0, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, 1, 0};
    code |= sltrain_cuda_adam8bit(kFloat32, kFloat32, &whole, 1, tables.data(), nullptr, 0, nullptr);
  }
  constexpr int64_t kOut = 19, kIn = 40;
  std::vector<float> W(kOut * kIn, 1.0f), values, back;
  std::vector<int32_t> rows{0};
  std::vector<uint16_t> columns;
  for (int64_t row = 0; row < kOut; ++row) {
    for (int64_t column = row % 3; column < kIn; column += 1 + row % 4) columns.push_back(static_cast<uint16_t>(column));
    rows.push_back(static_cast<int32_t>(columns.size()));
  }
  values.assign(columns.size(), 2.0f);
  back.assign(columns.size(), 0.0f);
  code |= sltrain_cuda_scatter_add(W.data(), kFloat32, rows.data(), columns.data(), 2, values.data(), kFloat32, kOut, kIn,
                                   0, nullptr);
  code |= sltrain_cuda_gather(back.data(), kFloat32, W.data(), kFloat32, rows.data(), columns.data(), 2, kOut, kIn, 0,
                              nullptr);
  for (float value : back) code |= value != 3.0f;
  std::puts(code ? "wrong" : "right");
  return code != 0;
}
