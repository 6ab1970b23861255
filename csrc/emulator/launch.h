// The emulator's launcher: runs the kernel on this CPU before it returns; what was wrong becomes a std::runtime_error.
#pragma once
#include <emulator/emulate.h>
#include <emulator/shared_memory.h>
#include <launch_shape.h>

#include <stdexcept>

inline int sm_count() { return emulator::sm_count(); }
inline int shared_limit() { return emulator::SHARED_LIMIT; }

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t, const Params& params) {
  const emulator::Report report = emulator::emulate(shape.grid, shape.threads, shape.shared_bytes, shape.cluster,
                                                    [&] { kernel(params); });
  if (!report.clean()) throw std::runtime_error("the emulated kernel is wrong:\n" + report.text());
}
