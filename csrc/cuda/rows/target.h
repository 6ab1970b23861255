// What a GPU and the emulator answer differently; the emulator's header of this name is its twin.
#pragma once
#include <launch.h>
#include <rows/config.h>
#include <rows/planted_bugs.h>

namespace rows {

// Whether the code that would run has the cluster path: it was compiled for sm_90 or later, not for an older GPU and
// translated by the driver.
template <class Kernel> bool supports_clusters(Kernel kernel) {
  cudaFuncAttributes attributes{};
  const void* function = reinterpret_cast<const void*>(kernel);
  detail::check(cudaFuncGetAttributes(&attributes, function), "read a kernel's attributes");
  return attributes.ptxVersion >= 90;
}

// The emulator may be told to do with less, so that its few threads run through every path.
inline RowLimits limits_on(bool clusters, int shared) { return {clusters, shared}; }

// f(NoBugs{}); the emulator has kernels of T with planted bugs, too.
template <class T, class F> void with_bugs(F f) { f(NoBugs{}); }

template <class Module> void bind_target(Module&) {}

}  // namespace rows
