// The activations of a gated FFN, numbered as in ../common/activations.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

namespace fastllama {

enum Activation : int64_t {
  kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kRelu6, kLeakyRelu, kSigmoid, kTanh, kLinear, kMish, kHardswish,
  kLaplace, kGelu10, kSqrtSoftplus
};

inline float gelu(float x) { return 0.5f * x * (1.f + std::erf(x * 0.70710678f)); }
inline float softplus(float x) { return std::max(x, 0.f) + std::log1p(std::exp(-std::abs(x))); }

inline float activate(float x, int64_t activation) {
  switch (activation) {
    case kSilu: return x / (1.f + std::exp(-x));
    case kGelu: return gelu(x);
    case kGeluTanh: return 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case kQuickGelu: return x / (1.f + std::exp(-1.702f * x));
    case kRelu2: return std::max(x, 0.f) * std::max(x, 0.f);
    case kRelu6: return std::min(std::max(x, 0.f), 6.f);
    case kLeakyRelu: return x < 0.f ? 0.01f * x : x;
    case kSigmoid: return 1.f / (1.f + std::exp(-x));
    case kTanh: return std::tanh(x);
    case kLinear: return x;
    case kMish: return x * std::tanh(softplus(x));
    case kHardswish: return x * std::min(std::max(x + 3.f, 0.f), 6.f) / 6.f;
    case kLaplace: return 0.5f * (1.f + std::erf((x - 0.707107f) / 0.39894257f));
    case kGelu10: return std::min(std::max(gelu(x), -10.f), 10.f);
    case kSqrtSoftplus: return std::sqrt(softplus(x));
    default: return std::max(x, 0.f);
  }
}

// x · sigmoid(x); nothing instead of less than 1.4e-36 of it.
inline FloatPart silu(FloatPart x) {
  const FloatPart zero = {}, e = exp_part(x > zero ? -x : x);
  return x < zero - 87.f ? zero : x * ((x > zero ? zero + 1.f : e) / (e + 1.f));
}

// The first `count` lanes activated.
inline FloatPart activate(FloatPart x, int64_t activation, int64_t count = kPartLanes) {
  if (activation == kSilu) return silu(x);
  for (int64_t i = 0; i < count; ++i) x[i] = activate(x[i], activation);
  return x;
}

}  // namespace fastllama
