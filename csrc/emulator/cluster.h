// The cluster's barrier, and that a CTA whose shared memory others touch has started and has not exited.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>

namespace emulator {

struct Cta;
struct Cluster;

struct ClusterBarrier {
  uint32_t arrived = 0;
  uint64_t generation = 0;
  ClockGather arriving;
  Clock released[2];
  WaitList waiters;
};

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(const Where& where);
void cluster_wait(const Where& where);
void cluster_thread_exit(Cluster& cluster);

// CTA `rank` of this cluster, for an access to its shared memory by the current thread.
Cta& remote_cta(uint32_t rank, const char* doing, const Where& where);
// The CTA must not exit before what it knows includes `agent` at `time`.
void must_outlive(Cta& cta, Agent agent, uint32_t time, const char* doing, const Where& where);
void check_outlived(Cta& cta);  // at its exit

}  // namespace emulator
