// Mistakes that the tests plant in the row kernels, to prove that they would notice. A kernel asks
// Planted::has(Bug::…); for NoBugs that is a constant, and nothing of it is left in the compiled kernel.
#pragma once
#include <ptx/language.h>

namespace rows {

enum class Bug {
  None,
  NoBarrier,       // warps' totals are read before all are written
  OneRound,        // the next reduction overwrites totals that are still being read
  WarpOnly,        // what other warps of the row found is left out
  NoClusterSync,   // CTAs' totals are read before all are written
  NoStartSync,     // a CTA writes into the shared memory of one that may not have begun
  OwnTotals,       // a CTA hands its total to itself alone
  LastRowOnly,     // dweight is that of a CTA's last row
  OneGroup,        // dweight and dbias leave out all but the first of the rows that a CTA has at once
  NoFlushBarrier,  // the groups' sums are added up before all are written
  SharedKeep,      // a chunk is kept where another thread keeps one
};

struct NoBugs {
  __device__ __forceinline__ static constexpr bool has(Bug) { return false; }
};

}  // namespace rows
