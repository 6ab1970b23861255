#include <emulator/clock.h>

#include <algorithm>
#include <array>

namespace emulator {

namespace {

// Threads of a CTA hold the same clocks and learn the same things one after another: remember the latest answers.
template <class Key> struct Recent {
  struct Entry { Key key; Clock result; };
  std::array<Entry, 8> entries;
  size_t next = 0;

  const Clock* find(const Key& key) const {
    for (const Entry& e : entries)
      if (e.key == key) return &e.result;
    return nullptr;
  }
  const Clock& remember(const Key& key, Clock result) {
    Entry& e = entries[next++ % entries.size()];
    e = {key, std::move(result)};
    return e.result;
  }
};

struct Pair {
  Clock a, b;
  bool operator==(const Pair& o) const { return a == o.a && b == o.b; }
};
struct Step {
  Clock a;
  Agent agent = 0;
  uint32_t time = 0;
  bool operator==(const Step& o) const { return a == o.a && agent == o.agent && time == o.time; }
};

void join_into(Times& to, const Times& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

bool contains(const Times& a, const Times& b) {
  for (size_t i = 0; i < b.size(); ++i)
    if (b[i] > (i < a.size() ? a[i] : 0)) return false;
  return true;
}

}  // namespace

Clock join(const Clock& a, const Clock& b) {
  if (a == b || !b.get()) return a;
  if (!a.get()) return b;
  static Recent<Pair> recent;
  const Pair key{a, b};
  if (const Clock* known = recent.find(key)) return *known;
  if (contains(*a.get(), *b.get())) return recent.remember(key, a);
  if (contains(*b.get(), *a.get())) return recent.remember(key, b);
  Times times = *a.get();
  join_into(times, *b.get());
  return recent.remember(key, Clock(std::move(times)));
}

Clock with(const Clock& a, Agent agent, uint32_t time) {
  if (a[agent] >= time) return a;
  static Recent<Step> recent;
  const Step key{a, agent, time};
  if (const Clock* known = recent.find(key)) return *known;
  Times times = a.get() ? *a.get() : Times();
  if (times.size() <= agent) times.resize(agent + 1);
  times[agent] = time;
  return recent.remember(key, Clock(std::move(times)));
}

void ClockGather::add(const Clock& known, Agent self, uint32_t time) {
  if (known.get() && !(known == last_)) join_into(times_, *known.get());
  last_ = known;
  if (times_.size() <= self) times_.resize(self + 1);
  times_[self] = std::max(times_[self], time);
}

Clock ClockGather::take() {
  last_ = Clock();
  return Clock(std::move(times_));
}

void ClockMeet::add(const Clock& known, Agent self, uint32_t time) {
  for (Member& m : members_)
    if (m.known == known) {
      ++m.threads;
      return;
    }
  members_.push_back({known, self, time, 1});
}

Clock ClockMeet::take() const {
  if (members_.size() == 1 && members_[0].threads > 1) return members_[0].known;
  Times meet;
  bool first = true;
  for (const Member& m : members_) {
    Times times = m.known.get() ? *m.known.get() : Times();
    if (m.threads == 1) {  // others that share a clock learned of this thread's past through it
      if (times.size() <= m.self) times.resize(m.self + 1);
      times[m.self] = std::max(times[m.self], m.time);
    }
    if (first) meet = std::move(times);
    else {
      meet.resize(std::min(meet.size(), times.size()));
      for (size_t i = 0; i < meet.size(); ++i) meet[i] = std::min(meet[i], times[i]);
    }
    first = false;
  }
  return Clock(std::move(meet));
}

}  // namespace emulator
