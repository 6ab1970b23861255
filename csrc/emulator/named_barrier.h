// bar.sync and bar.arrive on the sixteen barriers of a CTA.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>

namespace emulator {

struct Cta;

struct NamedBarrier {
  uint32_t arrived = 0;
  uint32_t expected = 0;
  bool whole_cta = false;  // expects the threads that have not exited
  uint64_t generation = 0;
  Where where;
  ClockGather arriving;
  Clock released[2];  // of the latest two generations
  WaitList waiters;
};

void barrier_sync(int id, int threads, const Where& where);
void barrier_arrive(int id, int threads, const Where& where);
void cta_sync(const Where& where);
void named_barrier_thread_exit(Cta& cta);

}  // namespace emulator
