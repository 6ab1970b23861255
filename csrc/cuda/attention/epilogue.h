// From a warpgroup's accumulators to o and lse in global memory, through the (64, D_v) tile `shared` in shared memory.
#pragma once
#include <attention/exact_row.h>
#include <attention/panel.h>
#include <attention/rows.h>
#include <ptx/matrix.h>
#include <ptx/shared.h>
#include <ptx/tma.h>

namespace attention {

// shared = o · normaliser in 16 bits; a warp writes its own 16 rows.
template <class T, int D_V>
__device__ __forceinline__ void store_fragment(uint32_t shared, const float (&o)[D_V / 2], const float (&normaliser)[2],
                                               int thread) {
  const int lane = thread % 32, row = thread / 32 * ROWS_PER_WARP + lane % 16;
#pragma unroll
  for (int c = 0; c < D_V; c += 16) {
    const float* x = o + c / 2;
    ptx::stmatrix_x4(Panels<D_V>::template address<ROWS>(shared, row, c + lane / 16 * 8),
                     ptx::pack<T>(x[0] * normaliser[0], x[1] * normaliser[0]),
                     ptx::pack<T>(x[2] * normaliser[1], x[3] * normaliser[1]),
                     ptx::pack<T>(x[4] * normaliser[0], x[5] * normaliser[0]),
                     ptx::pack<T>(x[6] * normaliser[1], x[7] * normaliser[1]));
  }
}

// Rows of `shared` that are far or, where keys are hidden, whose o is not finite, once more and exactly; see exact_row.h.
// By a whole warp, on its own 16 rows.
template <class T, int D, int D_V>
__device__ __forceinline__ void repair_rows(uint32_t shared, const float (&o)[D_V / 2], const float (&lse)[2],
                                            const bool (&far)[2], bool hidden, const QueryRows& rows,
                                            const ForwardArguments& p, int thread) {
  float non_finite[2] = {0, 0};
  accumulate_non_finite(non_finite, o);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool exists = rows.exists(first_row(thread) + 8 * r, p);
    const uint32_t wrong = ptx::ballot(exists && (far[r] || (hidden && non_finite[r] != 0 && lse[r] == lse[r])));
    for (int group = 0; group < 8; group++) {  // lanes 4·group … 4·group + 3 share a row
      if ((wrong >> (4 * group) & 15) == 0) continue;
      const int row = thread / 32 * ROWS_PER_WARP + group + 8 * r;
      const T* q = static_cast<const T*>(p.q) + rows.at(row, p.stride_qb, p.stride_qh, p.stride_qm, p);
      const T* k = static_cast<const T*>(p.k) + rows.first_key(p.stride_kb, p.stride_kh, p.stride_kn, p);
      const T* v = static_cast<const T*>(p.v) + rows.first_key(p.stride_vb, p.stride_vh, p.stride_vn, p);
      float exact[(D_V + 63) / 64 * 2], exact_lse, exact_low;
      exact_row<T, D, D_V>(exact, exact_lse, exact_low, q, k, v, rows.keys(row, p), p);
      if (thread % 32 == 4 * group) {  // which stored the first ones
        ptx::st_global(p.lse + rows.lse_at(row, p), exact_lse);
        ptx::st_global(p.lse_low + rows.lse_at(row, p), exact_low);
      }
#pragma unroll
      for (int t = 0; t < (D_V + 63) / 64; t++) {
        const int column = 2 * (thread % 32) + 64 * t;
        if (column >= D_V) continue;
        ptx::st_shared(Panels<D_V>::template address<ROWS>(shared, row, column),
                       ptx::pack<T>(exact[2 * t], exact[2 * t + 1]));
      }
    }
  }
}

// All 64 rows to o, except those beyond the tensor; by one thread.
template <int D_V>
__device__ __forceinline__ void store_tile(uint32_t shared, const QueryRows& rows, const ForwardArguments& p) {
  if (!rows.exists(0, p)) return;
  for (int panel = 0; panel < Panels<D_V>::COUNT; panel++) {
    ptx::tma_store(&p.o_map, shared + panel * ROWS * Panels<D_V>::ROW_BYTES, panel * Panels<D_V>::WIDTH, 0,
                   rows.tile.q_start + rows.query(0, p), rows.tile.head, rows.tile.batch);
  }
  ptx::tma_store_commit();
}

// The rows that belong to the sequence to o, where others follow in the tensor; by a whole warp, its own 16 rows.
template <class T, int D_V>
__device__ __forceinline__ void store_rows(uint32_t shared, const QueryRows& rows, const ForwardArguments& p,
                                           int thread) {
  constexpr int CHUNK = 8, CHUNKS = D_V / CHUNK;  // of 16 bytes
  using Chunk = ptx::packet<T, CHUNK>;
  for (int i = thread % 32; i < ROWS_PER_WARP * CHUNKS; i += 32) {
    const int row = thread / 32 * ROWS_PER_WARP + i / CHUNKS, column = i % CHUNKS * CHUNK;
    if (!rows.exists(row, p)) continue;
    T* o = static_cast<T*>(p.o) + rows.at(row, p.stride_ob, p.stride_oh, p.stride_om, p) + column;
    ptx::st_global(reinterpret_cast<Chunk*>(o),
                   ptx::ld_shared<Chunk>(Panels<D_V>::template address<ROWS>(shared, row, column)));
  }
}

__device__ __forceinline__ void store_lse(const float (&lse)[2], const float (&lse_low)[2], const QueryRows& rows,
                                          const ForwardArguments& p, int thread) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row(thread) + 8 * r;
    if (thread % 4 == 0 && rows.exists(row, p)) {
      ptx::st_global(p.lse + rows.lse_at(row, p), lse[r]);
      ptx::st_global(p.lse_low + rows.lse_at(row, p), lse_low[r]);
    }
  }
}

}  // namespace attention
