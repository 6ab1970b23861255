// Whether the code that would run has the cluster path: it was compiled for sm_90 or later, not for an older GPU and
// translated by the driver. The emulator's header of this name answers for the emulated GPU.
#pragma once
#include <launch.h>

namespace rows {

template <class Kernel> bool supports_clusters(Kernel kernel) {
  cudaFuncAttributes attributes{};
  detail::check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "read a kernel's attributes");
  return attributes.ptxVersion >= 90;
}

// The emulator's module has a switch here.
template <class Module> void bind_cluster_switch(Module&) {}

}  // namespace rows
