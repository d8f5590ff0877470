// Sixteen-lane float arithmetic for the CPU kernels, in the vector extensions that gcc and clang share: one source
// becomes AVX-512, AVX2 or NEON code, by the flags of the level that it is compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

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
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A part is what a register takes of sixteen lanes.
#if defined(__AVX512F__)
constexpr int64_t kPartBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kPartBytes = 32;
#else
constexpr int64_t kPartBytes = 16;
#endif
constexpr int kParts = 64 / kPartBytes;
// Vector registers: tiles are as large as they allow.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kPartLanes = kLanes / kParts;
typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t BitsPart __attribute__((vector_size(kPartBytes)));

// Keeps the compiler from loading it again where it is used, and from reordering what it is the sum of.
template <typename Part>
inline void keep(Part& x) {
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
#elif defined(__aarch64__)
  typedef _Float16 HalfPart __attribute__((vector_size(kPartBytes / 2)));
  HalfPart x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, FloatPart);
#else
  // The exponent moved by a multiplication, which makes subnormal numbers normal; not of infinity and of no number.
  typedef uint16_t Bits __attribute__((vector_size(kPartBytes / 2)));
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  const BitsPart wide = __builtin_convertvector(bits, BitsPart), size = (wide & 0x7fff) << 13;
  const BitsPart finite = (BitsPart)((FloatPart)size * 0x1p112f), other = size | 0x7f800000;
  return (FloatPart)((size < 0x0f800000 ? finite : other) | (wide & 0x8000) << 16);
#endif
}

inline void store_part(float* p, FloatPart x) { std::memcpy(p, &x, sizeof(x)); }

// Rounded to nearest, ties to even; what is no number stays none.
inline void store_part(BFloat16* p, FloatPart x) {
  const BitsPart bits = (BitsPart)x, even = bits + 0x7fff + ((bits >> 16) & 1), nan = bits | 0x400000;
  const BitsPart rounded = (x == x ? even : nan) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)rounded, (__m256i)rounded), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
#else
  typedef uint16_t Halves __attribute__((vector_size(kPartBytes / 2)));
  const Halves upper = __builtin_convertvector(rounded, Halves);
  std::memcpy(p, &upper, sizeof(upper));
#endif
}

inline void store_part(Half* p, FloatPart x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kPartLanes; ++i) p[i] = static_cast<Half>(x[i]);
#endif
}

// n numbers, as they are stored.
template <typename T>
inline void store_row(T* to, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kPartLanes <= n; i += kPartLanes) store_part(to + i, load_part(x + i));
  for (; i < n; ++i) to[i] = static_cast<T>(x[i]);
}

// e to the x, within two units in the last place (Cephes' polynomial), for -87 <= x <= 88; less gives about 1e-38, and
// what is no number stays none.
inline FloatPart exp_part(FloatPart x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the lowest bits
  const FloatPart least = FloatPart{} - 87.f, bounded = x > least ? x : least;
  const FloatPart shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const FloatPart r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  FloatPart p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const auto power = (FloatPart)((BitsPart)p + ((BitsPart)shifted << 23));
  return x == x ? power : x;
}

// Sixteen lanes, a part for each register: of one longer vector gcc 12 holds what a loop changes in memory, and splits
// comparisons into scalars.
struct f32x16 {
  FloatPart parts[kParts];
  float operator[](int64_t lane) const { return parts[lane / kPartLanes][lane % kPartLanes]; }
};

// f of the parts of x, and of several.
template <typename F, typename... More>
inline f32x16 by_parts(const F& f, const f32x16& x, const More&... more) {
  f32x16 y;
  FASTLLAMA_UNROLL for (int i = 0; i < kParts; ++i) y.parts[i] = f(x.parts[i], more.parts[i]...);
  return y;
}

inline f32x16 operator+(const f32x16& x, const f32x16& y) {
  return by_parts([](FloatPart a, FloatPart b) { return a + b; }, x, y);
}

inline f32x16 operator*(const f32x16& x, const f32x16& y) {
  return by_parts([](FloatPart a, FloatPart b) { return a * b; }, x, y);
}

inline f32x16 max16(const f32x16& x, const f32x16& y) {
  return by_parts([](FloatPart a, FloatPart b) { return a > b ? a : b; }, x, y);
}

template <typename T>
inline f32x16 load16(const T* p) {
  f32x16 x;
  FASTLLAMA_UNROLL for (int i = 0; i < kParts; ++i) x.parts[i] = load_part(p + i * kPartLanes);
  return x;
}

template <typename T>
inline void store16(T* p, const f32x16& x) {
  FASTLLAMA_UNROLL for (int i = 0; i < kParts; ++i) store_part(p + i * kPartLanes, x.parts[i]);
}

inline float sum16(const f32x16& x) {
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

// Bytes between a load and the prefetch before it: of a row of weights among several, of a panel of codes, of its
// scales; none where it is 0.
#ifdef __AVX512F__
constexpr int64_t kAhead = 1024, kAheadCodes = 4096, kAheadScales = 512;
#else
constexpr int64_t kAhead = 2048, kAheadCodes = 2048, kAheadScales = 0;
#endif

// out[r][m] = w_r · x_m for R weight rows and M activation rows (x_m = x + m * n): each weight is loaded once.
// Weight rows that follow each other in memory are prefetched to the next rows' beginning, where a page ends.
template <int R, int M, typename T>
__attribute__((noinline)) void dot_tile(const T* const (&rows)[R], const float* x, int64_t n, float (&out)[R][M]) {
  constexpr int64_t kAheadColumns = kAhead / sizeof(T);
  const T* w[R];
  std::memcpy(w, rows, sizeof(w));  // a function and pointers of its own: they stay in registers
  FloatPart acc[R][M] = {};
  int64_t i = 0;
  for (; i + kPartLanes <= n; i += kPartLanes) {
    const int64_t ahead = i + kAheadColumns < n ? kAheadColumns : kAheadColumns + (R - 1) * n;
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + i + ahead);
    // Of weights and activations the fewer are held while the others pass.
    FloatPart held[std::min(R, M)];
    const auto load = [&](bool weights, int at) { return weights ? load_part(w[at] + i) : load_part(x + at * n + i); };
    FASTLLAMA_UNROLL for (int at = 0; at < std::min(R, M); ++at) {
      held[at] = load(R < M, at);
      keep(held[at]);
    }
    FASTLLAMA_UNROLL for (int at = 0; at < std::max(R, M); ++at) {
      const FloatPart passing = load(R >= M, at);
      FASTLLAMA_UNROLL for (int other = 0; other < std::min(R, M); ++other)
        acc[R < M ? other : at][R < M ? at : other] += passing * held[other];
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
// The same with bfloat16 on both sides: pairs are multiplied and summed in float32 by one instruction, in the same order
// whatever R and M.
template <int R, int M>
__attribute__((noinline)) void dot_tile(const BFloat16* const (&rows)[R], const BFloat16* x, int64_t n,
                                        float (&out)[R][M]) {
  constexpr int64_t kPairs = 2 * kLanes, kAheadColumns = kAhead / sizeof(BFloat16);
  constexpr int64_t kStep = kPairs * (R == 1 ? 4 : 1);
  const auto load = [](const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  const BFloat16* w[R];
  std::memcpy(w, rows, sizeof(w));
  __m512 acc[R][M];
  FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  const auto add = [&](int64_t i) {
    __m512bh x32[M];
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) x32[m] = load(x + m * n + i);
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) {
      const __m512bh w32 = load(w[r] + i);
      FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], w32, x32[m]);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const int64_t ahead = i + (i + kAheadColumns < n ? kAheadColumns : kAheadColumns + (R - 1) * n);
    FASTLLAMA_UNROLL for (int64_t j = 0; j < kStep; j += kPairs) {
      FASTLLAMA_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + ahead + j);
      add(i + j);
    }
  }
  if constexpr (kStep > kPairs)
    for (; i + kPairs <= n; i += kPairs) add(i);
  FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) {
      out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
      for (int64_t j = i; j < n; ++j)
        out[r][m] += static_cast<float>(w[r][j]) * static_cast<float>(x[m * n + j]);
    }
}
#endif

}  // namespace fastllama
