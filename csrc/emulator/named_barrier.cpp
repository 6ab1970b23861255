#include <emulator/machine.h>
#include <emulator/named_barrier.h>

namespace emulator {

namespace {

void finish_if_complete(NamedBarrier& bar) {
  if (bar.arrived < bar.expected || !bar.arrived) return;
  bar.arrived = 0;
  bar.released[bar.generation++ % 2] = bar.arriving.take();
  bar.waiters.wake();
}

void arrive(int id, uint32_t threads, bool whole_cta, bool waits, const char* doing, const Where& where) {
  maybe_yield();
  Thread& thread = current();
  Cta& cta = *thread.cta;
  if (id < 0 || id > 15) {
    finding("named barrier: id", where, "barriers are 0 to 15, not " + std::to_string(id));
    give_up();
  }
  NamedBarrier& bar = cta.barriers[id];
  if (!whole_cta && (threads == 0 || threads % 32 || threads > cta.threads.size())) {
    finding("named barrier: threads", where,
            std::string(doing) + " of " + std::to_string(threads) + " threads: a multiple of 32, at most the CTA's " +
                std::to_string(cta.threads.size()));
    give_up();
  }
  if (bar.arrived && (bar.whole_cta != whole_cta || (!whole_cta && bar.expected != threads))) {
    finding("named barrier: counts differ", where,
            "barrier " + std::to_string(id) + " expects " + std::to_string(bar.expected) + " threads at " +
                to_string(bar.where) + " and " + std::to_string(threads) + " here");
    give_up();
  }
  if (thread.barrier_generation[id] == bar.generation + 1) {
    finding("named barrier: arrives twice", where,
            "the thread arrived at barrier " + std::to_string(id) + " before, and the others have not come yet");
    give_up();
  }
  const uint64_t generation = bar.generation;
  thread.barrier_generation[id] = generation + 1;
  bar.expected = threads;
  bar.whole_cta = whole_cta;
  bar.where = where;
  ++bar.arrived;
  thread.release_to(bar.arriving);
  finish_if_complete(bar);
  if (!waits) return;
  wait_until(bar.waiters, {doing, static_cast<uint32_t>(id), where}, [&] { return bar.generation != generation; });
  thread.learn(bar.released[generation % 2]);
}

}  // namespace

void barrier_sync(int id, int threads, const Where& where) { arrive(id, threads, false, true, "barrier_sync", where); }
void barrier_arrive(int id, int threads, const Where& where) {
  arrive(id, threads, false, false, "barrier_arrive", where);
}
void cta_sync(const Where& where) { arrive(0, current().cta->live, true, true, "cta_sync", where); }

void named_barrier_thread_exit(Cta& cta) {
  for (NamedBarrier& bar : cta.barriers)
    if (bar.whole_cta && bar.arrived) {
      bar.expected = cta.live;
      finish_if_complete(bar);
    }
}

}  // namespace emulator
