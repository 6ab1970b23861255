// The emulator's twin of cuda/ptx/warp.h.
#pragma once
#include <emulator/warp.h>
#include <ptx/types.h>

namespace ptx {

using emulator::Where;

template <class T> T shuffle(T v, int lane, Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  uint32_t mine[sizeof(T) / 4];
  memcpy(mine, &v, sizeof(T));
  const emulator::Exchange& all = emulator::warp_exchange(mine, sizeof(T) / 4, "shuffle", where);
  memcpy(&v, all.word[lane & 31], sizeof(T));
  return v;
}
template <class T> T shuffle_xor(T v, int mask, Where where = Where::here()) {
  return shuffle(v, static_cast<int>(threadIdx.x % 32) ^ mask, where);
}
inline uint32_t ballot(bool v, Where where = Where::here()) {
  const uint32_t mine[] = {v, 1};  // the second word tells the lanes that have not exited
  const emulator::Exchange& all = emulator::warp_exchange(mine, 2, "ballot", where);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (all.word[lane][0] & all.word[lane][1]) << lane;
  return votes;
}
inline void warp_sync(Where where = Where::here()) { emulator::warp_sync(where); }
inline bool elect_one(Where where = Where::here()) {
  emulator::warp_exchange(nullptr, 0, "elect_one", where);
  return threadIdx.x % 32 == 0;
}

template <int N> void setmaxnreg_inc(Where where = Where::here()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
  emulator::set_max_registers(N, where);
}
template <int N> void setmaxnreg_dec(Where where = Where::here()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
  emulator::set_max_registers(N, where);
}

}  // namespace ptx
