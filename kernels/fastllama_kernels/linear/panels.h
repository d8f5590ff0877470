// A packed matrix as the kernels read it: see packed.py for how it lies in memory.
#pragma once

#include <cstdint>
#include <optional>

#include "codes.h"
#include "dispatch.h"
#include "vec.h"

namespace fastllama {

struct Panels {
  const uint8_t* codes;          // [panels, lines, kLine]
  const Half *scales, *offsets;  // [panels, groups, kLanes]; offsets may be none
  int64_t count, k, bits, group;

  int64_t bytes() const { return k * kLanes * bits / 8; }  // of one panel
  int64_t scales_each() const { return k / group * kLanes; }
};

// Bits of a code, from the shape of the codes.
inline int64_t bits_of(const Tensor& codes, int64_t k) {
  STD_TORCH_CHECK(codes.scalar_type() == torch::headeronly::ScalarType::Byte && codes.is_contiguous() &&
                      codes.dim() == 3 && codes.size(2) == kLine,
                  "fastllama: expected contiguous codes of uint8 in lines of ", kLine);
  STD_TORCH_CHECK(k > 0 && k % kGroup == 0, "fastllama: x has ", k, " columns, expected a multiple of ", kGroup);
  const int64_t bits = codes.size(1) * 32 / k;
  STD_TORCH_CHECK((bits == 4 || bits == 8) && codes.size(1) * 32 == bits * k, "fastllama: got ", codes.size(1),
                  " lines of codes for ", k, " columns, expected ", k / 8, " or ", k / 4);
  return bits;
}

inline Panels panels(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets, int64_t k) {
  const int64_t bits = bits_of(codes, k), count = codes.size(0);
  STD_TORCH_CHECK(scales.dim() == 3 && scales.size(1) > 0 && k % (scales.size(1) * kGroup) == 0,
                  "fastllama: expected scales of groups of a multiple of ", kGroup, " columns that divides ", k);
  const int64_t groups = scales.size(1);
  check(scales, "scales", torch::headeronly::ScalarType::Half, {count, groups, kLanes});
  if (offsets.has_value()) check(*offsets, "offsets", torch::headeronly::ScalarType::Half, {count, groups, kLanes});
  return {data<uint8_t>(codes), data<Half>(scales), offsets.has_value() ? data<Half>(*offsets) : nullptr,
          count, k, bits, k / groups};
}

}  // namespace fastllama
