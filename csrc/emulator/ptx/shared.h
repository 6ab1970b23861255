// The emulator's twin of cuda/ptx/shared.h.
#pragma once
#include <emulator/shared_memory.h>
#include <ptx/types.h>

namespace ptx {

using emulator::Where;

inline uint32_t dynamic_shared() { return emulator::SHARED_BASE; }

template <class T> T ld_shared(uint32_t a, Where where = Where::here()) {
  T v;
  emulator::load(a, &v, sizeof(T), "ld_shared", where);
  return v;
}

template <class T> void st_shared(uint32_t a, T v, Where where = Where::here()) {
  emulator::store(a, &v, sizeof(T), "st_shared", where);
}

}  // namespace ptx
