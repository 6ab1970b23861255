// The life of CTAs and clusters: how they start, what is checked when threads and clusters end.
#include <emulator/machine.h>
#include <emulator/shared_memory.h>

namespace emulator {

namespace {

constexpr uint32_t REGISTERS_OF_SM = 65536;

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
  machine->current->fiber.suspend();
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

}  // namespace

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

static void check_registers(const Cta& cta) {
  uint64_t registers = 0;
  Where where;
  for (const Thread& thread : cta.threads) {
    registers += thread.max_registers;
    if (thread.max_registers) where = thread.max_registers_where;
    if (thread.max_registers != cta.threads[thread.index / 128 * 128].max_registers)
      machine->report.add("setmaxnreg: not by the whole warpgroup", where,
                          "thread " + std::to_string(thread.index) + " has another number of registers than its "
                          "warpgroup's first thread");
  }
  if (registers > REGISTERS_OF_SM)
    machine->report.add("setmaxnreg: too many registers", where,
                        "the warpgroups ask for " + std::to_string(registers) + " registers of the SM's " +
                            std::to_string(REGISTERS_OF_SM));
}

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

dim3 thread_index() { return dim3(current().index, 0, 0); }
dim3 block_index() { return current().cta->index; }
dim3 block_size() { return machine->block; }
dim3 grid_size() { return machine->grid; }

uint32_t Machine::site(const char* doing, const Where& where) {
  for (size_t i = sites.size(); i-- > 0;)
    if (sites[i].doing == doing && sites[i].where.line == where.line && sites[i].where.file == where.file) return i;
  if (sites.size() == MAX_SITES) {
    finding("emulator: too many lines", where, "a kernel may touch shared memory on 4096 lines at most");
    give_up();
  }
  sites.push_back({doing, where});
  return sites.size() - 1;
}

Agent Cluster::add_agent(AgentInfo::Kind kind, Cta* cta, uint32_t which) {
  if (agents.size() == MAX_AGENTS) {
    finding("emulator: too many agents", Where(), "threads and mbarriers of a cluster are 65536 at most");
    give_up();
  }
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

}  // namespace emulator
