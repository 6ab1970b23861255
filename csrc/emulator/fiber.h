// A thread of execution with its own stack, switched to and from by hand.
#pragma once
#include <cstddef>

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void start(void (*entry)());  // entry runs at the first resume; it leaves by suspend and does not return
  void resume();                // from the scheduler: run until the fiber suspends
  void suspend();               // from the fiber: back to the scheduler

 private:
  void* stack_ = nullptr;
  void* context_ = nullptr;
  void* scheduler_ = nullptr;
};

}  // namespace emulator
