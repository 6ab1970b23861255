// Vector clocks. An agent is a thread, a warpgroup's wgmma engine, a thread's bulk-store engine or an mbarrier (for
// the TMA loads it completes); agents are numbered per cluster. Clocks are immutable and shared: after a barrier a
// whole CTA holds one.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

using Agent = uint32_t;
using Times = std::vector<uint32_t>;

class Clock {
 public:
  Clock() = default;
  explicit Clock(Times times) : times_(std::make_shared<const Times>(std::move(times))) {}

  uint32_t operator[](Agent a) const { return times_ && a < times_->size() ? (*times_)[a] : 0; }
  const Times* get() const { return times_.get(); }
  bool operator==(const Clock& other) const { return times_ == other.times_; }

 private:
  std::shared_ptr<const Times> times_;
};

// The least clock that knows what both know.
Clock join(const Clock& a, const Clock& b);
// a, and that agent `agent` has come to `time`.
Clock with(const Clock& a, Agent agent, uint32_t time);

// What the threads that arrived at a barrier knew.
class ClockGather {
 public:
  void add(const Clock& known, Agent self, uint32_t time);
  Clock take();

 private:
  Times times_;
  Clock last_;
};

// What every one of several threads knows; each surely knows its own past.
class ClockMeet {
 public:
  void add(const Clock& known, Agent self, uint32_t time);
  void add(const Clock& known) { add(known, 0, 0); }
  Clock take() const;

 private:
  struct Member { Clock known; Agent self; uint32_t time; int threads; };
  std::vector<Member> members_;
};

}  // namespace emulator
