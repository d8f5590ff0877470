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

// Keeps the compiler from loading it again where it is used, and from reordering what it is the sum of.
inline void keep(FloatPart& x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

// Parts, from what they are stored as. gcc 12 converts one number after the other without the intrinsic.
inline FloatPart load_part(const float* p) {
  FloatPart x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline FloatPart load_part(const BFloat16* p) {  // a bfloat16 is the upper half of a float32
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (FloatPart)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  typedef uint16_t Bits __attribute__((vector_size(kPartBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kPartBytes)));
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<FloatPart>(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline FloatPart load_part(const int8_t* p) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (FloatPart)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Codes __attribute__((vector_size(kPartLanes)));
  Codes codes;
  std::memcpy(&codes, p, sizeof(codes));
  return __builtin_convertvector(codes, FloatPart);
#endif
}

inline FloatPart load_part(const Half* p) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  typedef _Float16 HalfPart __attribute__((vector_size(kPartBytes / 2)));
  HalfPart x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, FloatPart);
#endif
}

template <typename T>
inline f32x16 load16(const T* p) {
  FloatPart parts[kParts];
  for (int i = 0; i < kParts; ++i) parts[i] = load_part(p + i * kPartLanes);
  f32x16 x;
  std::memcpy(&x, parts, sizeof(x));
  return x;
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

inline float sum_part(FloatPart x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128 sum4 = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
  return _mm_cvtss_f32(_mm_add_ss(sum2, _mm_movehdup_ps(sum2)));
#else
  f32x16 wide = {};
  std::memcpy(&wide, &x, sizeof(x));
  return sum16(wide);
#endif
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
__attribute__((noinline)) void dot_tile(const T* const (&rows)[R], const float* x, int64_t n, float (&out)[R][M]) {
  const T* w[R];
  std::memcpy(w, rows, sizeof(w));  // a function and pointers of its own: they stay in registers
  FloatPart acc[R][M] = {};
  int64_t i = 0;
  for (; i + kPartLanes <= n; i += kPartLanes) {
    FloatPart x_m[M];
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) {
      x_m[m] = load_part(x + m * n + i);
      keep(x_m[m]);
    }
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) {
      const FloatPart w_r = load_part(w[r] + i);
      FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] += w_r * x_m[m];
    }
  }
  FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) {
      float sum = sum_part(acc[r][m]);
      for (int64_t j = i; j < n; ++j) sum += static_cast<float>(w[r][j]) * x[m * n + j];
      out[r][m] = sum;
    }
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
