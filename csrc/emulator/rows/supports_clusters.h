// The emulated GPU has clusters, unless told that it is an older one.
#pragma once

namespace rows {

inline bool& emulate_clusters() {
  static bool on = true;
  return on;
}

template <class Kernel> bool supports_clusters(Kernel) { return emulate_clusters(); }

}  // namespace rows
