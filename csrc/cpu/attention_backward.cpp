// Attention backward: a task holds a range of keys, visits the tiles of queries that see them, recomputes p from lse.
//
//   dqᵀ = scale · kᵀ daᵀ (D, M)      dk = scale · daᵀ q (N, D)      dv = dropout(p)ᵀ do (N, D_v)
//   dslope = -Σ ds ∘ distance        dsink = -Σ exp(sink - lse) delta
//
// with p and ds, da as in attention_gradient_tile.h. Keys are taken CHUNK at a time, whose dk and dv stay in the second
// cache. Every sum has one order, whatever the number of threads. Source: Dao, "FlashAttention-2" (2023), algorithm 2.
#include "attention_gradient_tile.h"
#include "parallel.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int CHUNK = 4 * BLOCK_N;  // keys

// A matrix as A or B of a product over its rows, and the same without inf and NaN, made when first asked for
template <class T>
struct Stacked {
  int32_t *as_is, *clean;
  int ld;
  bool checked, finite;

  void lay_out(Memory& memory, int rows, int width) {
    ld = width;
    memory.take(as_is, int64_t(rows) / Element<T>::DEPTH * ld);
    memory.take(clean, int64_t(rows) / Element<T>::DEPTH * ld);
  }
  void pack(const T* const* rows, int n, int64_t stride, int D) {
    checked = false;
    pack_stacked<T, false>(rows, n, stride, D, ld, as_is);
  }
  const int32_t* seen_in_part(const T* const* rows, int n, int64_t stride, int D) {
    if (!checked) {
      checked = true;
      finite = all_finite(rows, n, stride, D);
      if (!finite) pack_stacked<T, true>(rows, n, stride, D, ld, clean);
    }
    return finite ? as_is : clean;
  }
  // Rows n … end - 1 multiply a probability of 0
  void clear(int n, int end) {
    const int first = (n + Element<T>::DEPTH - 1) / Element<T>::DEPTH, last = end / Element<T>::DEPTH;
    for (int32_t* to : {as_is, clean}) memset(to + int64_t(first) * ld, 0, int64_t(last - first) * ld * 4);
  }
};

template <class T>
struct Workspace {
  GradientTile tile;
  int32_t *k, *v;            // (CHUNK, D / DEPTH), (CHUNK, D_v / DEPTH)
  int32_t *q, *d_o;          // (D / DEPTH, width), (D_v / DEPTH, width)
  Stacked<T> ks, qs, d_os;   // of CHUNK keys, and of M queries
  int32_t *p_rows, *ds_rows;  // (N, width / DEPTH): A of a product over queries
  int32_t* ds_columns;       // (N / DEPTH, width): B of a product over keys
  float *dk, *dv;            // (CHUNK, D), (CHUNK, D_v), rounded up to 16

  size_t lay_out(const AttentionParams& p, char* begin) {
    Memory memory(begin);
    const int D = round_up(p.D, 16), D_v = round_up(p.D_v, 16);
    tile.lay_out(memory);
    memory.take(k, CHUNK * depth_of<T>(p.D));
    memory.take(v, CHUNK * depth_of<T>(p.D_v));
    memory.take(q, BLOCK_M * depth_of<T>(p.D));
    memory.take(d_o, BLOCK_M * depth_of<T>(p.D_v));
    ks.lay_out(memory, CHUNK, D);
    qs.lay_out(memory, BLOCK_M, D);
    d_os.lay_out(memory, BLOCK_M, D_v);
    for (int32_t** element : {&p_rows, &ds_rows, &ds_columns}) memory.take(*element, BLOCK_N * BLOCK_M);
    memory.take(dk, CHUNK * D);
    memory.take(dv, CHUNK * D_v);
    return memory.used();
  }
};

#if defined(__AVX512BF16__)
// x (n, width) -> rows of pairs of neighbouring lanes, and pairs of neighbouring rows
void round_rows(const float* x, int n, int width, int32_t* rows) {
  for (int i = 0; i < n * width; i += LANES) store((bf16*)rows + i, load(x + i));
}
void round_columns(const float* x, int n, int width, int32_t* columns) {
  for (int i = 0; i < n; i += 2)
    for (int j = 0; j < width; j += LANES) {
      const Vec odd = i + 1 < n ? load(x + (i + 1) * width + j) : Vec{};
      *(UnalignedInt*)(columns + i / 2 * width + j) = pairs(load(x + i * width + j), odd);
    }
}
#endif

// dv += pᵀ do for the inf and NaN of do that a row of p sees, which the product left out. Rare.
template <class T>
void add_non_finite(const T* const* d_o, int64_t stride, int D_v, const Tile& t, int n, const float* p,
                    const int32_t* keep, float* dv, int ld) {
  for (int l = 0; l < t.n; ++l)
    for (int d = 0; d < D_v; ++d) {
      const float x = load_one(d_o[l] + d * stride);
      if (x - x == 0.f) continue;
      for (int i = 0; i < n; ++i)
        if (keep[i * t.width + l]) dv[int64_t(i) * ld + d] += p[i * t.width + l] * x;
    }
}

// ds (n, width) -> dbias (B, H, S_q, S_k), keys n_0 …
void write_bias_gradient(const AttentionParams& p, const Tile& t, int b, int n_0, int n, const float* ds, float* dbias) {
  for (int j = 0; j * LANES < t.n; ++j)
    for (int i = 0; i < n; i += LANES) {
      Int block[LANES];
#pragma GCC unroll 16
      for (int k = 0; k < LANES; ++k) block[k] = as_int(load(ds + smaller(i + k, n - 1) * t.width + j * LANES));
      transpose(block);
      for (int l = 0; l < smaller(LANES, t.n - j * LANES); ++l) {
        const int64_t row = (int64_t(b) * p.H + t.head[j * LANES + l]) * p.rows_q + t.row[j * LANES + l];
        store_strided(dbias + row * p.rows_k + n_0 + i, 1, as_float(block[l]), smaller(LANES, n - i));
      }
    }
}

template <class T>
void visit(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums, const BackwardTask& task,
           const Window& window, const Tile& t, int n_lo, int n_hi, const T* const* k_rows, Operand k, Operand v,
           float* dq, float* dslope, Workspace<T>& w) {
  using E = Element<T>;
  const Sequence& sequence = p.sequences.data()[task.b];
  const Score score(p);
  const int first = larger(window.first(t), n_lo), end = smaller(window.end(t), n_hi);
  bool packed = false;
  const T *q_rows[BLOCK_M], *do_rows[BLOCK_M];
  for (int n_0 = n_lo + (first - n_lo) / BLOCK_N * BLOCK_N; n_0 < end; n_0 += BLOCK_N) {
    const int n = smaller(round_up(smaller(BLOCK_N, end - n_0), E::DEPTH), sequence.S_k - n_0);
    const Seen what = seen(p, window, t, task.b, n_0, n_0 + n);
    if (what == Seen::nothing) continue;
    if (!packed) {
      packed = true;
      t.addresses(p.q, task.b, sequence.first_q, q_rows);
      t.addresses(g.d_o, task.b, sequence.first_q, do_rows);
      pack_columns(q_rows, t.n, p.q.col, p.D, t.width, w.q);
      pack_columns(do_rows, t.n, g.d_o.col, p.D_v, t.width, w.d_o);
      w.qs.pack(q_rows, t.n, p.q.col, p.D);
      w.d_os.pack(do_rows, t.n, g.d_o.col, p.D_v);
      w.qs.clear(t.n, t.width);
      w.d_os.clear(t.n, t.width);
      w.tile.load_rows(p, sums, t, task.b);
      memset(w.tile.dslope, 0, sizeof(float) * BLOCK_M);
    }
    w.tile.template compute<T>(p, sequence, window, score, t, task.b, n_0, n, what, k.from_row(n_0 - n_lo),
                      v.from_row(n_0 - n_lo), w.q, w.d_o, true, dslope != nullptr);

    if (g.dbias_is_ds) write_bias_gradient(p, t, task.b, n_0, n, w.tile.dp, g.dbias);

    const int32_t *ks = w.ks.as_is, *qs = w.qs.as_is, *d_os = w.d_os.as_is;
    if (what == Seen::part) {
      ks = w.ks.seen_in_part(k_rows, smaller(CHUNK, sequence.S_k - n_lo), p.k.col, p.D);
      qs = w.qs.seen_in_part(q_rows, t.n, p.q.col, p.D);
      d_os = w.d_os.seen_in_part(do_rows, t.n, g.d_o.col, p.D_v);
    }
    const char *p_rows = (const char*)w.tile.s, *ds_rows = (const char*)w.tile.dp;
    const void* ds_columns = w.tile.dp;
#if defined(__AVX512BF16__)
    if constexpr (E::DEPTH == 2) {
      round_rows(w.tile.s, n, t.width, w.p_rows);
      round_rows(w.tile.dp, n, t.width, w.ds_rows);
      round_columns(w.tile.dp, n, t.width, w.ds_columns);
      p_rows = (const char*)w.p_rows, ds_rows = (const char*)w.ds_rows, ds_columns = w.ds_columns;
    }
#endif
    const int queries = t.width / E::DEPTH, keys = (n + E::DEPTH - 1) / E::DEPTH, offset = n_0 - n_lo;
    if (g.dv.data != nullptr) {
      const int ld = w.d_os.ld;
      product<E>(n, queries, ld, {p_rows, queries * 4, 4}, d_os, ld, w.dv + offset * ld, ld, Start::add);
      if (what == Seen::part && !w.d_os.finite)
        add_non_finite(do_rows, g.d_o.col, p.D_v, t, n, w.tile.s, w.tile.keep, w.dv + offset * ld, ld);
    }
    if (g.dk.data != nullptr) {
      const int ld = w.qs.ld;
      product<E>(n, queries, ld, {ds_rows, queries * 4, 4}, qs, ld, w.dk + offset * ld, ld, Start::add);
    }
    if (g.dq.data != nullptr) {
      const int ld = w.ks.ld;
      product<E>(p.D, keys, t.width, {(const char*)(ks + offset / E::DEPTH * ld), 4, ld * 4}, ds_columns, t.width, dq,
                 t.width, Start::add);
    }
  }
  if (packed && dslope != nullptr)
    for (int l = 0; l < t.n; ++l) dslope[l] += w.tile.dslope[l];
}

// (n, D) with rows of ld floats -> rows of a gradient, multiplied by `factor`
template <class T>
void write_rows(const float* from, int ld, int n, int D, float factor, T* to, int64_t row, int64_t col) {
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D; d += LANES) {
      const Vec x = load(from + int64_t(i) * ld + d) * broadcast(factor);
      store_strided(to + i * row + d * col, col, x, smaller(LANES, D - d));
    }
}

template <class T>
void run(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan, const RowSums& sums,
         const BackwardTask& task, Workspace<T>& w) {
  const Sequence& sequence = p.sequences.data()[task.b];
  const RowLayout layout{p.G(), sequence.S_q};
  const Window window = Window::of(p, sequence);
  const int64_t all_tiles = plan.first_tile.data()[p.B * p.H_kv];
  const int64_t first_tile = task.key_group * all_tiles + plan.first_tile.data()[task.b * p.H_kv + task.h_kv];
  const int64_t dq_size = int64_t(p.D) * BLOCK_M;
  if (g.dq.data != nullptr)
    memset(sums.dq + (first_tile + task.t_lo) * dq_size, 0, sizeof(float) * dq_size * (task.t_hi - task.t_lo));
  if (sums.dslope != nullptr)
    memset(sums.dslope + (first_tile + task.t_lo) * BLOCK_M, 0, sizeof(float) * BLOCK_M * (task.t_hi - task.t_lo));

  const T* k_base = (const T*)p.k.data + task.b * p.k.b + task.h_kv * p.k.h + sequence.first_k * p.k.row;
  const T* v_base = (const T*)p.v.data + task.b * p.v.b + task.h_kv * p.v.h + sequence.first_k * p.v.row;
  for (int n_lo = task.n_lo; n_lo < task.n_hi; n_lo += CHUNK) {
    const int n_hi = smaller(n_lo + CHUNK, task.n_hi), n = n_hi - n_lo, most = smaller(CHUNK, sequence.S_k - n_lo);
    const T *k_rows[CHUNK], *v_rows[CHUNK];
    for (int i = 0; i < most; ++i) {
      k_rows[i] = k_base + (n_lo + i) * p.k.row;
      v_rows[i] = v_base + (n_lo + i) * p.v.row;
    }
    const Operand k = rows_in_place<T>(p.k, p.D, k_rows, most, w.k);
    const Operand v = rows_in_place<T>(p.v, p.D_v, v_rows, most, w.v);
    w.ks.pack(k_rows, most, p.k.col, p.D);
    memset(w.dk, 0, sizeof(float) * most * w.qs.ld);
    memset(w.dv, 0, sizeof(float) * most * w.d_os.ld);
    for (int tile = task.t_lo; tile < task.t_hi; ++tile) {
      const Tile t = Tile::of(layout, task.h_kv, tile);
      float* dslope = sums.dslope == nullptr ? nullptr : sums.dslope + (first_tile + tile) * BLOCK_M;
      visit<T>(p, g, sums, task, window, t, n_lo, n_hi, k_rows, k, v, sums.dq + (first_tile + tile) * dq_size, dslope, w);
    }
    const auto finish = [&](const Matrix& x, float* parts, const float* from, int ld, int width, float factor) {
      if (x.data == nullptr) return;
      if (parts == nullptr) {
        T* to = (T*)x.data + task.b * x.b + task.h_kv * x.h + (sequence.first_k + n_lo) * x.row;
        return write_rows(from, ld, n, width, factor, to, x.row, x.col);
      }
      const int64_t heads = (p.packed ? 1 : p.B) * int64_t(p.H_kv);
      const int64_t head = (p.packed ? 0 : task.b) * int64_t(p.H_kv) + task.h_kv;
      const int64_t row = (task.tile_group * heads + head) * p.rows_k + sequence.first_k + n_lo;
      write_rows(from, ld, n, width, 1.f, parts + row * width, width, 1);
    };
    finish(g.dk, sums.dk, w.dk, w.qs.ld, p.D, p.scale);
    finish(g.dv, sums.dv, w.dv, w.d_os.ld, p.D_v, 1.f);
  }
}

// delta, lse and lse_low of the rows of one head
template <class T>
void prepare(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums, int b, int h) {
  const Sequence& sequence = p.sequences.data()[b];
  for (int i = 0; i < sequence.S_q; ++i) {
    const int64_t row = sequence.first_q + i, at = p.lse_index(b, h) + i;
    const T* o = (const T*)p.o.data + b * p.o.b + h * p.o.h + row * p.o.row;
    const T* d_o = (const T*)g.d_o.data + b * g.d_o.b + h * g.d_o.h + row * g.d_o.row;
    Vec sum{};
    for (int d = 0; d < p.D_v; d += LANES) {
      const Vec x = load_some(o + d * p.o.col, p.o.col, p.D_v - d);
      sum = fma(x, load_some(d_o + d * g.d_o.col, g.d_o.col, p.D_v - d), sum);
    }
    const float dlse = g.dlse == nullptr ? 0.f : g.dlse[b * g.dlse_b + h * g.dlse_h + row * g.dlse_m];
    const bool empty = p.lse[at] == -__builtin_inff();
    sums.lse[at] = empty ? __builtin_inff() : p.lse[at];
    sums.lse_low[at] = p.lse_low[at];
    sums.delta[at] = empty ? 0.f : reduce_sum(sum) - dlse;
  }
}

// One tile of dq, from the sums of all groups of keys
template <class T>
void finish_dq(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan, const RowSums& sums,
               int head, int64_t index) {
  const int b = head / p.H_kv;
  const Sequence& sequence = p.sequences.data()[b];
  const int64_t* first_tile = plan.first_tile.data();
  const Tile t = Tile::of(RowLayout{p.G(), sequence.S_q}, head % p.H_kv, int(index - first_tile[head]));
  const int64_t size = int64_t(p.D) * BLOCK_M, group_size = first_tile[p.B * p.H_kv] * size;
  const T* rows[BLOCK_M];
  t.addresses(g.dq, b, sequence.first_q, rows);
  for (int j = 0; j < t.width; j += LANES)
    for (int d = 0; d < p.D; d += LANES) {
      Int block[LANES];
      for (int i = 0; i < LANES; ++i) {
        Vec x{};
        for (int group = 0; d + i < p.D && group < plan.key_groups.data()[b]; ++group)
          x += load(sums.dq + group * group_size + index * size + (d + i) * t.width + j);
        block[i] = as_int(x * broadcast(p.scale));
      }
      transpose(block);
      for (int l = 0; l < LANES && j + l < t.n; ++l)
        store_strided((T*)rows[j + l] + d * g.dq.col, g.dq.col, as_float(block[l]), smaller(LANES, p.D - d));
    }
}

// dk or dv of one key head, from the sums of all groups of tiles
template <class T>
void finish_keys(const AttentionParams& p, const BackwardPlan& plan, const Matrix& x, const float* parts, int width,
                 float factor, int head) {
  if (x.data == nullptr || parts == nullptr) return;
  const int b = head / p.H_kv, h = head % p.H_kv, groups = plan.tile_groups.data()[b];
  const Sequence& sequence = p.sequences.data()[b];
  const int64_t group_size = (p.packed ? 1 : p.B) * int64_t(p.H_kv) * p.rows_k * width;
  const float* from = parts + ((p.packed ? h : head) * p.rows_k + sequence.first_k) * width;
  for (int64_t i = 0; i < sequence.S_k; ++i) {
    T* to = (T*)x.data + b * x.b + h * x.h + (sequence.first_k + i) * x.row;
    for (int d = 0; d < width; d += LANES) {
      Vec sum{};
      const int n = smaller(LANES, width - d);
      for (int group = 0; group < groups; ++group) sum += load(from + group * group_size + i * width + d, n);
      store_strided(to + d * x.col, x.col, sum * broadcast(factor), n);
    }
  }
}

template <class T>
void run_all(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan, const RowSums& sums,
             int threads) {
  Workspace<T> counting;
  const size_t bytes = counting.lay_out(p, nullptr);
  const Scratch memory(bytes * threads);
  const int heads = p.B * p.H_kv;
  const int64_t* first_tile = plan.first_tile.data();
  parallel_for(threads, int64_t(p.B) * p.H,
               [&](int64_t head, int) { prepare<T>(p, g, sums, int(head / p.H), int(head % p.H)); });
  parallel_for(threads, plan.tasks.size(), [&](int64_t i, int thread) {
    Workspace<T> w;
    w.lay_out(p, memory.data() + bytes * thread);
    run<T>(p, g, plan, sums, plan.tasks.data()[i], w);
  });
  if (g.dq.data != nullptr)
    parallel_ranges(threads, first_tile[heads], 8, [&](int64_t first, int64_t last, int) {
      int head = 0;  // the last one that begins at or before `first`
      for (int above = heads; above - head > 1;) {
        const int middle = (head + above) / 2;
        (first_tile[middle] <= first ? head : above) = middle;
      }
      for (int64_t tile = first; tile < last; ++tile) {
        while (first_tile[head + 1] <= tile) ++head;
        finish_dq<T>(p, g, plan, sums, head, tile);
      }
    });
  parallel_for(threads, heads, [&](int64_t head, int) {
    finish_keys<T>(p, plan, g.dk, sums.dk, p.D, p.scale, int(head));
    finish_keys<T>(p, plan, g.dv, sums.dv, p.D_v, 1.f, int(head));
  });
}

}  // namespace

void run_backward(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan, const RowSums& sums,
                  int threads) {
  switch (p.dtype) {
    case DType::float32: return run_all<float>(p, g, plan, sums, threads);
    case DType::bfloat16: return run_all<bf16>(p, g, plan, sums, threads);
    case DType::float16: return run_all<fp16>(p, g, plan, sums, threads);
  }
}

}  // namespace fastattn::FASTATTN_ISA
