#include "attention_gradient_tile.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
void GradientTile::compute(const AttentionParams& p, const Sequence& sequence, const Window& window, const Score& score,
                           const Tile& t, int b, int n_0, int n, Seen what, Operand k, Operand v, const int32_t* q,
                           const int32_t* d_o, bool inner, bool slope) {
  using E = Element<T>;
  const int size = n * t.width;
  product<E>(n, depth_of<T>(p.D), t.width, k, q, t.width, s, t.width, Start::zero);
  product<E>(n, depth_of<T>(p.D_v), t.width, v, d_o, t.width, dp, t.width, Start::zero);
  apply_score(p, sequence, score, t, b, n_0, n, s, score.softcap != 0.f ? derivative : nullptr, entries);
  if (what == Seen::part) visible(p, window, t, b, n_0, n, keep);
  if (p.dropout) dropout_factors(p, t, b, n_0, n, entries);
  for (int j = 0; j < t.vectors(); ++j) {
    const Vec row_lse = load(lse + j * LANES), row_delta = load(delta + j * LANES), factor = broadcast(score.factor);
    const Vec low = -(load(lse_low + j * LANES) * broadcast(LOG2_E));
    const Int rows = first_lanes(t.n - j * LANES);
    const bool whole = (j + 1) * LANES <= t.n;  // else what k holds against no query, which may be NaN, becomes 0
    for (int i = 0; i < n; ++i) {
      const int at = i * t.width + j * LANES;
      const Vec logit = load(s + at) * factor;
      const Vec weight = exp2_softmax<std::is_same_v<T, bf16>>(fma(logit - row_lse, broadcast(LOG2_E), low));
      const Vec kept = p.dropout ? load(entries + at) : broadcast(1.f);
      const Vec dropped = weight * kept, ds = weight * fma(load(dp + at), kept, -row_delta);
      store(s + at, whole ? dropped : zero_unless(rows, dropped));
      store(dp + at, whole ? ds : zero_unless(rows, ds));
    }
  }
  if (what == Seen::part) {
    for (int i = 0; i < size; i += LANES) {
      const Int m = *(const UnalignedInt*)(keep + i);
      store(s + i, zero_unless(m, load(s + i)));
      store(dp + i, zero_unless(m, load(dp + i)));
    }
  }
  if (slope) {
    const int shift = sequence.S_k - sequence.S_q;
    for (int j = 0; j < t.vectors(); ++j) {
      Vec sum{};
      for (int i = 0; i < n; ++i)
        sum = fma(load(dp + i * t.width + j * LANES), distance(t.rows(j), shift, n_0 + i), sum);
      store(dslope + j * LANES, load(dslope + j * LANES) + sum);
    }
  }
  if (inner && score.softcap != 0.f)
    for (int i = 0; i < size; i += LANES) store(dp + i, load(dp + i) * load(derivative + i));
}

#define FASTATTN_INSTANTIATE(T)                                                                                       \
  template void GradientTile::compute<T>(const AttentionParams&, const Sequence&, const Window&, const Score&,        \
                                         const Tile&, int, int, int, Seen, Operand, Operand, const int32_t*,          \
                                         const int32_t*, bool, bool);
FASTATTN_INSTANTIATE(float)
FASTATTN_INSTANTIATE(bf16)
FASTATTN_INSTANTIATE(fp16)

}  // namespace fastattn::FASTATTN_ISA
