// The emulated GPU has clusters, unless told that it is an older one.
#pragma once

namespace rows {

inline bool& emulate_clusters() {
  static bool on = true;
  return on;
}

template <class Kernel> bool supports_clusters(Kernel) { return emulate_clusters(); }

template <class Module> void bind_cluster_switch(Module& m) {
  m.def("emulator_clusters", [](bool on) { emulate_clusters() = on; }, "Whether the emulated GPU has clusters.");
}

}  // namespace rows
