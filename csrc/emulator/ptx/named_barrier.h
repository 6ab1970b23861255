// The emulator's twin of cuda/ptx/named_barrier.h.
#pragma once
#include <emulator/named_barrier.h>
#include <ptx/language.h>

namespace ptx {

using emulator::Where;

inline void barrier_sync(int id, int threads, Where where = Where::here()) {
  emulator::barrier_sync(id, threads, where);
}
inline void barrier_arrive(int id, int threads, Where where = Where::here()) {
  emulator::barrier_arrive(id, threads, where);
}
inline void cta_sync(Where where = Where::here()) { emulator::cta_sync(where); }

}  // namespace ptx
