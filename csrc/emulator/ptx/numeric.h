// The emulator's twin of cuda/ptx/numeric.h.
#pragma once
#include <ptx/types.h>

namespace ptx {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bit_cast<float>(sign | bit_cast<uint32_t>(std::ldexp(float(mantissa), -24)));
  return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float<fp16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = u >> 16 & 0x8000;
  if (x != x) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};   // halfway above the largest, 65504
  if (magnitude < 0x1p-14f)                                                 // subnormal: a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t rounded = (u & 0x7fffffff) + 0xfff + (u >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)))};
}

// Two elements in one register, `lo` in the low half.
template <class T> inline uint32_t pack(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

// .ftz: subnormal inputs and results are zeros.
namespace detail {
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
}  // namespace detail

inline float exp2_approx(float x) { return detail::flush(std::exp2(detail::flush(x))); }
inline float log2_approx(float x) { return std::log2(detail::flush(x)); }
inline float rcp_approx(float x) { return detail::flush(1.f / detail::flush(x)); }
inline float rsqrt_approx(float x) { return 1.f / std::sqrt(detail::flush(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }

// The larger; NaN if either is (fmaxf ignores one).
inline float max_nan(float x, float y) { return x != x || y != y ? NAN : std::fmax(x, y); }

}  // namespace ptx
