// Mistakes that the tests plant in the row kernels, to prove that they would notice. A kernel asks Planted::has(Bug::…);
// for NoBugs that is a constant, and nothing of it is left in the compiled kernel.
#pragma once
#include <ptx/language.h>

namespace rows {

enum class Bug {
  None,
  NoBarrier,      // warps' totals are read before all are written
  OneRound,       // the next reduction overwrites totals that are still being read
  NoClusterSync,  // CTAs' totals are read before all are written
  OwnTotals,      // a CTA hands its total to itself alone
  LastRowOnly,    // dweight and dbias are those of a CTA's last row
  OneGroup,       // dweight and dbias leave out all but the first of the rows that a CTA has at once
  UnsharedKeep,   // a chunk is kept where another thread keeps one
};

struct NoBugs {
  __device__ __forceinline__ static constexpr bool has(Bug) { return false; }
};

}  // namespace rows
