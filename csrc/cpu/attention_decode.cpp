// Attention forward for a few rows of queries, as when a token is decoded: keys in lanes for scores and softmax, D_v in
// lanes for values. What acts on scores finds them transposed, as it does in attention_forward.cpp.
//
//   s = q kᵀ (rows, N);   p = exp(f(s) - max);   o = p v / sum (rows, D_v)
//
// The memory of k and v is what takes the time: both are read once, where they lie, and asked for a block ahead.
#include "attention_forward.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// dot[u] += elements of row u from d on · one element of q
template <class T>
FASTATTN_INLINE void add_products(Vec (&dot)[LANES], const T* const (&rows)[LANES], int d, int64_t stride, int left,
                                  const int32_t* q) {
  const Int element = *(const UnalignedInt*)(q + d / Element<T>::DEPTH);
#pragma GCC unroll 16
  for (int u = 0; u < LANES; ++u)
    dot[u] = Element<T>::multiply_add(dot[u], load_elements(rows[u] + d * stride, stride, left), element);
}

// s (rows, N) of n keys: LANES of them at once, D in lanes, then summed over lanes. Keys from n on get -inf.
template <class T>
void scores(const T* const* k, int n, int64_t stride, int D, int rows, const int32_t* q, float* s) {
  constexpr int STEP = LANES * Element<T>::DEPTH;
  const int q_row = round_up(depth_of<T>(D), LANES), dense = stride == 1 ? D / STEP * STEP : 0;
  for (int i = 0; i < n; i += LANES) {
    const T* at[LANES];
    for (int u = 0; u < LANES; ++u) at[u] = k[smaller(i + u, n - 1)];
    for (int l = 0; l < rows; ++l) {
      Vec dot[LANES];
#pragma GCC unroll 16
      for (int u = 0; u < LANES; ++u) dot[u] = Vec{};
      int d = 0;
      for (; d < dense; d += STEP) add_products(dot, at, d, 1, STEP, q + l * q_row);
      for (; d < D; d += STEP) add_products(dot, at, d, stride, D - d, q + l * q_row);
      const Vec x = sums_over_lanes(dot);
      store(s + l * BLOCK_N + i, i + LANES <= n ? x : select(first_lanes(n - i), x, broadcast(-__builtin_inff())));
    }
  }
}

// As online_softmax of attention_forward.cpp, row by row. `kept`: factors of dropout, or nullptr.
template <class T>
void softmax(int rows, int n, float factor, const float* s, const float* kept, int32_t* p, Sums& sums, float* rescale) {
  constexpr bool COARSE = std::is_same_v<T, bf16>;
  constexpr int DEPTH = Element<T>::DEPTH;
  const float nothing = -__builtin_inff();
  for (int l = 0; l < rows; ++l, s += BLOCK_N, p += BLOCK_N / DEPTH) {
    Vec top = load(s);
    for (int i = LANES; i < n; i += LANES) top = max(top, load(s + i));
    const Vec now = max(broadcast(sums.max[l]), broadcast(reduce_max(top))), f = broadcast(factor * LOG2_E);
    const Vec offset = select(now == broadcast(nothing), Vec{}, now);
    const Vec scale = exp2_softmax<false>((broadcast(sums.max[l]) - offset) * f);
    sums.max[l] = now[0];
    rescale[l] = scale[0];
    Vec sum{};
    for (int i = 0; i < n; i += LANES) {
      const Vec e = exp2_softmax<COARSE>((load(s + i) - offset) * f);
      sum += e;
      const Vec weight = kept == nullptr ? e : e * load(kept + l * BLOCK_N + i);
      if constexpr (DEPTH == 2)
        store((bf16*)p + i, weight);
      else
        store((float*)p + i, weight);
    }
    sums.sum[l] = sums.sum[l] * scale[0] + reduce_sum(sum);
  }
}

// o (rows, ld) = rescale · o + p v
template <class E>
void values(int rows, int n, int ld, const int32_t* p, const char* v, int64_t v_row, const float* rescale, float* o) {
  for (int l = 0; l < rows; ++l)
    for (int d = 0; d < ld; d += LANES) store(o + l * ld + d, load(o + l * ld + d) * broadcast(rescale[l]));
  const Operand weights{(const char*)p, BLOCK_N / E::DEPTH * 4, 4};
  product<E>(rows, (n + E::DEPTH - 1) / E::DEPTH, ld, weights, v, v_row, o, ld, Start::add);
}

// from (rows, N) <-> to (N, width)
void to_columns(const float* from, int rows, int n, int width, float* to) {
  for (int l = 0; l < rows; ++l)
    for (int i = 0; i < n; ++i) to[i * width + l] = from[l * BLOCK_N + i];
}
void to_rows(const float* from, int rows, int n, int width, float* to) {
  for (int l = 0; l < rows; ++l)
    for (int i = 0; i < n; ++i) to[l * BLOCK_N + i] = from[i * width + l];
}

// So many bytes of k and v are in no cache; what is, comes sooner than it can be asked for.
constexpr int64_t UNCACHED = int64_t(16) << 20;

// Asks for rows that are read soon
template <class T>
void prefetch(const T* row, int64_t stride, int n, int D) {
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += int(64 / sizeof(T))) __builtin_prefetch(row + i * stride + d, 0, 2);
}

template <class T>
void finish(const AttentionParams& p, const Tile& t, int b, const Sums& sums, int ld, float* inverse) {
  const T* rows[BLOCK_M];
  t.addresses(p.o, b, p.sequences.data()[b].first_q, rows);
  for (int j = 0; j * LANES < t.n; ++j) store(inverse + j * LANES, finish_rows(p, t, b, sums, j));
  for (int l = 0; l < t.n; ++l)
    for (int d = 0; d < p.D_v; d += LANES) {
      const Vec o = load(sums.o + l * ld + d) * broadcast(inverse[l]);
      store_strided((T*)rows[l] + d * p.o.col, p.o.col, o, smaller(LANES, p.D_v - d));
    }
}

}  // namespace

template <class T>
void run_few(const AttentionParams& p, const ForwardTask& task, ForwardWorkspace<T>& w, float* parts) {
  using E = Element<T>;
  const Sequence& sequence = p.sequences.data()[task.b];
  const Window window = Window::of(p, sequence);
  const Score score(p);
  const Tile t = Tile::of({p.G(), sequence.S_q}, task.h_kv, task.first_tile);
  const int D_v = round_up(p.D_v, 16);
  Sums& sums = w.sums[0];
  const T* q_rows[BLOCK_M];
  t.addresses(p.q, task.b, sequence.first_q, q_rows);
  pack_rows(q_rows, t.n, p.q.col, p.D, round_up(depth_of<T>(p.D), LANES), sums.q);
  begin(sums, t.width, t.n * D_v);
  if (p.dropout) memset(w.few_kept, 0, sizeof(float) * FEW_ROWS * BLOCK_N);  // lanes without a key

  const T* k_base = (const T*)p.k.data + task.b * p.k.b + task.h_kv * p.k.h + sequence.first_k * p.k.row;
  const T* v_base = (const T*)p.v.data + task.b * p.v.b + task.h_kv * p.v.h + sequence.first_k * p.v.row;
  const bool in_place = std::is_same_v<T, float> && p.v.col == 1 && p.v.row >= 0 && p.D_v % 16 == 0;
  const int64_t keys = p.packed ? p.rows_k : p.B * p.rows_k;
  const bool uncached = keys * p.H_kv * (p.D + p.D_v) * int64_t(sizeof(T)) > UNCACHED;
  const int end = smaller(window.end(t), task.n_hi);
  for (int n_0 = larger(window.first(t), task.n_lo) / BLOCK_N * BLOCK_N; n_0 < end; n_0 += BLOCK_N) {
    // An odd key that the last pair of elements has room for is looked at too, and hidden.
    const int most = smaller(BLOCK_N, sequence.S_k - n_0);
    const int n = smaller(round_up(smaller(BLOCK_N, end - n_0), E::DEPTH), most);
    const Seen what = seen(p, window, t, task.b, n_0, n_0 + n);
    if (what == Seen::nothing) continue;
    const T *k_rows[BLOCK_N], *v_rows[BLOCK_N];
    for (int i = 0; i < n; ++i) {
      k_rows[i] = k_base + (n_0 + i) * p.k.row;
      v_rows[i] = v_base + (n_0 + i) * p.v.row;
    }
    const int next = uncached ? smaller(BLOCK_N, end - n_0 - BLOCK_N) : 0;
    prefetch(k_rows[0] + BLOCK_N * p.k.row, p.k.row, next, p.D);
    prefetch(v_rows[0] + BLOCK_N * p.v.row, p.v.row, next, p.D_v);

    scores<T>(k_rows, n, p.k.col, p.D, t.n, sums.q, w.few_s);
    if (score.prescaled || what == Seen::part) {
      to_columns(w.few_s, t.n, n, t.width, w.s);
      apply_score(p, sequence, score, t, task.b, n_0, n, w.s, nullptr, w.entries);
      if (what == Seen::part) {
        visible(p, window, t, task.b, n_0, n, w.keep);
        hide(w.keep, n * t.width, w.s);
      }
      to_rows(w.s, t.n, n, t.width, w.few_s);
    }
    if (p.dropout) {
      dropout_factors(p, t, task.b, n_0, n, w.entries);
      to_rows(w.entries, t.n, n, t.width, w.few_kept);
    }
    softmax<T>(t.n, n, score.factor, w.few_s, p.dropout ? w.few_kept : nullptr, w.p, sums, w.rescale);

    const bool finite = what == Seen::all || all_finite(v_rows, n, p.v.col, p.D_v);
    const char* v = (const char*)w.v;
    int64_t v_row = D_v;
    if (finite && in_place)
      v = (const char*)v_rows[0], v_row = p.v.row;
    else if (finite)
      pack_stacked<T, false>(v_rows, n, p.v.col, p.D_v, D_v, w.v);
    else
      pack_stacked<T, true>(v_rows, n, p.v.col, p.D_v, D_v, w.v);
    values<E>(t.n, n, D_v, w.p, v, v_row, w.rescale, sums.o);
    if (!finite)
      for_non_finite(v_rows, n, p.v.col, p.D_v, t, w.keep, [&](int l, int i, int d, float x) {
        sums.o[l * D_v + d] += weight_of<T>(w.p + l * (BLOCK_N / E::DEPTH) + i / E::DEPTH, i) * x;
      });
  }
  if (task.part < 0) return finish<T>(p, t, task.b, sums, D_v, w.rescale);
  float* part = parts + task.part * part_size(p);
  memcpy(part, sums.max, sizeof(float) * BLOCK_M);
  memcpy(part + BLOCK_M, sums.sum, sizeof(float) * BLOCK_M);
  memset(part + 2 * BLOCK_M, 0, sizeof(float) * p.D_v * t.width);
  for (int l = 0; l < t.n; ++l)
    for (int d = 0; d < p.D_v; ++d) part[2 * BLOCK_M + d * t.width + l] = sums.o[l * D_v + d];
}

template void run_few(const AttentionParams&, const ForwardTask&, ForwardWorkspace<float>&, float*);
template void run_few(const AttentionParams&, const ForwardTask&, ForwardWorkspace<bf16>&, float*);
template void run_few(const AttentionParams&, const ForwardTask&, ForwardWorkspace<fp16>&, float*);

}  // namespace fastattn::FASTATTN_ISA
