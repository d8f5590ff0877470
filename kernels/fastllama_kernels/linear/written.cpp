// Panels of codes written out as the weights that they stand for: see packed.py for the layout and the schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "codes.h"
#include "dispatch.h"
#include "panels.h"
#include "vec.h"

namespace fastllama {
namespace {

// out[column, 16 rows] of a panel; rows of out are `stride` apart. A part of a line is some rows times all its columns.
template <int kBits, typename T>
void write_panel(const Panels& w, int64_t panel, T* out, int64_t stride) {
  constexpr int64_t kColumns = 32 / kBits;
  const uint8_t* line = w.codes + panel * w.bytes();
  const Half* scales = w.scales + panel * w.scales_each();
  const Half* offsets = w.offsets ? w.offsets + panel * w.scales_each() : nullptr;
  for (int64_t column = 0; column < w.k; column += kColumns, line += kLine) {
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = column / w.group * kLanes + part * kPartLanes;
      const FloatPart scale = load_part(scales + at);
      const FloatPart offset = offsets ? load_part(offsets + at) : scale * -static_cast<float>(1 << (kBits - 1));
      const FloatCodes<kBits> codes(load_part(line + part * kPartBytes));
      FASTLLAMA_UNROLL for (int64_t i = 0; i < kColumns; ++i)
        store_part(out + (column + i) * stride + part * kPartLanes, codes.columns[i] * scale + offset);
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
  Tensor out = torch::stable::new_empty(like, std::vector<int64_t>{k, n});
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        T* column = to + (panel - first) * kLanes;
        w.bits == 4 ? write_panel<4>(w, panel, column, n) : write_panel<8>(w, panel, column, n);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("written_out", TORCH_BOX(&written_out)); }

}  // namespace fastllama
