#include <emulator/machine.h>

#include <algorithm>

namespace emulator {

namespace {

constexpr uint64_t MAX_SPINS = 100'000;  // of each thread: threads that only read memory for so long wait for ever

bool chance(uint32_t one_in) { return machine->random() % one_in == 0; }

void switch_away() {
  Thread* thread = machine->current;
  thread->fiber.suspend();
}

// One step of asynchronous work, which no thread does; false when there is none.
bool asynchronous_step() {
  struct Away {
    Thread* thread = machine->current;
    Away() { machine->current = nullptr; }
    ~Away() { machine->current = thread; }
  } const away;
  auto& bulk = machine->bulk;
  std::vector<std::pair<Cta*, Warpgroup*>> wgmma;
  for (auto& cluster : machine->clusters)
    for (auto& cta : cluster->ctas)
      for (Warpgroup& warpgroup : cta->warpgroups)
        if (warpgroup.executed < warpgroup.wanted && warpgroup.can_execute()) wgmma.emplace_back(cta.get(), &warpgroup);
  if (bulk.empty() && wgmma.empty()) return false;
  const bool random = machine->schedule == Schedule::Random;
  const bool bulk_first = random ? machine->random() % 2 : machine->schedule != Schedule::TmaLast;
  if (wgmma.empty() || (bulk_first && !bulk.empty())) {
    const size_t i = random ? machine->random() % bulk.size() : 0;
    if (bulk_step(*bulk[i])) bulk.erase(bulk.begin() + i);
  } else {
    auto [cta, warpgroup] = wgmma[random ? machine->random() % wgmma.size() : 0];
    wgmma_execute(*cta, *warpgroup);
  }
  return true;
}

}  // namespace

Thread& current() { return *machine->current; }

void WaitList::wake() {
  for (Thread* thread : threads_) machine->ready.push_back(thread);
  threads_.clear();
}

void suspend_in(WaitList& list, const Waiting& waiting) {
  current().waiting = waiting;
  machine->spins = 0;
  list.add(machine->current);
  switch_away();
}

void yield() {
  ++machine->spins;
  machine->ready.push_back(machine->current);
  switch_away();
}

void poll() {
  if (++machine->polls % 256) return;
  current().waiting = {"a loop that reads global memory", 0, Where()};
  yield();
}

void maybe_yield() {
  if (machine->schedule != Schedule::Random) return;
  if (chance(64)) asynchronous_step();
  if (chance(64)) yield();
}

bool runs_at_once() {
  return machine->schedule == Schedule::Eager || (machine->schedule == Schedule::Random && chance(2));
}

void finding(const char* kind, const Where& where, const std::string& message) {
  const std::string who = machine->current ? describe(*machine->current) + ": " : "";
  machine->report.add(kind, where, who + message);
}

void give_up() {
  machine->stopped = true;
  switch_away();
  std::abort();  // a stopped machine resumes no thread
}

void run() {
  while (!machine->stopped) {
    while (machine->clusters.size() < machine->resident && !machine->to_start.empty()) {
      start_cluster(machine->to_start.back());
      machine->to_start.pop_back();
    }
    if (machine->clusters.empty()) return;
    if (machine->ready.empty()) {
      if (asynchronous_step()) continue;
      report_deadlock();
      return;
    }
    auto& ready = machine->ready;
    if (machine->schedule == Schedule::Random) std::swap(ready.front(), ready[machine->random() % ready.size()]);
    Thread* thread = ready.front();
    ready.pop_front();
    machine->current = thread;
    ++machine->switches;
    thread->fiber.resume();
    machine->current = nullptr;
    if (machine->spins > 4 * (ready.size() + 1)) asynchronous_step();  // they may wait for it
    if (machine->spins > MAX_SPINS * (ready.size() + 1)) {
      report_deadlock();
      return;
    }
    if (!thread->exited) continue;
    machine->spins = 0;
    if (thread->cta->cluster->live) continue;
    Cluster* cluster = thread->cta->cluster;
    finish_cluster(*cluster);
    auto& all = machine->clusters;
    all.erase(std::find_if(all.begin(), all.end(), [&](auto& c) { return c.get() == cluster; }));
  }
}

}  // namespace emulator
