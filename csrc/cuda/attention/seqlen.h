// Which rows a tile of queries works on: a batch of equal lengths, or sequences packed one after the other.
//
// Packed tensors are (1, H, T, D), and sequence b is their rows cu_seqlens[b] … cu_seqlens[b + 1] - 1. Rows of q
// after the last sequence count as one more, which has no keys: their o is 0 and their lse -inf.
#pragma once
#include <attention/arguments.h>
#include <ptx/global.h>

namespace attention {

// One tile of queries. With P heads of a group packed into it, its row r is query r / P of head head·P + r % P.
struct Tile {
  int valid;    // 0: there is no further tile
  int m_start;  // first row, counted in packed rows: a multiple of BLOCK_M
  int head;     // of H / P
  int batch;    // index into dimension 0; packed 0
  int q_start;  // first row of the sequence in q and in k; not packed 0
  int k_start;
  int S_q;      // length of the sequence
  int S_k;
};

// Packed, slot cu_seqlens_q[b] / rows + b is the first of sequence b, which has at least as many slots as it has
// tiles of `rows` queries; so the number of slots depends on T_q and B alone.
__host__ __device__ __forceinline__ int varlen_slots(int T_q, int B, int rows) { return T_q / rows + B + 1; }

__device__ __forceinline__ void locate(Tile& tile, int slot, int rows, const ForwardArguments& p) {
  const int* cu = p.cu_seqlens_q;
  int b = 0;
  for (int last = p.B; b < last;) {  // the last sequence that starts at or before the slot
    const int middle = (b + last + 1) / 2;
    if (ptx::ld_global_nc(cu + middle) / rows + middle <= slot) {
      b = middle;
    } else {
      last = middle - 1;
    }
  }
  tile.batch = 0;
  tile.q_start = ptx::ld_global_nc(cu + b);
  tile.m_start = (slot - (tile.q_start / rows + b)) * rows;
  if (b == p.B) {
    tile.S_q = p.S_q - tile.q_start;
    tile.k_start = tile.S_k = 0;
  } else {
    tile.S_q = ptx::ld_global_nc(cu + b + 1) - tile.q_start;
    tile.k_start = ptx::ld_global_nc(p.cu_seqlens_k + b);
    tile.S_k = ptx::ld_global_nc(p.cu_seqlens_k + b + 1) - tile.k_start;
  }
}

}  // namespace attention
