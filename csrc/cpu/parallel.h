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

// body(first, last, thread) for ranges that cover 0 … n - 1, about `grain` long; the ranges depend on n and grain alone.
// Ranges are alike, so a thread takes many at a time, which follow one another in memory, and fewer towards the end.
template <class Body>
inline __attribute__((always_inline)) void parallel_ranges(int threads, int64_t n, int64_t grain, const Body& body) {
  if (grain < 1) grain = 1;
  const int64_t tasks = (n + grain - 1) / grain;
  const int team = team_of(threads, tasks);
  const auto range = [&](int64_t task, int thread) {
    const int64_t first = task * grain, last = first + grain;
    body(first, last < n ? last : n, thread);
  };
  if (team == 1) {
    for (int64_t task = 0; task < tasks; ++task) range(task, 0);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(guided)
    for (int64_t task = 0; task < tasks; ++task) range(task, thread);
  }
}

}  // namespace fastattn::FASTATTN_ISA
