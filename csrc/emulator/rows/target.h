// The emulated GPU: it has clusters unless told otherwise, and its fp32 kernels a mistake if one is planted.
#pragma once
#include <rows/config.h>
#include <rows/planted_bugs.h>

#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace rows {

inline bool emulated_clusters = true;
inline int most_threads = MAX_THREADS, most_shared = 1 << 30;  // of a CTA
inline Bug planted_bug = Bug::None;

struct PlantedBug {
  static bool has(Bug bug) { return bug == planted_bug; }
};

template <class Kernel> bool supports_clusters(Kernel) { return emulated_clusters; }

inline RowLimits limits_on(bool clusters, int shared) {
  return {clusters, std::min(shared, most_shared), most_threads};
}

template <class T, class F> void with_bugs(F f) {
  if constexpr (std::is_same_v<T, float>) {
    if (planted_bug != Bug::None) return f(PlantedBug{});
  }
  f(NoBugs{});
}

inline const std::map<std::string, Bug>& bugs() {
#define BUG(NAME) {#NAME, Bug::NAME}
  static const std::map<std::string, Bug> all = {
      BUG(None), BUG(NoBarrier), BUG(OneRound), BUG(NoClusterSync), BUG(NoStartSync), BUG(OwnTotals), BUG(LastRowOnly),
      BUG(OneGroup), BUG(NoFlushBarrier), BUG(SharedKeep), BUG(WarpOnly)};
#undef BUG
  return all;
}

template <class Module> void bind_target(Module& m) {
  m.def("emulator_clusters", [](bool on) { emulated_clusters = on; }, "Whether the emulated GPU has clusters.");
  m.def("emulator_row_limits", [](int threads, int shared) {
    most_threads = threads;
    most_shared = shared;
  }, "Threads, a power of two from 64 to 512, and bytes of shared memory that a CTA of the row kernels may have.");
  m.def("emulator_rows_bug", [](const std::string& name) {
    const auto found = bugs().find(name);
    if (found == bugs().end()) throw std::invalid_argument("there is no bug '" + name + "'");
    planted_bug = found->second;
  }, "Plants a mistake in the fp32 row kernels of the launches to come; None: no mistake.");
  m.def("emulator_rows_bugs", [] {
    std::vector<std::string> names;
    for (const auto& [name, bug] : bugs())
      if (bug != Bug::None) names.push_back(name);
    return names;
  });
}

}  // namespace rows
