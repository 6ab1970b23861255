// wgmma: operations of a warpgroup, carried out in order, at the latest when a thread waits for them.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>
#include <ptx/types.h>

#include <deque>
#include <initializer_list>

namespace emulator {

struct Cta;

constexpr uint32_t ACCUMULATOR_POISON = 0x7fa0dead;  // a signalling NaN: arithmetic changes its bits

// 64 × n accumulators held by the tensor core; d[t] is where thread t keeps its n / 2.
struct Accumulator {
  int n = 0;
  bool shown = false;  // the threads' registers hold the values, not poison
  std::vector<float> values;
  float* d[128] = {};
};

struct WgmmaShape {
  int n;
  ptx::ElementType type;
  bool a_in_registers;
  bool a_mn_major;
  bool b_mn_major;
  bool accumulate;
};

struct WgmmaOperation {
  WgmmaShape shape;
  uint64_t a = 0, b = 0;  // descriptors
  Where where;
  int issued = 0;         // threads
  int passed = 0;         // threads that have waited for it
  std::shared_ptr<Accumulator> d;
  const uint32_t* a_registers[128] = {};
  uint32_t a_at_issue[128][4] = {};
  ClockMeet known[4];     // by all threads of each warp
};

struct Warpgroup {
  Agent agent = 0;
  std::deque<WgmmaOperation> operations;  // from number `first` on
  size_t first = 0;
  size_t executed = 0;
  size_t wanted = 0;                 // some thread waits for the operations below this number
  std::vector<size_t> group_ends;    // operations up to the end of each group
  WaitList waiters;

  WgmmaOperation& operation(size_t i) { return operations[i - first]; }
  size_t end() const { return first + operations.size(); }
  bool can_execute() { return executed < end() && operation(executed).issued == 128; }
};

// Of one thread.
struct WgmmaThread {
  struct InFlight { std::shared_ptr<Accumulator> accumulator; size_t last; };
  size_t issued = 0, groups = 0, waited = 0;
  bool fenced = false;
  std::vector<InFlight> in_flight;
};

struct Registers { const void* begin; size_t bytes; };  // an array pinned by a wait

void wgmma_fence();
void wgmma_issue(const WgmmaShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 const Where& where);
void wgmma_commit(const Where& where);
void wgmma_wait(int groups, std::initializer_list<Registers> pinned, const Where& where);

void wgmma_execute(Cta& cta, Warpgroup& warpgroup);  // the next operation
void wgmma_thread_exit(Thread& thread);

}  // namespace emulator
