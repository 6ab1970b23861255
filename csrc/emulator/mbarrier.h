// mbarriers: pending arrivals, signed byte count, phase.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>

namespace emulator {

struct Cta;

struct Mbarrier {
  uint32_t address = 0;
  uint32_t count = 0;    // arrivals of a phase
  uint32_t pending = 0;  // arrivals still to come in this one
  int64_t bytes = 0;     // expected and not yet arrived
  uint32_t phase = 0;
  Agent agent = 0;       // of the TMA loads it completes
  Agent initialiser = 0;
  uint32_t init_time = 0;
  uint32_t fence_time = 0;  // of fence_mbarrier_init after it
  Where where;
  ClockGather arriving;
  Clock released;  // what those that wait learn
  WaitList waiters;
};

void mbarrier_init(uint32_t address, uint32_t count, const Where& where);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t address, const Where& where);
void mbarrier_arrive_remote(uint32_t address, uint32_t rank, const Where& where);
void mbarrier_expect(uint32_t address, uint32_t bytes, bool arrive, const Where& where);
void mbarrier_wait(uint32_t address, uint32_t parity, const Where& where);

// For TMA: the barrier, checked for use by the current thread (`remote`: by the asynchronous proxy or another CTA too).
Mbarrier& use_mbarrier(Cta& cta, uint32_t address, bool remote, const char* doing, const Where& where);
void mbarrier_complete_bytes(Cta& cta, uint32_t address, uint32_t bytes);

}  // namespace emulator
