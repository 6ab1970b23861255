#include <emulator/cluster.h>
#include <emulator/machine.h>

#include <algorithm>

namespace emulator {

static void finish_if_complete(Cluster& cluster) {
  ClusterBarrier& bar = cluster.barrier;
  if (bar.arrived < cluster.live || !bar.arrived) return;
  bar.arrived = 0;
  bar.released[bar.generation++ % 2] = bar.arriving.take();
  bar.waiters.wake();
}

uint32_t cluster_rank() { return current().cta->rank; }
uint32_t cluster_size() { return machine->cluster_size; }

void cluster_arrive(const Where& where) {
  maybe_yield();
  Thread& thread = current();
  Cluster& cluster = *thread.cta->cluster;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    finding("cluster barrier: arrives twice", where, "the thread arrived before and has not waited");
    give_up();
  }
  ++thread.cluster_arrivals;
  thread.cluster_generation = cluster.barrier.generation;
  ++cluster.barrier.arrived;
  thread.release_to(cluster.barrier.arriving);
  finish_if_complete(cluster);
}

void cluster_wait(const Where& where) {
  maybe_yield();
  Thread& thread = current();
  ClusterBarrier& bar = thread.cta->cluster->barrier;
  if (thread.cluster_arrivals == thread.cluster_waits) {
    finding("cluster barrier: no arrival", where, "cluster_wait without a cluster_arrive before it");
    give_up();
  }
  const uint64_t generation = thread.cluster_generation;
  wait_until(bar.waiters, {"cluster_wait", 0, where}, [&] { return bar.generation != generation; });
  ++thread.cluster_waits;
  thread.learn(bar.released[generation % 2]);
}

void cluster_thread_exit(Cluster& cluster) {
  --cluster.live;
  finish_if_complete(cluster);
}

Cta& remote_cta(uint32_t rank, const char* doing, const Where& where) {
  Thread& thread = current();
  Cluster& cluster = *thread.cta->cluster;
  if (rank >= cluster.ctas.size()) {
    finding("no such CTA", where,
            std::string(doing) + " to CTA " + std::to_string(rank) + " of a cluster of " +
                std::to_string(cluster.ctas.size()));
    give_up();
  }
  Cta& cta = *cluster.ctas[rank];
  if (&cta == thread.cta) return cta;
  const auto known = [&](const Thread& other) { return thread.known[other.agent] > 0; };
  if (std::none_of(cta.threads.begin(), cta.threads.end(), known))
    finding("CTA may not have started", where,
            std::string(doing) + " to CTA " + std::to_string(rank) + ": no cluster_sync since the kernel began");
  if (!cta.live) {
    finding("CTA has exited", where,
            std::string(doing) + " to CTA " + std::to_string(rank) + ": it needs a cluster_sync before its exit");
    give_up();
  }
  must_outlive(cta, thread.agent, thread.time, doing, where);
  return cta;
}

void must_outlive(Cta& cta, Agent agent, uint32_t time, const char* doing, const Where& where) {
  cta.uses[agent] = {time, doing, where};
}

void check_outlived(Cta& cta) {
  const Clock known = cta.exits.take();
  for (const auto& [agent, use] : cta.uses)
    if (known[agent] < use.time)
      finding("CTA may exit too early", use.where,
              std::string(use.doing) + " uses the shared memory of " + describe(cta) +
                  ", which may have exited by then: nothing there waits for it (an mbarrier_wait, or a cluster_sync "
                  "before the exit)");
}

}  // namespace emulator
