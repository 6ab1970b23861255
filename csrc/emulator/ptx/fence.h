// The emulator's twin of cuda/ptx/fence.h.
#pragma once
#include <emulator/mbarrier.h>
#include <emulator/shared_memory.h>
#include <ptx/language.h>

namespace ptx {

inline void fence_proxy_async() { emulator::proxy_fence(); }
inline void fence_mbarrier_init() { emulator::mbarrier_init_fence(); }

}  // namespace ptx
