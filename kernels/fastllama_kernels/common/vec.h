// Sixteen-lane float arithmetic for the CPU kernels, in the vector extensions that gcc and clang share: one source
// becomes AVX-512, AVX2 or NEON code, whatever -march=native finds.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace fastllama {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Accumulators stay in registers only if every loop over them is unrolled.
#ifdef __clang__
#define FASTLLAMA_UNROLL _Pragma("clang loop unroll(full)")
#define FASTLLAMA_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define FASTLLAMA_UNROLL _Pragma("GCC unroll 16")
#define FASTLLAMA_NO_UNROLL _Pragma("GCC unroll 1")
#endif

constexpr int64_t kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef _Float16 f16x16 __attribute__((vector_size(32)));

// The registers that sixteen lanes take. Compilers split arithmetic on longer vectors well, comparisons into scalars.
#if defined(__AVX512F__)
constexpr int64_t kPartBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kPartBytes = 32;
#else
constexpr int64_t kPartBytes = 16;
#endif
constexpr int kParts = 64 / kPartBytes;
constexpr int kPartLanes = kLanes / kParts;
typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));

inline f32x16 load16(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline f32x16 load16(const BFloat16* p) {  // a bfloat16 is the upper half of a float32
  u16x16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<f32x16>(__builtin_convertvector(bits, u32x16) << 16);
}

inline f32x16 load16(const Half* p) {
#ifdef __F16C__  // gcc 12 converts one after the other unless it is told
  const auto* bits = reinterpret_cast<const __m128i*>(p);
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))};
  f32x16 x;
  std::memcpy(&x, halves, sizeof(x));
  return x;
#else
  f16x16 x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, f32x16);
#endif
}

inline void store16(float* p, f32x16 x) { std::memcpy(p, &x, sizeof(x)); }

// f of the parts of a and b.
template <typename F>
inline f32x16 by_parts(f32x16 a, f32x16 b, const F& f) {
  FloatPart a_p[kParts], b_p[kParts];
  std::memcpy(a_p, &a, sizeof(a));
  std::memcpy(b_p, &b, sizeof(b));
  for (int i = 0; i < kParts; ++i) a_p[i] = f(a_p[i], b_p[i]);
  std::memcpy(&a, a_p, sizeof(a));
  return a;
}

inline f32x16 max16(f32x16 a, f32x16 b) {
  return by_parts(a, b, [](FloatPart x, FloatPart y) { return x > y ? x : y; });
}

inline f32x16 min16(f32x16 a, f32x16 b) {
  return by_parts(a, b, [](FloatPart x, FloatPart y) { return x < y ? x : y; });
}

// e to the x, within two units in the last place (Cephes' polynomial), for -87 <= x <= 88; less gives about 1e-38, and
// what is no number stays none.
inline f32x16 exp16(f32x16 x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the lowest bits
  const f32x16 bounded = max16(x, f32x16{} - 87.f);
  const f32x16 shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const f32x16 r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const auto result = reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(p) + (reinterpret_cast<u32x16>(shifted) << 23));
  return by_parts(x, result, [](FloatPart y, FloatPart power) { return y == y ? power : y; });
}

inline float sum16(f32x16 x) {
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x8 by8[2];
  std::memcpy(by8, &x, sizeof(x));
  const f32x8 sum8 = by8[0] + by8[1];
  f32x4 by4[2];
  std::memcpy(by4, &sum8, sizeof(sum8));
  const f32x4 sum4 = by4[0] + by4[1];
  return (sum4[0] + sum4[1]) + (sum4[2] + sum4[3]);
}

// The sums of sixteen vectors at once: halves are added pair by pair until each has become one lane.
inline f32x16 sums16(const f32x16 (&x)[kLanes]) {
  f32x16 by8[8], by4[4], by2[2];
  for (int i = 0; i < 8; ++i) {
    const f32x16 a = x[2 * i], b = x[2 * i + 1];
    by8[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const f32x16 a = by8[2 * i], b = by8[2 * i + 1];
    by4[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const f32x16 a = by4[2 * i], b = by4[2 * i + 1];
    by2[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
             __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return __builtin_shufflevector(by2[0], by2[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(by2[0], by2[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// What the activations of a product with T weights are held in: bfloat16 where the processor multiplies it directly.
template <typename T>
struct Activations { using type = float; };
#ifdef __AVX512BF16__
template <>
struct Activations<BFloat16> { using type = BFloat16; };
#endif

// out[r][m] = w_r · x_m for R weight rows and M activation rows (x_m = x + m * n): each weight is loaded once.
template <int R, int M, typename T>
inline void dot_tile(const T* const (&w)[R], const float* x, int64_t n, float (&out)[R][M]) {
  f32x16 acc[R][M] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f32x16 x16[M];
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) x16[m] = load16(x + m * n + i);
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) {
      const f32x16 w16 = load16(w[r] + i);
      FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] += w16 * x16[m];
    }
  }
  if constexpr (R * M == kLanes) {
    f32x16 all[kLanes];
    std::memcpy(all, acc, sizeof(all));
    store16(&out[0][0], sums16(all));
  } else {
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
      FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) out[r][m] = sum16(acc[r][m]);
  }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) out[r][m] += static_cast<float>(w[r][i]) * x[m * n + i];
}

#ifdef __AVX512BF16__
// The same with bfloat16 on both sides: pairs are multiplied and summed in float32 by one instruction.
template <int R, int M>
inline void dot_tile(const BFloat16* const (&w)[R], const BFloat16* x, int64_t n, float (&out)[R][M]) {
  constexpr int64_t kPairs = 2 * kLanes;
  const auto load = [](const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  __m512 acc[R][M];
  FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + kPairs <= n; i += kPairs) {
    __m512bh x32[M];
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) x32[m] = load(x + m * n + i);
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) {
      const __m512bh w32 = load(w[r] + i);
      FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], w32, x32[m]);
    }
  }
  FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) {
      out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
      for (int64_t j = i; j < n; ++j)
        out[r][m] += static_cast<float>(w[r][j]) * static_cast<float>(x[m * n + j]);
    }
}
#endif

}  // namespace fastllama
