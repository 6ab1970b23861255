// Threads run until they wait; asynchronous work runs when all wait (but at once in the eager schedule).
#pragma once
#include <emulator/where.h>

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Thread;

// What a thread waits for, for the report of a deadlock.
struct Waiting {
  const char* doing = "";
  uint32_t object = 0;
  Where where;
  uint32_t parity = 0;  // of an mbarrier_wait
};

class WaitList {
 public:
  void add(Thread* thread) { threads_.push_back(thread); }
  void wake();

 private:
  std::vector<Thread*> threads_;
};

Thread& current();
void suspend_in(WaitList& list, const Waiting& waiting);
template <class Ready> void wait_until(WaitList& list, const Waiting& waiting, Ready ready) {
  while (!ready()) suspend_in(list, waiting);
}

void yield();            // lets the other threads run
void poll();             // of a load that may wait for another thread: sometimes yields
void maybe_yield();      // in the random schedule, sometimes, or lets an asynchronous operation run
bool runs_at_once();     // whether an asynchronous operation issued now is carried out at once
void finding(const char* kind, const Where& where, const std::string& message);  // of the current thread
[[noreturn]] void give_up();  // after a finding with which the kernel cannot go on

}  // namespace emulator
