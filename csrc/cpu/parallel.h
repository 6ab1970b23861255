// Loops over tasks on an explicit number of threads.
#pragma once
#include <omp.h>

#include "dispatch.h"

namespace fastattn::FASTATTN_ISA {

// How many threads work on so many tasks. One opens no team, and a forked child, whose OpenMP runtime may be without its
// workers, always uses one.
inline __attribute__((always_inline)) int team_of(int threads, int64_t tasks) {
  if (tasks < threads) threads = (int)tasks;
  return threads <= 1 || in_forked_child() ? 1 : threads;
}

// body(task, thread) for every task, in any order, on up to `threads` threads. `body` must not throw: what may fail,
// such as an allocation, belongs before the loop.
template <class Body>
inline __attribute__((always_inline)) void parallel_for(int threads, int64_t tasks, const Body& body) {
  const int team = team_of(threads, tasks);
  if (team == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) body(task, thread);
  }
}

// The same for tasks that are alike and follow one another in memory. A thread begins with its own share of them, which
// has the place of its share in the operation before, and so lies in its cache, and goes on with what others have left.
template <class Body>
inline __attribute__((always_inline)) void parallel_shares(int threads, int64_t tasks, const Body& body) {
  const int team = team_of(threads, tasks);
  if (team == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  struct alignas(64) Share {
    int64_t next, end;
  } shares[team];
  for (int t = 0; t < team; ++t) shares[t] = {tasks * t / team, tasks * (t + 1) / team};
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
    for (int k = 0; k < team; ++k) {
      Share& share = shares[(thread + k) % team];
      for (int64_t task; (task = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;) body(task, thread);
    }
  }
}

// body(first, last, thread) for ranges that cover 0 … n - 1, about `grain` long; the ranges depend on n and grain alone
template <class Body>
inline __attribute__((always_inline)) void parallel_ranges(int threads, int64_t n, int64_t grain, const Body& body) {
  if (grain < 1) grain = 1;
  parallel_shares(threads, (n + grain - 1) / grain, [&](int64_t task, int thread) {
    const int64_t first = task * grain, last = first + grain;
    body(first, last < n ? last : n, thread);
  });
}

}  // namespace fastattn::FASTATTN_ISA
