// The gradient of an additive bias, summed over the dimensions that it was broadcast over:
//
//   dbias[b', h', m', n'] = Σ ds over the (b, h, i, j) that read this entry
//
// A task owns a tile of the bias and visits, in order, the tiles of scores that share it, or one part of them; nothing
// is added atomically, and no S_q × S_k matrix is held unless the bias is one.
#include "attention_gradient_tile.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int FEW_TASKS = 256;  // a bias of fewer tiles is cut into parts

template <class T>
struct Workspace {
  GradientTile tile;
  int32_t *k, *v, *q, *d_o;
  float* sum;  // (N, M)

  size_t lay_out(const AttentionParams& p, char* begin) {
    Memory memory(begin);
    tile.lay_out(memory);
    memory.take(k, BLOCK_N * depth_of<T>(p.D));
    memory.take(v, BLOCK_N * depth_of<T>(p.D_v));
    memory.take(q, BLOCK_M * depth_of<T>(p.D));
    memory.take(d_o, BLOCK_M * depth_of<T>(p.D_v));
    memory.take(sum, BLOCK_N * BLOCK_M);
    return memory.used();
  }
};

// How the tiles of a bias and the scores that share each of them are counted
struct Shares {
  int64_t sizes[4], tiles_m, tiles_n, tiles;   // of the bias
  int64_t over_b, over_h, over_m, over_n, all;  // of the scores
  int parts;

  Shares(const AttentionParams& p, const AttentionGradients& g) {
    int64_t S_q = 0, S_k = 0;
    for (int b = 0; b < p.B; ++b) {
      S_q = larger(S_q, int64_t(p.sequences.data()[b].S_q));
      S_k = larger(S_k, int64_t(p.sequences.data()[b].S_k));
    }
    for (int i = 0; i < 4; ++i) sizes[i] = g.dbias_sizes[i];
    tiles_m = (sizes[2] + BLOCK_M - 1) / BLOCK_M;
    tiles_n = (sizes[3] + BLOCK_N - 1) / BLOCK_N;
    tiles = sizes[0] * sizes[1] * tiles_m * tiles_n;
    over_b = sizes[0] == 1 ? p.B : 1;
    over_h = sizes[1] == 1 ? p.H : 1;
    over_m = sizes[2] == 1 ? (S_q + BLOCK_M - 1) / BLOCK_M : 1;
    over_n = sizes[3] == 1 ? (S_k + BLOCK_N - 1) / BLOCK_N : 1;
    all = over_b * over_h * over_m * over_n;
    parts = (int)larger(int64_t(1), smaller(all, FEW_TASKS / larger(tiles, int64_t(1))));
  }
  int64_t entries() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

template <class T>
void run(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums, const Shares& shares,
         int64_t bias_tile, int part, float* to, Workspace<T>& w) {
  const int64_t n_own = bias_tile % shares.tiles_n, m_own = bias_tile / shares.tiles_n % shares.tiles_m;
  const int64_t matrix = bias_tile / (shares.tiles_n * shares.tiles_m);
  const int64_t h_own = matrix % shares.sizes[1], b_own = matrix / shares.sizes[1];
  const Score score(p);
  memset(w.sum, 0, sizeof(float) * BLOCK_N * BLOCK_M);
  const int64_t last = shares.all * (part + 1) / shares.parts;
  for (int64_t step = shares.all * part / shares.parts; step < last; ++step) {
    const int n_0 = int(n_own + step % shares.over_n) * BLOCK_N;
    int64_t outer = step / shares.over_n;
    const int m_0 = int(m_own + outer % shares.over_m) * BLOCK_M;
    outer /= shares.over_m;
    const int h = int(h_own + outer % shares.over_h), b = int(b_own + outer / shares.over_h);
    const Sequence& sequence = p.sequences.data()[b];
    if (m_0 >= sequence.S_q) continue;
    const Tile t = Tile::of_head(sequence.S_q, h, m_0);
    const Window window = Window::of(p, sequence);
    const int n = smaller(BLOCK_N, window.end(t) - n_0);
    if (n <= 0 || n_0 + n <= window.first(t)) continue;
    const Seen what = seen(p, window, t, b, n_0, n_0 + n);
    if (what == Seen::nothing) continue;

    const T *q_rows[BLOCK_M], *do_rows[BLOCK_M], *k_rows[BLOCK_N], *v_rows[BLOCK_N];
    t.addresses(p.q, b, sequence.first_q, q_rows);
    t.addresses(g.d_o, b, sequence.first_q, do_rows);
    for (int i = 0; i < n; ++i) {
      const int64_t row = sequence.first_k + n_0 + i;
      k_rows[i] = (const T*)p.k.data + b * p.k.b + h / p.G() * p.k.h + row * p.k.row;
      v_rows[i] = (const T*)p.v.data + b * p.v.b + h / p.G() * p.v.h + row * p.v.row;
    }
    pack_columns(q_rows, t.n, p.q.col, p.D, t.width, w.q);
    pack_columns(do_rows, t.n, g.d_o.col, p.D_v, t.width, w.d_o);
    const Operand k = rows_in_place<T>(p.k, p.D, k_rows, n, w.k);
    const Operand v = rows_in_place<T>(p.v, p.D_v, v_rows, n, w.v);
    w.tile.load_rows(p, sums, t, b);
    w.tile.template compute<T>(p, sequence, window, score, t, b, n_0, n, what, k, v, w.q, w.d_o, false, false);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < t.width; j += LANES) {
        float* at = w.sum + i * BLOCK_M + j;
        store(at, load(at) + load(w.tile.dp + i * t.width + j));
      }
  }

  // One number for a row or a column that broadcasts; (part, b', h', m', n') is contiguous.
  const bool one_m = shares.sizes[2] == 1, one_n = shares.sizes[3] == 1;
  if (one_m)
    for (int i = 0; i < BLOCK_N; ++i)
      for (int l = 1; l < BLOCK_M; ++l) w.sum[i * BLOCK_M] += w.sum[i * BLOCK_M + l];
  if (one_n)
    for (int i = 1; i < BLOCK_N; ++i)
      for (int l = 0; l < (one_m ? 1 : BLOCK_M); ++l) w.sum[l] += w.sum[i * BLOCK_M + l];
  to += matrix * shares.sizes[2] * shares.sizes[3];
  const int rows = (int)smaller(int64_t(BLOCK_M), shares.sizes[2] - m_own * BLOCK_M);
  const int keys = (int)smaller(int64_t(BLOCK_N), shares.sizes[3] - n_own * BLOCK_N);
  for (int l = 0; l < rows; ++l)
    for (int i = 0; i < keys; ++i)
      to[(m_own * BLOCK_M + l) * shares.sizes[3] + n_own * BLOCK_N + i] = w.sum[i * BLOCK_M + l];
}

template <class T>
void run_all(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums, int threads) {
  const Shares shares(p, g);
  Workspace<T> counting;
  const size_t bytes = counting.lay_out(p, nullptr);
  const int64_t entries = shares.entries();
  const Scratch memory(bytes * threads), parts(shares.parts == 1 ? 0 : shares.parts * entries * sizeof(float));
  parallel_for(threads, shares.tiles * shares.parts, [&](int64_t i, int thread) {
    Workspace<T> w;
    w.lay_out(p, memory.data() + bytes * thread);
    const int part = int(i % shares.parts);
    float* to = shares.parts == 1 ? g.dbias : (float*)parts.data() + part * entries;
    run<T>(p, g, sums, shares, i / shares.parts, part, to, w);
  });
  if (shares.parts == 1) return;
  for (int64_t i = 0; i < entries; ++i) {
    float sum = 0.f;
    for (int part = 0; part < shares.parts; ++part) sum += ((const float*)parts.data())[part * entries + i];
    g.dbias[i] = sum;
  }
}

}  // namespace

void run_bias_gradient(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums, int threads) {
  switch (p.dtype) {
    case DType::float32: return run_all<float>(p, g, sums, threads);
    case DType::bfloat16: return run_all<bf16>(p, g, sums, threads);
    case DType::float16: return run_all<fp16>(p, g, sums, threads);
  }
}

}  // namespace fastattn::FASTATTN_ISA
