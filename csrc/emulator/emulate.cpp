#include <emulator/emulate.h>
#include <emulator/machine.h>
#include <emulator/shared_memory.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>

namespace emulator {

Machine* machine = nullptr;

namespace {

struct Settings {
  Schedule schedule = Schedule::Eager;
  uint64_t seed = 0;
  int sm_count = 4;
  uint64_t switches = 0;
} settings;

void check_shape(dim3 grid, int threads, uint32_t shared_bytes, int cluster) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("cannot launch the kernel: " + why); };
  if (!grid.x || !grid.y || !grid.z) refuse("the grid is empty");
  if (grid.y > 65535 || grid.z > 65535) refuse("the grid is at most 65535 along y and z");
  if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads; a CTA has 1 to 1024");
  if (shared_bytes > SHARED_LIMIT) refuse(std::to_string(shared_bytes) + " bytes of shared memory; a CTA has 232448");
  if (cluster < 1 || cluster > 16 || (cluster & (cluster - 1))) refuse("clusters are of 1, 2, 4, 8 or 16 CTAs");
  if (grid.x % cluster) refuse("grid.x is not a multiple of the cluster's " + std::to_string(cluster) + " CTAs");
}

}  // namespace

void set_mode(const std::string& schedule, uint64_t seed) {
  if (schedule == "eager") settings.schedule = Schedule::Eager;
  else if (schedule == "tma_last") settings.schedule = Schedule::TmaLast;
  else if (schedule == "wgmma_last") settings.schedule = Schedule::WgmmaLast;
  else if (schedule == "random") settings.schedule = Schedule::Random;
  else
    throw std::invalid_argument("schedule is " + schedule + "; it has to be eager, tma_last, wgmma_last or random");
  settings.seed = seed;
}

void set_sm_count(int n) {
  if (n < 1) throw std::invalid_argument("the number of SMs is " + std::to_string(n) + "; it has to be at least 1");
  settings.sm_count = n;
}

int sm_count() { return settings.sm_count; }
uint64_t thread_switches() { return settings.switches; }

Report emulate(dim3 grid, int threads, uint32_t shared_bytes, int cluster, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_shape(grid, threads, shared_bytes, cluster);
  Machine m;
  struct Current {
    explicit Current(Machine* m) { machine = m; }
    ~Current() { machine = nullptr; }
  } const current(&m);
  m.schedule = settings.schedule;
  m.random.seed(settings.seed);
  m.grid = grid;
  m.block = dim3(threads);
  m.shared_bytes = shared_bytes;
  m.cluster_size = cluster;
  m.resident = std::max(1, settings.sm_count / cluster);
  m.kernel = body;
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster;
  for (uint64_t i = clusters; i-- > 0;) m.to_start.push_back(i);
  if (m.schedule == Schedule::Random) std::shuffle(m.to_start.begin(), m.to_start.end(), m.random);
  run();
  settings.switches = m.switches;
  return std::move(m.report);
}

}  // namespace emulator
