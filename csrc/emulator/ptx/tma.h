// The emulator's twin of cuda/ptx/tma.h; cache hints and prefetches change nothing here.
#pragma once
#include <ptx/l2_hint.h>
#include <ptx/tensor_map.h>

namespace ptx {

using emulator::Where;

// AT: the coordinates in brackets; then the parameters they come from.
#define FASTATTN_TMA(AT, ...)                                                                                     \
  inline void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, __VA_ARGS__, L2Hint = L2Hint::None,      \
                       Where where = Where::here()) {                                                             \
    emulator::tma_load(dst, map, bar, AT, where);                                                                 \
  }                                                                                                               \
  inline void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, uint16_t cta_mask, __VA_ARGS__, \
                                 L2Hint = L2Hint::None, Where where = Where::here()) {                            \
    emulator::tma_load_multicast(dst, map, bar, cta_mask, AT, where);                                             \
  }                                                                                                               \
  inline void tma_store(const TensorMap* map, uint32_t src, __VA_ARGS__, Where where = Where::here()) {           \
    emulator::tma_store(map, src, AT, where);                                                                     \
  }
FASTATTN_TMA((emulator::Coordinates{2, {c0, c1}}), int c0, int c1)
FASTATTN_TMA((emulator::Coordinates{3, {c0, c1, c2}}), int c0, int c1, int c2)
FASTATTN_TMA((emulator::Coordinates{4, {c0, c1, c2, c3}}), int c0, int c1, int c2, int c3)
FASTATTN_TMA((emulator::Coordinates{5, {c0, c1, c2, c3, c4}}), int c0, int c1, int c2, int c3, int c4)
#undef FASTATTN_TMA

inline void bulk_reduce_add(float* global, uint32_t src, uint32_t bytes, Where where = Where::here()) {
  emulator::bulk_reduce_add(global, src, bytes, where);
}
inline void tma_store_commit() { emulator::bulk_commit(); }
template <int N> void tma_store_wait_read(Where where = Where::here()) { emulator::bulk_wait(N, true, where); }
template <int N> void tma_store_wait(Where where = Where::here()) { emulator::bulk_wait(N, false, where); }
inline void tma_prefetch(const TensorMap*) {}

}  // namespace ptx
