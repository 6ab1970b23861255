// Launching test kernels in every schedule.
#pragma once
#include <emulator/emulate.h>
#include <launch.h>
#include <tests/harness.h>

#include <string>
#include <vector>

struct Schedule { const char* name; uint64_t seed; };

inline const std::vector<Schedule> SCHEDULES = {
    {"eager", 0}, {"tma_last", 0}, {"wgmma_last", 0}, {"random", 1}, {"random", 2}, {"random", 3}};

template <class Params>
emulator::Report emulate(void (*kernel)(Params), const LaunchShape& shape, const Params& params,
                         const Schedule& schedule) {
  emulator::set_mode(schedule.name, schedule.seed);
  return emulator::emulate(shape.grid, shape.threads, shape.shared_bytes, shape.cluster, [&] { kernel(params); });
}

// Runs the kernel and expects nothing wrong; `check` looks at what it computed.
template <class Params, class Check>
void expect_clean(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Check check) {
  for (const Schedule& schedule : SCHEDULES) {
    const emulator::Report report = emulate(kernel, shape, params, schedule);
    if (!report.clean()) harness::fail(__FILE__, __LINE__, std::string(schedule.name) + ": " + report.text());
    check();
  }
}

// Runs the kernel and expects a finding of this kind in every schedule.
template <class Params>
void expect_finding(void (*kernel)(Params), const LaunchShape& shape, const Params& params, const std::string& kind) {
  for (const Schedule& schedule : SCHEDULES) {
    const emulator::Report report = emulate(kernel, shape, params, schedule);
    bool found = false;
    for (const auto& finding : report.findings()) found |= finding.kind == kind;
    if (!found)
      harness::fail(__FILE__, __LINE__,
                    std::string(schedule.name) + ": no finding '" + kind + "', but: " + report.text());
  }
}
