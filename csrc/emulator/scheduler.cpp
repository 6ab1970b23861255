#include <emulator/emulate.h>
#include <emulator/machine.h>
#include <emulator/shared_memory.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>

namespace emulator {

Machine* machine = nullptr;

namespace {

constexpr uint64_t MAX_IDLE_SWITCHES = 50'000'000;  // threads that only poll memory for so long wait for ever
constexpr uint32_t REGISTERS_OF_SM = 65536;

struct Settings {
  Schedule schedule = Schedule::Eager;
  uint64_t seed = 0;
  int sm_count = 4;
  uint64_t switches = 0;
} settings;

bool chance(uint32_t one_in) { return machine->random() % one_in == 0; }

void switch_away() {
  Thread* thread = machine->current;
  thread->fiber.suspend();
}

void thread_exit(Thread& thread) {
  Cta& cta = *thread.cta;
  wgmma_thread_exit(thread);
  bulk_thread_exit(thread);
  cta.exits.add(thread.known, thread.agent, thread.time);
  thread.exited = true;
  --cta.live;
  warp_thread_exit(cta, thread.index / 32);
  named_barrier_thread_exit(cta);
  cluster_thread_exit(*cta.cluster);
  if (!cta.live) check_outlived(cta);
}

void fiber_main() {
  machine->kernel();
  thread_exit(*machine->current);
  switch_away();
}

std::unique_ptr<Cta> make_cta(Cluster& cluster, uint32_t rank, dim3 index) {
  std::unique_ptr<Cta> cta = std::make_unique<Cta>();
  cta->cluster = &cluster;
  cta->rank = rank;
  cta->index = index;
  cta->live = machine->block.x;
  cta->memory.assign(machine->shared_bytes, POISON_BYTE);
  cta->shadow.reset(cta.get(), SHARED_BASE, machine->shared_bytes);
  cta->warps.resize((cta->live + 31) / 32);
  cta->warpgroups.resize((cta->live + 127) / 128);
  for (uint32_t t = 0; t < cta->live; ++t) {
    Thread& thread = cta->threads.emplace_back();
    thread.cta = cta.get();
    thread.index = t;
    thread.agent = cluster.add_agent(AgentInfo::Kind::Thread, cta.get(), t);
    ++cta->warp_of(thread).live;
    thread.fiber.start(fiber_main);
  }
  for (uint32_t w = 0; w < cta->warpgroups.size(); ++w)
    cta->warpgroups[w].agent = cluster.add_agent(AgentInfo::Kind::Wgmma, cta.get(), w);
  cluster.live += cta->live;
  return cta;
}

void start_cluster(uint64_t number) {
  const dim3& grid = machine->grid;
  const uint64_t first = number * machine->cluster_size;  // along x
  machine->clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *machine->clusters.back();
  for (uint32_t rank = 0; rank < machine->cluster_size; ++rank) {
    const uint64_t i = first + rank;
    const dim3 index(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    cluster.ctas.push_back(make_cta(cluster, rank, index));
  }
  for (auto& cta : cluster.ctas)
    for (Thread& thread : cta->threads) machine->ready.push_back(&thread);
}

void check_registers(const Cta& cta) {
  uint64_t registers = 0;
  for (const Thread& thread : cta.threads) registers += thread.max_registers;
  if (registers > REGISTERS_OF_SM)
    machine->report.add("setmaxnreg: too many registers", Where{},
                        "the warpgroups ask for " + std::to_string(registers) + " registers of the SM's " +
                            std::to_string(REGISTERS_OF_SM));
}

// What was issued in the cluster and is still going on ends with it.
void finish_cluster(Cluster& cluster) {
  auto& bulk = machine->bulk;
  for (size_t i = 0; i < bulk.size();) {
    BulkOperation& op = *bulk[i];
    if (op.thread->cta->cluster != &cluster) {
      ++i;
      continue;
    }
    while (!bulk_step(op)) continue;
    bulk.erase(bulk.begin() + i);
  }
  for (const auto& cta : cluster.ctas) check_registers(*cta);
}

// One step of asynchronous work; false when there is none.
bool asynchronous_step() {
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

void report_deadlock() {
  std::vector<std::pair<std::string, Where>> groups;
  for (auto& cluster : machine->clusters)
    for (auto& cta : cluster->ctas)
      for (const Thread& thread : cta->threads) {
        if (thread.exited) continue;
        const Waiting& w = thread.waiting;
        std::string what = describe(*cta) + " waits in " + w.doing;
        if (cta->mbarriers.count(w.object)) {
          const Mbarrier& bar = cta->mbarriers[w.object];
          what += " of the barrier at " + hex(w.object) + " (initialised at " + to_string(bar.where) + ", phase " +
                  std::to_string(bar.phase) + ": " + std::to_string(bar.pending) + " of " + std::to_string(bar.count) +
                  " arrivals to come, and " +
                  (bar.bytes < 0 ? std::to_string(-bar.bytes) + " bytes more than expected have come)"
                                 : std::to_string(bar.bytes) + " bytes)");
        } else if (w.object < 16 && std::string(w.doing) == "barrier_sync") {
          const NamedBarrier& bar = cta->barriers[w.object];
          what += " " + std::to_string(w.object) + " (" + std::to_string(bar.arrived) + " of " +
                  std::to_string(bar.expected) + " threads)";
        }
        what += ", warp " + std::to_string(thread.index / 32);
        machine->report.add("deadlock", Where{w.where.file, w.where.line}, what);
      }
}

void run() {
  const size_t resident = std::max<size_t>(1, settings.sm_count / machine->cluster_size);
  uint64_t idle = 0;
  while (!machine->stopped) {
    while (machine->clusters.size() < resident && !machine->to_start.empty()) {
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
    if (++idle > MAX_IDLE_SWITCHES) {
      report_deadlock();
      return;
    }
    if (!thread->exited || thread->cta->cluster->live) continue;
    idle = 0;
    Cluster* cluster = thread->cta->cluster;
    finish_cluster(*cluster);
    auto& all = machine->clusters;
    all.erase(std::find_if(all.begin(), all.end(), [&](auto& c) { return c.get() == cluster; }));
  }
}

}  // namespace

Thread& current() { return *machine->current; }

dim3 thread_index() { return dim3(current().index, 0, 0); }
dim3 block_index() { return current().cta->index; }
dim3 block_size() { return machine->block; }
dim3 grid_size() { return machine->grid; }

void WaitList::wake() {
  for (Thread* thread : threads_) machine->ready.push_back(thread);
  threads_.clear();
}

void suspend_in(WaitList& list, const Waiting& waiting) {
  current().waiting = waiting;
  list.add(machine->current);
  switch_away();
}

void yield() {
  machine->ready.push_back(machine->current);
  switch_away();
}

void maybe_yield() {
  if (machine->schedule != Schedule::Random) return;
  if (chance(64)) asynchronous_step();
  if (chance(64)) yield();
}

bool coin() { return machine->random() & 1; }

bool runs_at_once() {
  return machine->schedule == Schedule::Eager || (machine->schedule == Schedule::Random && coin());
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

uint32_t Machine::site(const char* doing, const Where& where) {
  for (size_t i = sites.size(); i-- > 0;)
    if (sites[i].doing == doing && sites[i].where.line == where.line && sites[i].where.file == where.file) return i;
  sites.push_back({doing, where});
  return sites.size() - 1;
}

Agent Cluster::add_agent(AgentInfo::Kind kind, Cta* cta, uint32_t which) {
  agents.push_back({kind, cta, which});
  return agents.size() - 1;
}

Thread* Cluster::thread_of(Agent agent) {
  const AgentInfo& info = agents[agent];
  return info.kind == AgentInfo::Kind::Thread ? &info.cta->threads[info.which] : nullptr;
}

std::string describe(const Cta& cta) {
  return "CTA (" + std::to_string(cta.index.x) + ", " + std::to_string(cta.index.y) + ", " +
         std::to_string(cta.index.z) + ")";
}

std::string describe(const Thread& thread) { return describe(*thread.cta) + " thread " + std::to_string(thread.index); }

std::string Cluster::describe(Agent agent) {
  const AgentInfo& info = agents[agent];
  const std::string cta = emulator::describe(*info.cta);
  switch (info.kind) {
    case AgentInfo::Kind::Thread: return emulator::describe(info.cta->threads[info.which]);
    case AgentInfo::Kind::Wgmma: return cta + " warpgroup " + std::to_string(info.which) + ", asynchronously";
    case AgentInfo::Kind::BulkStore: return cta + " thread " + std::to_string(info.which) + ", asynchronously";
    default: return cta + ", signalled on the mbarrier at " + hex(info.which);
  }
}

void set_mode(const std::string& schedule, uint64_t seed) {
  if (schedule == "eager") settings.schedule = Schedule::Eager;
  else if (schedule == "tma_last") settings.schedule = Schedule::TmaLast;
  else if (schedule == "wgmma_last") settings.schedule = Schedule::WgmmaLast;
  else if (schedule == "random") settings.schedule = Schedule::Random;
  else
    throw std::invalid_argument("schedule is " + schedule + "; it has to be eager, tma_last, wgmma_last or random");
  settings.seed = seed;
}

void set_sm_count(int n) {
  if (n < 1) throw std::invalid_argument("the number of SMs is " + std::to_string(n) + "; it has to be at least 1");
  settings.sm_count = n;
}

int sm_count() { return settings.sm_count; }
uint64_t thread_switches() { return settings.switches; }

static void check_shape(dim3 grid, int threads, uint32_t shared_bytes, int cluster) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("cannot launch the kernel: " + why); };
  if (!grid.x || !grid.y || !grid.z) refuse("the grid is empty");
  if (grid.y > 65535 || grid.z > 65535) refuse("the grid is at most 65535 along y and z");
  if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads; a CTA has 1 to 1024");
  if (shared_bytes > SHARED_LIMIT) refuse(std::to_string(shared_bytes) + " bytes of shared memory; a CTA has 232448");
  if (cluster < 1 || cluster > 16 || (cluster & (cluster - 1))) refuse("clusters are of 1, 2, 4, 8 or 16 CTAs");
  if (grid.x % cluster) refuse("grid.x is not a multiple of the cluster's " + std::to_string(cluster) + " CTAs");
}

Report emulate(dim3 grid, int threads, uint32_t shared_bytes, int cluster, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_shape(grid, threads, shared_bytes, cluster);
  Machine m;
  machine = &m;
  m.schedule = settings.schedule;
  m.random.seed(settings.seed);
  m.grid = grid;
  m.block = dim3(threads);
  m.shared_bytes = shared_bytes;
  m.cluster_size = cluster;
  m.kernel = body;
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster;
  for (uint64_t i = clusters; i-- > 0;) m.to_start.push_back(i);
  if (m.schedule == Schedule::Random) std::shuffle(m.to_start.begin(), m.to_start.end(), m.random);
  run();
  settings.switches = m.switches;
  machine = nullptr;
  return std::move(m.report);
}

}  // namespace emulator
