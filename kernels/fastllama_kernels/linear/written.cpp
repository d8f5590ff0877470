// Panels of codes written out as the weights that they stand for: see packed.py for the layout and the schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "codes.h"
#include "dispatch.h"
#include "panels.h"
#include "vec.h"

namespace fastllama {
namespace {

// The codes of a row and kGroup columns, in order; of 8 bits less 128. A line has four bytes of each row.
template <int kBits>
void collect(const uint8_t* lines, int64_t row, int8_t* codes) {
  for (int64_t l = 0; l < kGroup * kBits / 32; ++l) {
    uint32_t quad;
    std::memcpy(&quad, lines + l * kLine + 4 * row, sizeof(quad));
    const uint32_t low = kBits == 4 ? quad & 0x0f0f0f0f : quad ^ 0x80808080, high = quad >> 4 & 0x0f0f0f0f;
    std::memcpy(codes + l * 32 / kBits, &low, sizeof(low));
    if (kBits == 4) std::memcpy(codes + l * 32 / kBits + 4, &high, sizeof(high));
  }
}

// out[row, column] of the 16 rows of a panel.
template <int kBits, typename T>
void write_panel(const Panels& w, int64_t panel, T* out) {
  const uint8_t* lines = w.codes + panel * w.bytes();
  for (int64_t column = 0; column < w.k; column += kGroup, lines += kGroup * kBits / 32 * kLine) {
    const int64_t at = panel * w.scales_each() + column / w.group * kLanes;
    for (int64_t row = 0; row < kLanes; ++row) {
      int8_t codes[kGroup];
      collect<kBits>(lines, row, codes);
      const float scale = w.scales[at + row], least = scale * (kBits == 4 ? -8.f : 0.f);
      const float more = kBits == 4 ? 0.f : 128.f * scale;
      const float base = w.offsets ? static_cast<float>(w.offsets[at + row]) + more : least;
      for (int64_t i = 0; i < kGroup; i += kPartLanes)
        store_part(out + row * w.k + column + i, load_part(codes + i) * scale + base);
    }
  }
}

}  // namespace

Tensor written_out(Tensor like, Tensor codes, Tensor scales, std::optional<Tensor> offsets, int64_t first,
                   int64_t last) {
  const int64_t k = like.size(like.dim() - 1);
  const Panels w = panels(codes, scales, offsets, k);
  STD_TORCH_CHECK(0 <= first && first < last && last <= w.count, "fastllama: panels ", first, " to ", last,
                  ", expected some of ", w.count);
  const int64_t n = (last - first) * kLanes;
  Tensor out = torch::stable::new_empty(like, std::vector<int64_t>{n, k});
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        T* rows = to + (panel - first) * kLanes * k;
        w.bits == 4 ? write_panel<4>(w, panel, rows) : write_panel<8>(w, panel, rows);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("written_out", TORCH_BOX(&written_out)); }

}  // namespace fastllama
