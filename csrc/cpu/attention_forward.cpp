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

// One more block of n logits s: p = exp2(factor · s - max), multiplied by the factors of dropout, and by how much what
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
    const Vec now = max(before, max(max(top[0], top[1]), max(top[2], top[3])) * broadcast(factor));
    const Vec offset = select(now == nothing, Vec{}, now), scale = exp2_softmax<false>(before - offset);
    store(sums.max + j * LANES, now);
    store(rescale + j * LANES, scale);

    const Vec f = broadcast(factor);
    const auto weight = [&](int key) { return exp2_softmax<COARSE>(fma(load(column + key * t.width), f, -offset)); };
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

template <class T>
void run(const AttentionParams& p, const ForwardTask& task, ForwardWorkspace<T>& w, float* parts) {
  using E = Element<T>;
  const Sequence& sequence = p.sequences.data()[task.b];
  const RowLayout layout{p.G(), sequence.S_q};
  const Window window = Window::of(p, sequence);
  const Score score(p);
  const int D = depth_of<T>(p.D), D_v = round_up(p.D_v, 16);
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

  const T* k_base = (const T*)p.k.data + task.b * p.k.b + task.h_kv * p.k.h + sequence.first_k * p.k.row;
  const T* v_base = (const T*)p.v.data + task.b * p.v.b + task.h_kv * p.v.h + sequence.first_k * p.v.row;
  for (int n_0 = lo / BLOCK_N * BLOCK_N; n_0 < hi; n_0 += BLOCK_N) {
    const int most = smaller(BLOCK_N, sequence.S_k - n_0);
    const T *k_rows[BLOCK_N], *v_rows[BLOCK_N];
    for (int i = 0; i < most; ++i) {
      k_rows[i] = k_base + (n_0 + i) * p.k.row;
      v_rows[i] = v_base + (n_0 + i) * p.v.row;
    }
    bool packed = false, checked = false, finite = true;
    Operand k{(const char*)w.k, D * 4, 4}, v{(const char*)w.v, 4, D_v * 4};
    for (int i = 0; i < task.n_tiles; ++i) {
      const Tile& t = tiles[i];
      Sums& sums = w.sums[i];
      // An odd key that the last pair of elements has room for is looked at too, and hidden.
      const int n = smaller(round_up(smaller(BLOCK_N, end[i] - n_0), E::DEPTH), most);
      if (n <= 0 || n_0 + n <= first[i]) continue;
      const Seen what = seen(p, window, t, task.b, n_0, n_0 + n);
      if (what == Seen::nothing) continue;
      if (!packed) {
        packed = true;
        k = rows_in_place<T>(p.k, p.D, k_rows, most, w.k);
        if (E::DEPTH == 1 && in_place<T>(p.v, p.D_v))
          v = {(const char*)v_rows[0], 4, int64_t(p.v.row * sizeof(T))};
        else
          pack_stacked<T, false>(v_rows, most, p.v.col, p.D_v, D_v, w.v);
      }
      product<E>(n, D, t.width, k, sums.q, t.width, w.s, t.width, Start::zero);
      apply_score(p, sequence, score, t, task.b, n_0, n, w.s, nullptr, w.entries);
      Operand values = v;
      if (what == Seen::part) {
        visible(p, window, t, task.b, n_0, n, w.keep);
        hide(w.keep, n * t.width, w.s);
        if (!checked) {
          checked = true;
          finite = all_finite(v_rows, most, p.v.col, p.D_v);
          if (!finite) pack_stacked<T, true>(v_rows, most, p.v.col, p.D_v, D_v, w.v_finite);
        }
        if (!finite) values = {(const char*)w.v_finite, 4, D_v * 4};
      }
      if (p.dropout) {
        dropout_factors(p, t, task.b, n_0, n, w.entries);
        online_softmax<T, true>(t, n, score.factor, w.s, w.entries, w.p, sums, w.rescale);
      } else {
        online_softmax<T, false>(t, n, score.factor, w.s, nullptr, w.p, sums, w.rescale);
      }
      const int depth = (n + E::DEPTH - 1) / E::DEPTH;
      product<E>(p.D_v, depth, t.width, values, w.p, t.width, sums.o, t.width, Start::rescale, w.rescale);
      if (what == Seen::part && !finite)
        for_non_finite(v_rows, n, p.v.col, p.D_v, t, w.keep, [&](int l, int i, int d, float x) {
          sums.o[d * t.width + l] += weight_of<T>(w.p + i / E::DEPTH * t.width + l, i) * x;
        });
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
  for (int j = 0; j < t.width; j += LANES) {
    const Vec nothing = broadcast(-__builtin_inff());
    Vec max = nothing, sum{};
    for (int i = 0; i < task.n_parts; ++i) max = FASTATTN_ISA::max(max, load(first + i * size + j));
    const Vec offset = select(max == nothing, Vec{}, max);
    for (int d = 0; d < p.D_v; ++d) store(sums.o + d * t.width + j, Vec{});
    for (int i = 0; i < task.n_parts; ++i) {
      const float* part = first + i * size;
      const Vec weight = exp2_softmax<false>(load(part + j) - offset);
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
    if (is_few({p.G(), p.sequences.data()[task.b].S_q}))
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

Vec finish_rows(const AttentionParams& p, const Tile& t, int b, const Sums& sums, int j) {
  const Vec nothing = broadcast(-__builtin_inff());
  Vec max = load(sums.max + j * LANES), sum = load(sums.sum + j * LANES), rescale = broadcast(1.f);
  if (!p.sinks.empty()) {
    Vec sink{};
    for (int l = 0; l < LANES; ++l) sink[l] = p.sinks.data()[t.head[j * LANES + l]] * LOG2_E;
    const Vec now = FASTATTN_ISA::max(max, sink), offset = select(now == nothing, Vec{}, now);
    rescale = exp2_softmax<false>(max - offset);
    sum = fma(sum, rescale, exp2_softmax<false>(sink - offset));
    max = now;
  }
  const Int empty = sum == Vec{};
  sum = select(empty, broadcast(1.f), sum);
  const Vec lse = select(empty, nothing, fma(max, broadcast(LN_2), log(sum)));
  for (int l = 0; l < smaller(LANES, t.n - j * LANES); ++l)
    p.lse[p.lse_index(b, t.head[j * LANES + l]) + t.row[j * LANES + l]] = lse[l];
  return rescale / sum;
}

void run_forward(const AttentionParams& p, const ForwardPlan& plan, int threads) {
  switch (p.dtype) {
    case DType::float32: return run_all<float>(p, plan, threads);
    case DType::bfloat16: return run_all<bf16>(p, plan, threads);
    case DType::float16: return run_all<fp16>(p, plan, threads);
  }
}

}  // namespace fastattn::FASTATTN_ISA
