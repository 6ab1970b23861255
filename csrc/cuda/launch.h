// Launching a kernel of one parameter: launch(kernel, {grid, threads, shared_bytes, cluster}, stream, params).
// Whatever the runtime refuses becomes a std::runtime_error.
#pragma once
#include <launch_shape.h>
#include <ptx/language.h>

#include <stdexcept>
#include <string>

namespace detail {
inline void check(cudaError_t status, const std::string& doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it has been reported: the next launch starts clean
  throw std::runtime_error("cannot " + doing + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "find the current GPU");
  check(cudaDeviceGetAttribute(&value, attribute, device), std::string("read the GPU's ") + name);
  return value;
}
}  // namespace detail

// Of the current device.
inline int sm_count() { return detail::device_attribute(cudaDevAttrMultiProcessorCount, "number of SMs"); }
inline int shared_limit() {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory per block");
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const std::string doing = "launch a kernel of " + std::to_string(shape.threads) + " threads and " +
                            std::to_string(shape.shared_bytes) + " bytes of shared memory in clusters of " +
                            std::to_string(shape.cluster);
  detail::check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), doing);
  if (shape.cluster > 8)
    detail::check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), doing);

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  detail::check(cudaLaunchKernelEx(&config, kernel, params), doing);
}
