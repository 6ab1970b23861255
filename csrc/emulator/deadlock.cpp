#include <emulator/machine.h>

namespace emulator {

static std::string describe_wait(Cta& cta, const Thread& thread) {
  const Waiting& w = thread.waiting;
  const auto count = [](auto n) { return std::to_string(n); };
  std::string text = describe(cta) + ", warp " + count(thread.index / 32) + " waits in " + w.doing;
  if (std::string(w.doing) == "mbarrier_wait") {
    const Mbarrier& bar = cta.mbarriers[w.object];
    return text + " for parity " + count(w.parity) + " of the barrier at " + hex(w.object) + " (initialised at " +
           to_string(bar.where) + "), whose phase " + count(bar.phase) + " lacks " + count(bar.pending) + " of " +
           count(bar.count) + " arrivals and " +
           (bar.bytes < 0 ? "has " + count(-bar.bytes) + " bytes more than expected" : count(bar.bytes) + " bytes");
  }
  if (std::string(w.doing) == "barrier_sync") {
    const NamedBarrier& bar = cta.barriers[w.object];
    return text + " on barrier " + count(w.object) + ", where " + count(bar.arrived) + " of " + count(bar.expected) +
           " threads are";
  }
  Warpgroup& warpgroup = cta.warpgroups[thread.index / 128];
  if (std::string(w.doing) == "wgmma_wait" && warpgroup.executed < warpgroup.end()) {
    const WgmmaOperation& op = warpgroup.operation(warpgroup.executed);
    return text + " for the wgmma at " + to_string(op.where) + ", which " + count(op.issued) +
           " threads of the warpgroup have issued";
  }
  return text;
}

void report_deadlock() {
  for (auto& cluster : machine->clusters)
    for (auto& cta : cluster->ctas)
      for (const Thread& thread : cta->threads)
        if (!thread.exited) machine->report.add("deadlock", thread.waiting.where, describe_wait(*cta, thread));
}

}  // namespace emulator
