// Products of codes (see packed.py for how they lie in memory) with activations, exact in whatever instructions the
// processor has. A line of 64 bytes is worked on in parts of a register's size.
#pragma once

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vec.h"

namespace fastllama {

constexpr int64_t kGroup = 32;  // activations with one scale
constexpr int64_t kLine = 64;   // bytes: 16 rows times 4 columns of 8 bits or 8 columns of 4

inline IntPart load_part(const uint8_t* line) {
  IntPart x;
  std::memcpy(&x, line, sizeof(x));
  return x;
}

inline FloatPart to_float(IntPart x) { return __builtin_convertvector(x, FloatPart); }

inline int32_t load_quad(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, sizeof(quad));
  return quad;
}

// kGroup values as codes from -127 to 127 with the scale that is returned, and the codes' sum.
inline float encode(const float* x, int8_t* codes, int32_t& sum) {
  constexpr int kCount = kGroup / kPartLanes;
  constexpr int32_t kInfinityBits = 0x7f800000;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, half to even, in the lowest bits
  FloatPart parts[kCount];
  IntPart greatest = {};
  for (int i = 0; i < kCount; ++i) {
    parts[i] = load_part(x + i * kPartLanes);
    const IntPart size = (IntPart)parts[i] & 0x7fffffff;  // of positive numbers the order is that of their bits
    greatest = greatest > size ? greatest : size;
  }
  int32_t top = 0;
  for (int i = 0; i < kPartLanes; ++i) top = std::max(top, greatest[i]);
  sum = 0;
  if (top >= kInfinityBits) {
    std::memset(codes, 0, kGroup);
    return std::nanf("");
  }
  float largest;
  std::memcpy(&largest, &top, sizeof(largest));
  const float inverse = largest > 1e-35f ? 127.f / largest : 0.f;  // of less it is too large for float32
  int32_t integers[kGroup];
  IntPart sums = {};
  for (int i = 0; i < kCount; ++i) {
    FloatPart scaled = parts[i] * inverse;
    keep(scaled);  // rounded before the sum
    const IntPart code = (IntPart)(scaled + kRound) - 0x4b400000;  // the bits of kRound
    std::memcpy(integers + i * kPartLanes, &code, sizeof(code));
    sums += code;
  }
  for (int64_t i = 0; i < kGroup; ++i) codes[i] = static_cast<int8_t>(integers[i]);
  for (int i = 0; i < kPartLanes; ++i) sum += sums[i];
  return largest / 127.f;
}

// Sums of a block's products with one row of activations. `add` takes a part of a line as `Codes` has split it, and the
// activations from the line's first column on; `value` is the sum, less a number. kTwo: in two chains of sums, for an
// instruction's result takes some cycles.
template <int kBits, typename X, bool kTwo>
struct BlockSum;

#if defined(__SSSE3__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)

// Pairs of products of unsigned and signed bytes as 16-bit sums, and sums of pairs of those in 32 bits.
#if defined(__AVX512BW__)
inline IntPart multiply_pairs(IntPart a, IntPart b) { return (IntPart)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
inline IntPart sum_pairs(IntPart x) { return (IntPart)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__)
inline IntPart multiply_pairs(IntPart a, IntPart b) { return (IntPart)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
inline IntPart sum_pairs(IntPart x) { return (IntPart)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
#else
inline IntPart multiply_pairs(IntPart a, IntPart b) { return (IntPart)_mm_maddubs_epi16((__m128i)a, (__m128i)b); }
inline IntPart sum_pairs(IntPart x) { return (IntPart)_mm_madd_epi16((__m128i)x, _mm_set1_epi16(1)); }
#endif

template <int kBits>
struct Codes {  // the low and the high halves of bytes
  IntPart low, high;

  Codes() = default;
  explicit Codes(IntPart part) : low(part & 0x0f0f0f0f), high((part >> 4) & 0x0f0f0f0f) {}
};

// Sixteen-bit sums: a block adds up eight pairs of products, each at most 2 * 15 * 127.
template <int kBits, bool kTwo>
struct BlockSum<kBits, int8_t, kTwo> {
  static constexpr int kSums = kBits == 4 ? 1 : 2;
  typedef int16_t Shorts __attribute__((vector_size(kPartBytes)));
  Shorts low = {}, high = {};

  void add(const Codes<kBits>& codes, const int8_t* x) {
    add(low, codes.low, x);
    add(kBits == 4 ? low : high, codes.high, kBits == 4 ? x + 4 : x);
  }

  FloatPart value(int32_t less = 0) const {
    IntPart sum = sum_pairs((IntPart)low);
    if constexpr (kBits == 8) sum += sum_pairs((IntPart)high) << 4;
    return to_float(sum - less);
  }

 private:
  static void add(Shorts& sum, IntPart codes, const int8_t* x) {
    sum += (Shorts)multiply_pairs(codes, IntPart{} + load_quad(x));
    keep(sum);  // else gcc makes a tree of the sums, whose products it has no registers for
  }
};

#else

// acc[r] + the sum over i of byte i of codes[r], unsigned, times byte i of the quad, signed.
inline IntPart dot4(IntPart acc, IntPart codes, int32_t quad) {
#if defined(__AVX512VNNI__)
  return (IntPart)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(quad));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (IntPart)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)codes, _mm256_set1_epi32(quad));
#elif defined(__ARM_FEATURE_DOTPROD)
  // Signed times signed: 128 less in each code, and 128 times the activations' sum back.
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  const int32x4_t half = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), x);
  const int8x16_t less = veorq_s8((int8x16_t)codes, vdupq_n_s8(-128));
  return (IntPart)vdotq_s32(vaddq_s32((int32x4_t)acc, vaddq_s32(half, half)), less, x);
#else
  FASTLLAMA_UNROLL for (int i = 0; i < 4; ++i)
    acc += ((codes >> (8 * i)) & 255) * static_cast<int8_t>(quad >> (8 * i));
  return acc;
#endif
}

template <int kBits>
struct Codes {
  IntPart low, high;
  Codes() = default;
  explicit Codes(IntPart part) : low(kBits == 4 ? part & 0x0f0f0f0f : part), high((part >> 4) & 0x0f0f0f0f) {}
};

template <int kBits, bool kTwo>
struct BlockSum<kBits, int8_t, kTwo> {
  static constexpr int kSums = 1 + kTwo;
  IntPart even = {}, odd = {};

  void add(const Codes<kBits>& codes, const int8_t* x) {
    even = dot4(even, codes.low, load_quad(x));
    if constexpr (kTwo) std::swap(even, odd);
    if constexpr (kBits == 4) {
      even = dot4(even, codes.high, load_quad(x + 4));
      if constexpr (kTwo) std::swap(even, odd);
    }
  }

  FloatPart value(int32_t less = 0) const {
    return to_float((kTwo ? even + odd : even) - less);
  }
};

#endif

template <int kBits>
struct FloatCodes {
  FloatPart columns[32 / kBits];

  FloatCodes() = default;
  explicit FloatCodes(IntPart part) {
    FASTLLAMA_UNROLL for (int i = 0; i < 32 / kBits; ++i) {
      const int shift = kBits == 4 ? 8 * (i % 4) + 4 * (i / 4) : 8 * i;
      columns[i] = to_float((part >> shift) & ((1 << kBits) - 1));
    }
  }
};

template <int kBits, bool kTwo>
struct BlockSum<kBits, float, kTwo> {
  static constexpr int kSums = 2;
  FloatPart even = {}, odd = {};

  void add(const FloatCodes<kBits>& codes, const float* x) {
    FASTLLAMA_UNROLL for (int i = 0; i < 32 / kBits; i += 2) {
      even += codes.columns[i] * x[i];
      odd += codes.columns[i + 1] * x[i + 1];
    }
  }

  FloatPart value(float less = 0.f) const { return even + odd - less; }
};

}  // namespace fastllama
