// The emulator's twin of cuda/ptx/global.h. An atomic lets the other threads run, so that CTAs interleave there.
#pragma once
#include <emulator/scheduler.h>
#include <ptx/types.h>

namespace ptx {

template <class T> T ld_global(const T* p) {
  emulator::poll();
  return *p;
}
template <class T> T ld_global_nc(const T* p) { return *p; }
template <class T> T ld_global_streaming(const T* p) { return *p; }
template <class T> void st_global(T* p, T v) { *p = v; }
template <class T> void st_global_streaming(T* p, T v) { *p = v; }

template <class T> T atomic_add(T* p, T v) {
  emulator::yield();
  const T old = *p;
  *p = old + v;
  return old;
}

inline void thread_fence() {}

}  // namespace ptx
