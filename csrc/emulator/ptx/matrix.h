// The emulator's twin of cuda/ptx/matrix.h.
#pragma once
#include <emulator/warp.h>
#include <ptx/layout.h>

namespace ptx {

using emulator::Where;

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, Where where = Where::here()) {
  emulator::ldmatrix(r, a, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, Where where = Where::here()) {
  emulator::ldmatrix(r, a, true, where);
}
inline void stmatrix_x4(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, Where where = Where::here()) {
  emulator::stmatrix(a, {r0, r1, r2, r3}, false, where);
}
inline void stmatrix_x4_trans(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                              Where where = Where::here()) {
  emulator::stmatrix(a, {r0, r1, r2, r3}, true, where);
}

}  // namespace ptx
