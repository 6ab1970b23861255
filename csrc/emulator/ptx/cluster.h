// The emulator's twin of cuda/ptx/cluster.h.
#pragma once
#include <emulator/cluster.h>
#include <emulator/shared_memory.h>
#include <ptx/types.h>

namespace ptx {

using emulator::Where;

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_size() { return emulator::cluster_size(); }
inline void cluster_arrive(Where where = Where::here()) { emulator::cluster_arrive(where); }
inline void cluster_wait(Where where = Where::here()) { emulator::cluster_wait(where); }
inline void cluster_sync(Where where = Where::here()) {
  emulator::cluster_arrive(where);
  emulator::cluster_wait(where);
}

template <class T> T ld_shared_cluster(uint32_t a, uint32_t rank, Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  T v;
  emulator::load_remote(a, rank, &v, sizeof(T), "ld_shared_cluster", where);
  return v;
}

template <class T> void st_shared_cluster(uint32_t a, uint32_t rank, T v, Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  emulator::store_remote(a, rank, &v, sizeof(T), "st_shared_cluster", where);
}

}  // namespace ptx
