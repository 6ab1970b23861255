// Attention forward on tiles that lie transposed, queries in lanes:
//
//   sᵀ = k qᵀ (N, M);   p = exp(f(s) - max);   oᵀ = vᵀ pᵀ / sum (D_v, M);   lse = max + log sum
//
// The softmax is vertical, and what rescales oᵀ goes into the load of its accumulators. A task holds a few tiles of
// queries and visits the blocks of keys that they see once, in order. Source: Dao, "FlashAttention-2" (2023).
#include "attention_forward.h"
#include "parallel.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// One more block of n scores s: p = exp((s - max) · factor), multiplied by the factors of dropout, and by how much what
// was summed before is to be rescaled. A row that has seen nothing keeps the maximum -inf, and subtracts 0.
template <class T, bool DROPOUT>
void online_softmax(const Tile& t, int n, float factor, const float* s, const float* dropout, int32_t* p, Sums& sums,
                    float* rescale) {
  constexpr bool COARSE = std::is_same_v<T, bf16>;
  const Vec nothing = broadcast(-__builtin_inff());
  for (int j = 0; j < t.vectors(); ++j) {
    const float* column = s + j * LANES;
    Vec top[4] = {nothing, nothing, nothing, nothing};
    int i = 0;
    for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) top[u] = max(top[u], load(column + (i + u) * t.width));
    for (; i < n; ++i) top[0] = max(top[0], load(column + i * t.width));
    const Vec before = load(sums.max + j * LANES);
    const Vec now = max(before, max(max(top[0], top[1]), max(top[2], top[3])));
    const Vec offset = select(now == nothing, Vec{}, now), f = broadcast(factor * LOG2_E);
    const Vec scale = exp2_softmax<false>((before - offset) * f);
    store(sums.max + j * LANES, now);
    store(rescale + j * LANES, scale);

    const auto weight = [&](int key) { return exp2_softmax<COARSE>((load(column + key * t.width) - offset) * f); };
    const auto kept = [&](Vec e, int key) {
      return DROPOUT ? e * load(dropout + key * t.width + j * LANES) : e;
    };
    Vec sum{}, sum_odd{};
    i = 0;
#if defined(__AVX512BF16__)
    if constexpr (Element<T>::DEPTH == 2) {
      for (; i + 2 <= n; i += 2) {
        const Vec even = weight(i), odd = weight(i + 1);
        sum += even;
        sum_odd += odd;
        *(UnalignedInt*)(p + i / 2 * t.width + j * LANES) = pairs(kept(even, i), kept(odd, i + 1));
      }
      if (i < n) {
        const Vec even = weight(i);
        sum += even;
        *(UnalignedInt*)(p + i / 2 * t.width + j * LANES) = pairs(kept(even, i), Vec{});
      }
    } else
#endif
    {
      for (; i + 2 <= n; i += 2) {
        const Vec even = weight(i), odd = weight(i + 1);
        sum += even;
        sum_odd += odd;
        store((float*)p + i * t.width + j * LANES, kept(even, i));
        store((float*)p + (i + 1) * t.width + j * LANES, kept(odd, i + 1));
      }
      if (i < n) {
        const Vec even = weight(i);
        sum += even;
        store((float*)p + i * t.width + j * LANES, kept(even, i));
      }
    }
    store(sums.sum + j * LANES, fma(load(sums.sum + j * LANES), scale, sum + sum_odd));
  }
}

// o and lse of one tile from its sums
template <class T>
void finish(const AttentionParams& p, const Tile& t, int b, const Sums& sums) {
  const T* rows[BLOCK_M];
  t.addresses(p.o, b, p.sequences.data()[b].first_q, rows);
  for (int j = 0; j * LANES < t.n; ++j) {
    const Vec inverse = finish_rows(p, t, b, sums, j);
    for (int d = 0; d < p.D_v; d += LANES) {
      Int block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) block[i] = as_int(load(sums.o + (d + i) * t.width + j * LANES) * inverse);
      transpose(block);
      for (int l = 0; l < smaller(LANES, t.n - j * LANES); ++l)
        store_strided((T*)rows[j * LANES + l] + d * p.o.col, p.o.col, as_float(block[l]), smaller(LANES, p.D_v - d));
    }
  }
}

// Keys n_0 … n_0 + n - 1 of a key head as operands of the two products, brought into order when a tile first sees them
template <class T>
class Block {
 public:
  Block(const AttentionParams& p, const ForwardTask& task, int n_0, ForwardWorkspace<T>& w)
      : p_(p), w_(w), n_(smaller(BLOCK_N, p.sequences.data()[task.b].S_k - n_0)) {
    const int64_t row = p.sequences.data()[task.b].first_k + n_0;
    const T* k = (const T*)p.k.data + task.b * p.k.b + task.h_kv * p.k.h + row * p.k.row;
    const T* v = (const T*)p.v.data + task.b * p.v.b + task.h_kv * p.v.h + row * p.v.row;
    for (int i = 0; i < n_; ++i) {
      k_rows_[i] = k + i * p.k.row;
      v_rows_[i] = v + i * p.v.row;
    }
  }

  int n() const { return n_; }
  const T* const* v_rows() const { return v_rows_; }

  // (N, D)
  Operand k() {
    load();
    return k_;
  }
  // vᵀ (D_v, N); `part`: without the inf and NaN that a probability of 0 would make NaN of, if there are any
  Operand v(bool part) {
    load();
    return part && !finite() ? packed_v(w_.v_finite) : v_;
  }
  bool finite() {
    if (!checked_) {
      checked_ = true;
      finite_ = all_finite(v_rows_, n_, p_.v.col, p_.D_v);
      if (!finite_) pack_stacked<T, true>(v_rows_, n_, p_.v.col, p_.D_v, round_up(p_.D_v, 16), w_.v_finite);
    }
    return finite_;
  }

 private:
  void load() {
    if (loaded_) return;
    loaded_ = true;
    k_ = rows_in_place<T>(p_.k, p_.D, k_rows_, n_, w_.k);
    if (Element<T>::DEPTH == 1 && in_place<T>(p_.v, p_.D_v)) {
      v_ = {(const char*)v_rows_[0], 4, int64_t(p_.v.row * sizeof(T))};
    } else {
      pack_stacked<T, false>(v_rows_, n_, p_.v.col, p_.D_v, round_up(p_.D_v, 16), w_.v);
      v_ = packed_v(w_.v);
    }
  }
  Operand packed_v(const int32_t* v) const { return {(const char*)v, 4, round_up(p_.D_v, 16) * 4}; }

  const AttentionParams& p_;
  ForwardWorkspace<T>& w_;
  int n_;
  bool loaded_ = false, checked_ = false, finite_ = true;
  const T *k_rows_[BLOCK_N], *v_rows_[BLOCK_N];
  Operand k_{}, v_{};
};

// One tile of queries against one block of keys, of which it sees n, all or in part
template <class T>
void visit(const AttentionParams& p, const ForwardTask& task, const Window& window, const Score& score, const Tile& t,
           int n_0, int n, Seen what, Block<T>& block, Sums& sums, ForwardWorkspace<T>& w) {
  using E = Element<T>;
  const bool part = what == Seen::part;
  product<E>(n, depth_of<T>(p.D), t.width, block.k(), sums.q, t.width, w.s, t.width, Start::zero);
  apply_score(p, p.sequences.data()[task.b], score, t, task.b, n_0, n, w.s, nullptr, w.entries);
  if (part) {
    visible(p, window, t, task.b, n_0, n, w.keep);
    hide(w.keep, n * t.width, w.s);
  }
  if (p.dropout) {
    dropout_factors(p, t, task.b, n_0, n, w.entries);
    online_softmax<T, true>(t, n, score.factor, w.s, w.entries, w.p, sums, w.rescale);
  } else {
    online_softmax<T, false>(t, n, score.factor, w.s, nullptr, w.p, sums, w.rescale);
  }
  product<E>(p.D_v, (n + E::DEPTH - 1) / E::DEPTH, t.width, block.v(part), w.p, t.width, sums.o, t.width,
             Start::rescale, w.rescale);
  if (part && !block.finite())
    for_non_finite(block.v_rows(), n, p.v.col, p.D_v, t, w.keep, [&](int l, int i, int d, float x) {
      sums.o[d * t.width + l] += weight_of<T>(w.p + i / E::DEPTH * t.width + l, i) * x;
    });
}

template <class T>
void run(const AttentionParams& p, const ForwardTask& task, ForwardWorkspace<T>& w, float* parts) {
  const Sequence& sequence = p.sequences.data()[task.b];
  const RowLayout layout{p.G(), sequence.S_q};
  const Window window = Window::of(p, sequence);
  const Score score(p);
  Tile tiles[MOST_TILES];
  int first[MOST_TILES], end[MOST_TILES], lo = task.n_hi, hi = task.n_lo;
  for (int i = 0; i < task.n_tiles; ++i) {
    const Tile& t = tiles[i] = Tile::of(layout, task.h_kv, task.first_tile + i);
    first[i] = larger(window.first(t), task.n_lo);
    end[i] = smaller(window.end(t), task.n_hi);
    lo = smaller(lo, first[i]);
    hi = larger(hi, end[i]);
    const T* rows[BLOCK_M];
    t.addresses(p.q, task.b, sequence.first_q, rows);
    pack_columns(rows, t.n, p.q.col, p.D, t.width, w.sums[i].q);
    begin(w.sums[i], t.width, p.D_v * t.width);
  }

  for (int n_0 = lo / BLOCK_N * BLOCK_N; n_0 < hi; n_0 += BLOCK_N) {
    Block<T> block(p, task, n_0, w);
    for (int i = 0; i < task.n_tiles; ++i) {
      // An odd key that the last pair of elements has room for is looked at too, and hidden.
      const int n = smaller(round_up(smaller(BLOCK_N, end[i] - n_0), Element<T>::DEPTH), block.n());
      if (n <= 0 || n_0 + n <= first[i]) continue;
      const Seen what = seen(p, window, tiles[i], task.b, n_0, n_0 + n);
      if (what != Seen::nothing) visit(p, task, window, score, tiles[i], n_0, n, what, block, w.sums[i], w);
    }
  }

  for (int i = 0; i < task.n_tiles; ++i) {
    if (task.part < 0) {
      finish<T>(p, tiles[i], task.b, w.sums[i]);
      continue;
    }
    float* part = parts + (task.part + i) * part_size(p);
    memcpy(part, w.sums[i].max, sizeof(float) * BLOCK_M);
    memcpy(part + BLOCK_M, w.sums[i].sum, sizeof(float) * BLOCK_M);
    memcpy(part + 2 * BLOCK_M, w.sums[i].o, sizeof(float) * p.D_v * tiles[i].width);
  }
}

// Sums over several ranges of keys, in order, made one
template <class T>
void combine(const AttentionParams& p, const CombineTask& task, ForwardWorkspace<T>& w, const float* parts) {
  const size_t size = part_size(p);
  const RowLayout layout{p.G(), p.sequences.data()[task.b].S_q};
  const Tile t = Tile::of(layout, task.h_kv, task.tile);
  Sums& sums = w.sums[0];
  const float* first = parts + task.first_part * size;
  const Vec factor = broadcast(Score(p).factor * LOG2_E);
  for (int j = 0; j < t.width; j += LANES) {
    const Vec nothing = broadcast(-__builtin_inff());
    Vec max = nothing, sum{};
    for (int i = 0; i < task.n_parts; ++i) max = FASTATTN_ISA::max(max, load(first + i * size + j));
    const Vec offset = select(max == nothing, Vec{}, max);
    for (int d = 0; d < p.D_v; ++d) store(sums.o + d * t.width + j, Vec{});
    for (int i = 0; i < task.n_parts; ++i) {
      const float* part = first + i * size;
      const Vec weight = exp2_softmax<false>((load(part + j) - offset) * factor);
      sum = fma(load(part + BLOCK_M + j), weight, sum);
      for (int d = 0; d < p.D_v; ++d) {
        float* at = sums.o + d * t.width + j;
        store(at, fma(load(part + 2 * BLOCK_M + d * t.width + j), weight, load(at)));
      }
    }
    store(sums.max + j, max);
    store(sums.sum + j, sum);
  }
  finish<T>(p, t, task.b, sums);
}

template <class T>
void run_all(const AttentionParams& p, const ForwardPlan& plan, int threads) {
  ForwardWorkspace<T> counting;
  const size_t bytes = counting.lay_out(p, plan.most_tiles, nullptr);
  const Scratch memory(bytes * threads), part_memory(plan.parts * part_size(p) * sizeof(float));
  float* parts = (float*)part_memory.data();
  const auto with = [&](int thread) {
    ForwardWorkspace<T> w;
    w.lay_out(p, plan.most_tiles, memory.data() + bytes * thread);
    return w;
  };
  parallel_for(threads, plan.tasks.size(), [&](int64_t i, int thread) {
    ForwardWorkspace<T> w = with(thread);
    const ForwardTask& task = plan.tasks.data()[i];
    if (p.few(p.sequences.data()[task.b]))
      run_few<T>(p, task, w, parts);
    else
      run<T>(p, task, w, parts);
  });
  parallel_for(threads, plan.combine.size(), [&](int64_t i, int thread) {
    ForwardWorkspace<T> w = with(thread);
    combine<T>(p, plan.combine.data()[i], w, parts);
  });
}

}  // namespace

// a + b - sum, where sum = a + b was rounded; source: Knuth, "The Art of Computer Programming", 4.2.2, theorem B
FASTATTN_INLINE Vec rounded_off(Vec a, Vec b, Vec sum) {
  const Vec second = sum - a;
  return (a - (sum - second)) + (b - second);
}

Vec finish_rows(const AttentionParams& p, const Tile& t, int b, const Sums& sums, int j) {
  const Vec nothing = broadcast(-__builtin_inff()), highest = load(sums.max + j * LANES) * broadcast(Score(p).factor);
  Vec max = highest, sum = load(sums.sum + j * LANES), rescale = broadcast(1.f);
  if (!p.sinks.empty()) {
    Vec sink{};
    for (int l = 0; l < LANES; ++l) sink[l] = p.sinks.data()[t.head[j * LANES + l]];
    max = FASTATTN_ISA::max(highest, sink);
    const Vec offset = select(max == nothing, Vec{}, max), log2_e = broadcast(LOG2_E);
    rescale = exp2_softmax<false>((highest - offset) * log2_e);
    sum = fma(sum, rescale, exp2_softmax<false>((sink - offset) * log2_e));
  }
  const Int empty = sum == Vec{};
  sum = select(empty, broadcast(1.f), sum);
  const Vec log_sum = log(sum), lse = select(empty, nothing, max + log_sum);
  const Vec low = select(empty, Vec{}, rounded_off(max, log_sum, lse));
  for (int l = 0; l < smaller(LANES, t.n - j * LANES); ++l) {
    const int64_t at = p.lse_index(b, t.head[j * LANES + l]) + t.row[j * LANES + l];
    p.lse[at] = lse[l];
    p.lse_low[at] = low[l];
  }
  return select(highest == nothing, Vec{}, rescale / sum);
}

void run_forward(const AttentionParams& p, const ForwardPlan& plan, int threads) {
  switch (p.dtype) {
    case DType::float32: return run_all<float>(p, plan, threads);
    case DType::bfloat16: return run_all<bf16>(p, plan, threads);
    case DType::float16: return run_all<fp16>(p, plan, threads);
  }
}

}  // namespace fastattn::FASTATTN_ISA
