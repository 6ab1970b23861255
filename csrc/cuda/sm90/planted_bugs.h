// Mistakes that the tests plant in the attention kernel, to prove that they would notice. A kernel asks
// Planted::has(Bug::…); for NoBugs that is a constant, and nothing of it is left in the compiled kernel.
#pragma once
#include <ptx/language.h>

namespace sm90 {

enum class Bug {
  None,
  NoInitSync,           // barriers are used before they are initialised
  NoKeyFullWait,        // S is computed before K has come
  NoValueFullWait,      // O is computed before V has come
  NoKeyEmptyWait,       // K is overwritten while it is read
  NoValueEmptyWait,     // V is overwritten while it is read
  NoQueryEmptyWait,     // the next Q overwrites this one
  NoTileEmptyWait,      // the next tile is announced before this one has been read
  EarlyKeyRelease,      // K is given back while S is in flight
  EarlyValueRelease,    // V is given back while O is in flight
  NoScoreWait,          // S is read in flight
  EarlyRescale,         // O is scaled in flight
  EarlyPack,            // P is overwritten in flight
  NoWgmmaFence,         // the tensor cores may see old registers
  ShortExpect,          // a barrier opens after half of its bytes
  WrongParity,          // a barrier is waited for one phase too early
  WrongKeyStride,       // the descriptor of K has the wrong distance of row groups
  WrongValueStride,     // the descriptor of V has the wrong distance of panels
  NoProxyFence,         // TMA stores what was in shared memory before O
  NoEpilogueBarrier,    // TMA stores before all warps have written O
  NoStoreWait,          // O is overwritten while TMA still stores it
  MaskOffByOne,         // a row sees one key too many
  NoRescale,            // sums keep the old maximum
  LeakHidden,           // 0 · NaN of a hidden value reaches o
  StoreBeyondSequence,  // a packed sequence overwrites the next one
  CounterLeft,          // the counter is not zero after the launch
  ReleaseToSelf,        // the other CTA of the cluster is not told that its keys were read
};

struct NoBugs {
  __device__ __forceinline__ static constexpr bool has(Bug) { return false; }
};

}  // namespace sm90
