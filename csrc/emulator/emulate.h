// Running a kernel: emulate(shape, body) calls `body` in every thread of the grid and returns what was wrong.
#pragma once
#include <emulator/report.h>
#include <ptx/language.h>

#include <functional>
#include <string>

namespace emulator {

// The schedule of the launches to come: "eager", "tma_last", "wgmma_last" or "random" with a seed; and how many SMs.
void set_mode(const std::string& schedule, uint64_t seed);
void set_sm_count(int n);
int sm_count();
uint64_t thread_switches();  // of the latest launch

Report emulate(dim3 grid, int threads, uint32_t shared_bytes, int cluster, const std::function<void()>& body);

}  // namespace emulator
