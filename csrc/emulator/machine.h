// The state of one launch: threads in CTAs in clusters, as many resident as there are SMs.
#pragma once
#include <emulator/cluster.h>
#include <emulator/fiber.h>
#include <emulator/mbarrier.h>
#include <emulator/named_barrier.h>
#include <emulator/report.h>
#include <emulator/shadow.h>
#include <emulator/tma.h>
#include <emulator/warp.h>
#include <emulator/wgmma.h>
#include <ptx/language.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>

namespace emulator {

enum class Schedule { Eager, TmaLast, WgmmaLast, Random };

struct Thread {
  Fiber fiber;
  Cta* cta = nullptr;
  uint32_t index = 0;  // in the CTA
  Agent agent = 0;
  bool exited = false;
  Waiting waiting;

  Clock known;        // of the other agents
  uint32_t time = 1;  // its own; ticks when it releases something
  std::vector<uint32_t> proxy_fences;           // times at which it fenced; each covers its stores up to then
  std::vector<Mbarrier*> unfenced_mbarriers;    // initialised, no fence_mbarrier_init since
  uint64_t barrier_generation[16] = {};         // 1 + the generation of its latest arrival
  uint64_t cluster_arrivals = 0, cluster_waits = 0;
  uint64_t cluster_generation = 0;              // it waits for
  int max_registers = 0;  // of setmaxnreg
  Where max_registers_where;
  WgmmaThread wgmma;
  BulkThread bulk;

  uint32_t lane() const { return index % 32; }
  void learn(const Clock& clock) { known = join(known, clock); }
  void release_to(ClockGather& gather) { gather.add(known, agent, time++); }
  bool knows(Agent a, uint32_t t) const { return a == agent || known[a] >= t; }
  Actor actor(const char* doing, const Where& where) const;
};

// A use of a CTA's shared memory that has to be over before the CTA exits.
struct Use { uint32_t time; const char* doing; Where where; };

struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  dim3 index;
  std::deque<Thread> threads;
  uint32_t live = 0;
  std::vector<uint8_t> memory;  // from SHARED_BASE on
  Shadow shadow;
  std::map<uint32_t, Mbarrier> mbarriers;
  NamedBarrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<Agent, Use> uses;  // the latest of each agent
  ClockGather exits;          // what its threads knew when they exited

  uint8_t* at(uint32_t address);
  Warp& warp_of(const Thread& thread) { return warps[thread.index / 32]; }
  Warpgroup& warpgroup_of(const Thread& thread) { return warpgroups[thread.index / 128]; }
};

struct AgentInfo {
  enum class Kind { Thread, Wgmma, BulkStore, Mbarrier } kind;
  Cta* cta;
  uint32_t which;  // thread, warpgroup, thread, address
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<AgentInfo> agents;
  ClusterBarrier barrier;
  uint32_t live = 0;  // threads

  Agent add_agent(AgentInfo::Kind kind, Cta* cta, uint32_t which);
  Thread* thread_of(Agent agent);  // nullptr unless the agent is a thread
  std::string describe(Agent agent);
};

struct Site { const char* doing; Where where; };

struct Machine {
  Schedule schedule = Schedule::Eager;
  std::mt19937_64 random;
  Report report;
  dim3 grid, block;
  uint32_t shared_bytes = 0, cluster_size = 1;
  size_t resident = 1;  // clusters at a time
  std::function<void()> kernel;

  Thread* current = nullptr;
  bool stopped = false;
  std::deque<Thread*> ready;
  std::vector<std::unique_ptr<Cluster>> clusters;  // resident
  std::vector<uint64_t> to_start;                  // cluster numbers, the next one last
  std::vector<std::unique_ptr<BulkOperation>> bulk;
  std::vector<Site> sites;

  uint32_t site(const char* doing, const Where& where);
  uint64_t switches = 0, polls = 0;
  uint64_t spins = 0;  // switches since some thread last waited or exited
};

extern Machine* machine;

void start_cluster(uint64_t number);
void finish_cluster(Cluster& cluster);  // what was issued in it and is still going on ends with it
void run();                             // the whole grid
void report_deadlock();

std::string describe(const Cta& cta);
std::string describe(const Thread& thread);

}  // namespace emulator
