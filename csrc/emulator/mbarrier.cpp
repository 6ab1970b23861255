#include <emulator/machine.h>
#include <emulator/mbarrier.h>
#include <emulator/shared_memory.h>

namespace emulator {

namespace {

constexpr int64_t MAX_BYTES = (1 << 20) - 1;
constexpr uint32_t MAX_ARRIVALS = (1 << 20) - 1;

void finish_phase_if_complete(Mbarrier& bar) {
  if (bar.pending || bar.bytes) return;
  ++bar.phase;
  bar.pending = bar.count;
  bar.released = with(join(bar.released, bar.arriving.take()), bar.agent, bar.phase);
  bar.waiters.wake();
}

void arrive(Mbarrier& bar, const Where& where) {
  Thread& thread = current();
  if (bar.pending == 0) {
    finding("mbarrier: too many arrivals", where,
            "the barrier at " + hex(bar.address) + " expects " + std::to_string(bar.count) +
                " arrivals a phase and this is one more; " + std::to_string(bar.bytes) + " bytes are still to come");
    give_up();
  }
  --bar.pending;
  thread.release_to(bar.arriving);
  finish_phase_if_complete(bar);
}

void expect(Mbarrier& bar, uint32_t bytes, const Where& where) {
  bar.bytes += bytes;
  if (bar.bytes <= MAX_BYTES) return;
  finding("mbarrier: too many bytes", where, "a phase holds at most " + std::to_string(MAX_BYTES) + " bytes");
  give_up();
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count, const Where& where) {
  Thread& thread = current();
  Cta& cta = *thread.cta;
  check_range(cta, address, 8, 8, "mbarrier_init", where);
  if (cta.mbarriers.count(address)) {
    finding("mbarrier initialised twice", where,
            "the barrier at " + hex(address) + " was initialised at " + to_string(cta.mbarriers[address].where));
    give_up();
  }
  if (count == 0 || count > MAX_ARRIVALS) {
    finding("mbarrier: count", where, "the arrivals of a phase are 1 to 2^20 - 1, not " + std::to_string(count));
    give_up();
  }
  cta.shadow.write(address, 8, thread.actor("mbarrier_init", where));
  cta.shadow.set_mbarrier(address);
  Mbarrier& bar = cta.mbarriers[address];
  bar.address = address;
  bar.count = bar.pending = count;
  bar.agent = cta.cluster->add_agent(AgentInfo::Kind::Mbarrier, &cta, address);
  bar.initialiser = thread.agent;
  bar.init_time = thread.time;
  bar.where = where;
  thread.unfenced_mbarriers.push_back(&bar);
}

void mbarrier_init_fence() {
  Thread& thread = current();
  for (Mbarrier* bar : thread.unfenced_mbarriers) bar->fence_time = thread.time;
  if (!thread.unfenced_mbarriers.empty()) ++thread.time;
  thread.unfenced_mbarriers.clear();
}

Mbarrier& use_mbarrier(Cta& cta, uint32_t address, bool remote, const char* doing, const Where& where) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) {
    finding("mbarrier not initialised", where,
            std::string(doing) + " at " + hex(address) + " of " + describe(cta) +
                (address % 8 ? ": not a multiple of 8"
                             : ": no mbarrier_init has run there (is there a sync after it?)"));
    give_up();
  }
  Mbarrier& bar = found->second;
  Thread& thread = current();
  if (!thread.knows(bar.initialiser, bar.init_time))
    finding("race: mbarrier initialisation", where,
            std::string(doing) + " at " + hex(address) + " of " + describe(cta) + ", initialised at " +
                to_string(bar.where) + ": no sync between the two");
  else if (remote && !(bar.fence_time && thread.knows(bar.initialiser, bar.fence_time)))
    finding("missing mbarrier init fence", where,
            std::string(doing) + " at " + hex(address) + " of " + describe(cta) + ", initialised at " +
                to_string(bar.where) + ": no fence_mbarrier_init after it, before the sync");
  return bar;
}

void mbarrier_arrive(uint32_t address, const Where& where) {
  maybe_yield();
  arrive(use_mbarrier(*current().cta, address, false, "mbarrier_arrive", where), where);
}

void mbarrier_arrive_remote(uint32_t address, uint32_t rank, const Where& where) {
  maybe_yield();
  Cta& cta = remote_cta(rank, "mbarrier_arrive_cluster", where);
  arrive(use_mbarrier(cta, address, &cta != current().cta, "mbarrier_arrive_cluster", where), where);
}

void mbarrier_expect(uint32_t address, uint32_t bytes, bool arriving, const Where& where) {
  maybe_yield();
  const char* doing = arriving ? "mbarrier_arrive_expect_tx" : "mbarrier_expect_tx";
  Mbarrier& bar = use_mbarrier(*current().cta, address, false, doing, where);
  expect(bar, bytes, where);
  if (arriving) arrive(bar, where);
}

void mbarrier_wait(uint32_t address, uint32_t parity, const Where& where) {
  maybe_yield();
  Thread& thread = current();
  Mbarrier& bar = use_mbarrier(*thread.cta, address, false, "mbarrier_wait", where);
  if (parity > 1) {
    finding("mbarrier: parity", where, "a parity is 0 or 1, not " + std::to_string(parity));
    give_up();
  }
  wait_until(bar.waiters, {"mbarrier_wait", address, where, parity}, [&] { return (bar.phase & 1) != parity; });
  thread.learn(bar.released);
}

void mbarrier_complete_bytes(Cta& cta, uint32_t address, uint32_t bytes) {
  Mbarrier& bar = cta.mbarriers.at(address);
  bar.bytes -= bytes;
  finish_phase_if_complete(bar);
}

}  // namespace emulator
