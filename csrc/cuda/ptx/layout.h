// Where an element of a tile lies in shared memory; no instructions, so the emulator uses this header too.
// The numbers of Swizzle are those of the wgmma descriptor.
#pragma once
#include <ptx/language.h>

namespace ptx {

enum class Swizzle : uint32_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };

// Bytes of one swizzled row: the widest panel a TMA box or a wgmma operand has.
__host__ __device__ constexpr uint32_t swizzle_width(Swizzle s) {
  return s == Swizzle::B128 ? 128 : s == Swizzle::B64 ? 64 : s == Swizzle::B32 ? 32 : 16;
}

// The XOR acts on the final shared address: 16-byte chunk index ^= row within the atom of 8 rows.
__host__ __device__ constexpr uint32_t swizzle(uint32_t a, Swizzle s) {
  return s == Swizzle::B128 ? a ^ ((a >> 3) & 0x70)
         : s == Swizzle::B64 ? a ^ ((a >> 3) & 0x30)
         : s == Swizzle::B32 ? a ^ ((a >> 3) & 0x10)
                             : a;
}

// wgmma matrix descriptor; all three in bytes, multiples of 16. W = swizzle_width:
//   K-major:  element (mn, k) at addr + (mn % 8)·W + (mn / 8)·sbo + 2k                                  (lbo ignored)
//   MN-major: element (mn, k) at addr + 2·(mn % (W/2)) + (mn / (W/2))·lbo + (k % 8)·W + (k / 8)·sbo
//   no swizzle: cores of 8 rows × 16 bytes; K-major  (mn % 8)·16 + (mn / 8)·sbo + (k / 8)·lbo + 2·(k % 8),
//               MN-major  2·(mn % 8) + (mn / 8)·sbo + (k % 8)·16 + (k / 8)·lbo
__host__ __device__ constexpr uint64_t descriptor(uint32_t addr, uint32_t lbo, uint32_t sbo, Swizzle s) {
  return uint64_t((addr & 0x3ffff) >> 4) | uint64_t((lbo & 0x3ffff) >> 4) << 16 | uint64_t((sbo & 0x3ffff) >> 4) << 32 |
         uint64_t(s) << 62;
}

}  // namespace ptx
