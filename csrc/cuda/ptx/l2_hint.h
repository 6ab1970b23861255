// The L2 eviction policies that cp.async.bulk takes as a cache hint. The emulator uses this header too.
#pragma once
#include <ptx/language.h>

namespace ptx {

enum class L2Hint : uint64_t {
  None = 0,
  EvictNormal = 0x1000000000000000,
  EvictFirst = 0x12F0000000000000,
  EvictLast = 0x14F0000000000000,
};

}  // namespace ptx
