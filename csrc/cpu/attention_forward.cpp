// Attention forward on tiles that lie transposed, queries in lanes:
//
//   sᵀ = k qᵀ (N, M);   p = exp(f(s) - max);   oᵀ = vᵀ pᵀ / sum (D_v, M);   lse = max + log sum
//
// The softmax is vertical, and what rescales oᵀ goes into the load of its accumulators. A task holds a few tiles of
// queries and visits the blocks of keys that they see once, in order. Source: Dao, "FlashAttention-2" (2023).
#include "attention_tile.h"
#include "parallel.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int MOST_TILES = 4;
constexpr int FEW_ROWS = 8;  // so few queries, as when a token is decoded, would leave most lanes without work

// What is kept of a tile from block to block
struct Sums {
  float* max;   // (M,) of the logits, in base 2
  float* sum;   // (M,) of exp2(logit - max)
  float* o;     // (D_v, width), not yet divided by sum
  int32_t* q;   // (D / DEPTH, width)
};

// Memory of one thread
template <class T>
struct Workspace {
  static constexpr int DEPTH = Element<T>::DEPTH;
  Sums sums[MOST_TILES];
  int32_t *k, *v, *v_finite;  // (N, D / DEPTH), (N / DEPTH, D_v), the same without inf and NaN
  float* s;                   // (N, M)
  int32_t* p;                 // (N / DEPTH, M)
  int32_t* keep;              // (N, M)
  float* entries;             // (N, M)
  float* rescale;             // (M,)
  float* few_o;               // (FEW_ROWS, D_v)

  static size_t bytes(const AttentionParams& p, int tiles) {
    Workspace none{};
    return none.lay_out(p, tiles, nullptr);
  }
  size_t lay_out(const AttentionParams& params, int tiles, char* memory) {
    size_t used = 0;
    const auto take = [&](auto*& at, int64_t elements) {
      at = reinterpret_cast<std::remove_reference_t<decltype(at)>>(memory + used);
      used += (elements * 4 + 63) / 64 * 64;
    };
    const int D = depth_of<T>(params.D), D_v = round_up(params.D_v, 16);
    for (int i = 0; i < tiles; ++i) {
      take(sums[i].max, BLOCK_M);
      take(sums[i].sum, BLOCK_M);
      take(sums[i].o, D_v * BLOCK_M);
      take(sums[i].q, round_up(D, LANES) * BLOCK_M);
    }
    take(k, BLOCK_N * D);
    take(v, BLOCK_N / DEPTH * D_v);
    take(v_finite, BLOCK_N / DEPTH * D_v);
    take(s, BLOCK_N * BLOCK_M);
    take(p, BLOCK_N * BLOCK_M);
    take(keep, BLOCK_N * BLOCK_M);
    take(entries, BLOCK_N * BLOCK_M);
    take(rescale, BLOCK_M);
    take(few_o, FEW_ROWS * D_v);
    return used;
  }
};

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

void hide(const int32_t* keep, int size, float* s) {
  for (int i = 0; i < size; i += LANES)
    store(s + i, select(*(const UnalignedInt*)(keep + i), load(s + i), broadcast(-__builtin_inff())));
}

// What a product with v_finite left out: p v for the inf and NaN that a row sees. Rare.
template <class T>
void add_non_finite(const T* const* v, int64_t stride, int D_v, const Tile& t, int n, const int32_t* p,
                    const int32_t* keep, float* o, int o_lane, int o_d) {
  constexpr int DEPTH = Element<T>::DEPTH;
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D_v; ++d) {
      const float x = load_one(v[i] + d * stride);
      if (x - x == 0.f) continue;
      for (int l = 0; l < t.n; ++l) {
        if (!keep[i * t.width + l]) continue;
        const int32_t* element = p + i / DEPTH * t.width + l;
        const float weight = DEPTH == 2 ? load_one((const bf16*)element + i % 2) : load_one((const float*)element);
        o[l * o_lane + d * o_d] += weight * x;
      }
    }
}

// o and lse of one tile from its sums
template <class T>
void finish(const AttentionParams& p, const Tile& t, int b, const Sums& sums) {
  const Sequence& sequence = p.sequences.data()[b];
  const T* rows[BLOCK_M];
  t.addresses(p.o, b, sequence.first_q, rows);
  for (int j = 0; j < t.vectors(); ++j) {
    const int lanes = smaller(LANES, t.n - j * LANES);
    if (lanes <= 0) break;
    Vec max = load(sums.max + j * LANES), sum = load(sums.sum + j * LANES), rescale = broadcast(1.f);
    const Vec nothing = broadcast(-__builtin_inff());
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
    for (int l = 0; l < lanes; ++l)
      p.lse[p.lse_index(b, t.head[j * LANES + l]) + t.row[j * LANES + l]] = lse[l];
    const bool exact = std::is_same_v<T, float>;  // a reciprocal is off by less than any rounding to 16 bits
    const Vec inverse = rescale / sum;
    for (int d = 0; d < p.D_v; d += LANES) {
      Int block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        const Vec x = load(sums.o + (d + i) * t.width + j * LANES);
        block[i] = as_int(exact ? x * rescale / sum : x * inverse);
      }
      transpose(block);
      for (int l = 0; l < lanes; ++l)
        store_strided((T*)rows[j * LANES + l] + d * p.o.col, p.o.col, as_float(block[l]), smaller(LANES, p.D_v - d));
    }
  }
}

// Whether rows are read where they lie: floats whose rows are near each other, so that they do not share cache sets
template <class T>
bool in_place(const Matrix& x, int D) {
  if (x.col != 1) return false;
  if constexpr (Element<T>::DEPTH == 2) return D % 2 == 0 && x.row == D;
  return std::is_same_v<T, float> && x.row >= D && x.row <= 2 * D;
}

// The products of a tile of few rows, with D and D_v in lanes. q has rows of D / DEPTH elements, rounded up to LANES.
template <class T>
void few_scores(const Tile& t, const T* const* k, int n, int64_t stride, int D, const int32_t* q, float* s) {
  constexpr int STEP = LANES * Element<T>::DEPTH;
  const int q_row = round_up(depth_of<T>(D), LANES);
  for (int i = 0; i < n; i += 4) {
    const T* rows[4];
    for (int u = 0; u < 4; ++u) rows[u] = k[smaller(i + u, n - 1)];
    for (int l = 0; l < t.n; ++l) {
      Vec dot[4] = {};
      for (int d = 0; d < D; d += STEP) {
        const Int element = *(const UnalignedInt*)(q + l * q_row + d / Element<T>::DEPTH);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
          dot[u] = Element<T>::multiply_add(dot[u], load_elements(rows[u] + d * stride, stride, D - d), element);
      }
      float sums[4];
      reduce_four(dot, sums);
      for (int u = 0; u < smaller(4, n - i); ++u) s[(i + u) * t.width + l] = sums[u];
    }
  }
}
template <class E>
void few_values(const Tile& t, int depth, int ld, const int32_t* p, const char* v, int64_t v_row, const float* rescale,
                float* few_o) {
  for (int l = 0; l < t.n; ++l)
    for (int d = 0; d < ld; d += LANES) {
      float* at = few_o + l * ld + d;
      store(at, load(at) * broadcast(rescale[l]));
    }
  product<E>(t.n, depth, ld, {(const char*)p, 4, t.width * 4}, v, v_row, few_o, ld, Start::add);
}

// Asks for rows that are read soon
template <class T>
void prefetch(const T* row, int64_t stride, int n, int D) {
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += int(64 / sizeof(T))) __builtin_prefetch(row + i * stride + d, 0, 2);
}

template <class T>
void run(const AttentionParams& p, const ForwardTask& task, Workspace<T>& w, float* parts, size_t part_size) {
  using E = Element<T>;
  const Sequence& sequence = p.sequences.data()[task.b];
  const RowLayout layout{p.G(), sequence.S_q};
  const Window window = Window::of(p, sequence);
  const Score score(p);
  const int D = depth_of<T>(p.D), D_v = round_up(p.D_v, 16);
  const bool is_few = layout.G * layout.S_q <= FEW_ROWS;  // then there is one tile
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
    if (is_few)
      pack_rows(rows, t.n, p.q.col, p.D, round_up(D, LANES), w.sums[i].q);
    else
      pack_columns(rows, t.n, p.q.col, p.D, t.width, w.sums[i].q);
    for (int j = 0; j < t.vectors(); ++j) {
      store(w.sums[i].max + j * LANES, broadcast(-__builtin_inff()));
      store(w.sums[i].sum + j * LANES, Vec{});
    }
    memset(w.sums[i].o, 0, sizeof(float) * p.D_v * t.width);
  }
  if (is_few) memset(w.few_o, 0, sizeof(float) * FEW_ROWS * D_v);

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
        if (is_few) {
          const int next = smaller(BLOCK_N, hi - n_0 - BLOCK_N);
          prefetch(k_rows[0] + BLOCK_N * p.k.row, p.k.row, next, p.D);
          prefetch(v_rows[0] + BLOCK_N * p.v.row, p.v.row, next, p.D_v);
        } else if (in_place<T>(p.k, p.D))
          k = {(const char*)k_rows[0], int64_t(p.k.row * sizeof(T)), 4};
        else
          pack_rows(k_rows, most, p.k.col, p.D, D, w.k);
        if (E::DEPTH == 1 && in_place<T>(p.v, p.D_v) && (!is_few || p.D_v % 16 == 0))
          v = {(const char*)v_rows[0], 4, int64_t(p.v.row * sizeof(T))};
        else
          pack_stacked<T, false>(v_rows, most, p.v.col, p.D_v, D_v, w.v);
      }
      if (is_few)
        few_scores(t, k_rows, n, p.k.col, p.D, sums.q, w.s);
      else
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
      if (is_few)
        few_values<E>(t, depth, D_v, w.p, values.data, values.step_bytes / 4, w.rescale, w.few_o);
      else
        product<E>(p.D_v, depth, t.width, values, w.p, t.width, sums.o, t.width, Start::rescale, w.rescale);
      if (what == Seen::part && !finite) {
        float* o = is_few ? w.few_o : sums.o;
        add_non_finite(v_rows, p.v.col, p.D_v, t, n, w.p, w.keep, o, is_few ? D_v : 1, is_few ? 1 : t.width);
      }
    }
  }

  if (is_few)
    for (int d = 0; d < p.D_v; ++d)
      for (int l = 0; l < tiles[0].n; ++l) w.sums[0].o[d * tiles[0].width + l] = w.few_o[l * D_v + d];
  for (int i = 0; i < task.n_tiles; ++i) {
    if (task.part < 0) {
      finish<T>(p, tiles[i], task.b, w.sums[i]);
      continue;
    }
    float* part = parts + (task.part + i) * part_size;
    memcpy(part, w.sums[i].max, sizeof(float) * BLOCK_M);
    memcpy(part + BLOCK_M, w.sums[i].sum, sizeof(float) * BLOCK_M);
    memcpy(part + 2 * BLOCK_M, w.sums[i].o, sizeof(float) * p.D_v * tiles[i].width);
  }
}

// Sums over several ranges of keys, in order, made one
template <class T>
void combine(const AttentionParams& p, const CombineTask& task, Workspace<T>& w, const float* parts, size_t part_size) {
  const RowLayout layout{p.G(), p.sequences.data()[task.b].S_q};
  const Tile t = Tile::of(layout, task.h_kv, task.tile);
  Sums& sums = w.sums[0];
  const float* first = parts + task.first_part * part_size;
  for (int j = 0; j < t.width; j += LANES) {
    const Vec nothing = broadcast(-__builtin_inff());
    Vec max = nothing, sum{};
    for (int i = 0; i < task.n_parts; ++i) max = FASTATTN_ISA::max(max, load(first + i * part_size + j));
    const Vec offset = select(max == nothing, Vec{}, max);
    for (int d = 0; d < p.D_v; ++d) store(sums.o + d * t.width + j, Vec{});
    for (int i = 0; i < task.n_parts; ++i) {
      const float* part = first + i * part_size;
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
  const size_t bytes = Workspace<T>::bytes(p, plan.most_tiles);
  const size_t part_size = 2 * BLOCK_M + size_t(p.D_v) * BLOCK_M;
  const Scratch memory(bytes * threads), parts(plan.parts * part_size * sizeof(float));
  const auto with = [&](int thread) {
    Workspace<T> w;
    w.lay_out(p, plan.most_tiles, memory.data() + bytes * thread);
    return w;
  };
  parallel_for(threads, plan.tasks.size(), [&](int64_t i, int thread) {
    Workspace<T> w = with(thread);
    run<T>(p, plan.tasks.data()[i], w, (float*)parts.data(), part_size);
  });
  parallel_for(threads, plan.combine.size(), [&](int64_t i, int thread) {
    Workspace<T> w = with(thread);
    combine<T>(p, plan.combine.data()[i], w, (const float*)parts.data(), part_size);
  });
}

}  // namespace

void run_forward(const AttentionParams& p, const ForwardPlan& plan, int threads) {
  switch (p.dtype) {
    case DType::float32: return run_all<float>(p, plan, threads);
    case DType::bfloat16: return run_all<bf16>(p, plan, threads);
    case DType::float16: return run_all<fp16>(p, plan, threads);
  }
}

}  // namespace fastattn::FASTATTN_ISA
