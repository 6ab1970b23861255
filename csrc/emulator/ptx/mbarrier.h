// The emulator's twin of cuda/ptx/mbarrier.h.
#pragma once
#include <emulator/mbarrier.h>
#include <ptx/language.h>

namespace ptx {

using emulator::Where;

inline void mbarrier_init(uint32_t bar, uint32_t arrivals, Where where = Where::here()) {
  emulator::mbarrier_init(bar, arrivals, where);
}
inline void mbarrier_arrive(uint32_t bar, Where where = Where::here()) { emulator::mbarrier_arrive(bar, where); }
inline void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank, Where where = Where::here()) {
  emulator::mbarrier_arrive_remote(bar, rank, where);
}
inline void mbarrier_arrive_consumed(uint32_t bar, uint32_t rank, Where where = Where::here()) {
  emulator::mbarrier_arrive_remote(bar, rank, where);
}
inline void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes, Where where = Where::here()) {
  emulator::mbarrier_expect(bar, bytes, true, where);
}
inline void mbarrier_expect_tx(uint32_t bar, uint32_t bytes, Where where = Where::here()) {
  emulator::mbarrier_expect(bar, bytes, false, where);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity, Where where = Where::here()) {
  emulator::mbarrier_wait(bar, parity, where);
}
inline void mbarrier_wait_cluster(uint32_t bar, uint32_t parity, Where where = Where::here()) {
  emulator::mbarrier_wait(bar, parity, where);
}

}  // namespace ptx
