// Cross entropy of logits with classes: the loss and its gradient in one pass over the logits; and from kept
// statistics.
//
//   s = softcap · tanh(x / softcap)   or x          log p_j = (s_j - max s) - log Σ exp(s_l - max s)
//   loss of a row = -Σ_j q_j log p_j + z_loss · lse²          lse = max s + log Σ exp(s_l - max s)
//   q_j = (1 - ε) w_t [j = t] + ε / N                         for a class t of N; ε only where w = 1
//   dx_j = (Σ q p_j - q_j + 2 z_loss lse p_j) · ds_j / dx_j   ds / dx = 1 - (s / softcap)²  or 1
//
// logits and dlogits (M, N); loss, row_max, row_sum (M,). The registers of a CTA, or of a cluster, hold the row between
// the pass for maximum and sum and the pass for the gradient, and shared memory what they cannot; a row to be ignored
// is not read. dlogits may be logits: an element is read for the last time by the thread that writes it, before it
// does, and the logit of the class comes with the reduction, from the thread that holds it. The arithmetic is fp32.
#include <rows/chunk.h>
#include <rows/class_of_row.h>
#include <rows/cross_entropy.h>
#include <rows/launch_rows.h>
#include <rows/place.h>
#include <rows/values.h>

namespace rows {

// What the gradient of a row needs beside its scores. With e = exp(s - max): p = e / sum.
struct RowGradient {
  ClassOfRow row;
  float max;
  float total, pull;  // of e: Σ q / sum, and 2 z_loss lse / sum
  float q_t, q_all;
  float factor;

  __device__ __forceinline__ RowGradient(
      const CrossEntropy& p, const ClassOfRow& row, float max, float log_sum, float sum)
      : row(row), max(max), total(((1.f - p.smoothing) * row.weight + p.smoothing) / sum),
        pull(2.f * p.z_loss * (max + log_sum) / sum), q_t((1.f - p.smoothing) * row.weight),
        q_all(p.smoothing / p.walk.N), factor(1.f + row.poison) {
    if (p.divisor) factor /= *p.divisor;
  }

  // dx of a pack whose scores are s.
  template <bool SOFTCAP, int E>
  __device__ __forceinline__ void of(float (&dx)[E], const float (&s)[E], int n0, float softcap) const {
    float exp_s[E];
#pragma unroll
    for (int i = 0; i < E; ++i) {
      exp_s[i] = exponential(s[i] - max);
      dx[i] = fmaf(total, exp_s[i], -q_all);
    }
    if (row.t >= n0 && row.t < n0 + E) {
#pragma unroll
      for (int i = 0; i < E; ++i)
        if (n0 + i == row.t) dx[i] = fmaf(total, exp_s[i], -(q_all + q_t));
    }
    // pull apart from total: where p is close to q the difference of those two is small
#pragma unroll
    for (int i = 0; i < E; ++i) dx[i] = fmaf(pull, exp_s[i], dx[i]) * factor;
    if constexpr (SOFTCAP) {
#pragma unroll
      for (int i = 0; i < E; ++i) dx[i] *= softcap_slope(s[i], softcap);
    }
    if (row.counts) return;
#pragma unroll
    for (int i = 0; i < E; ++i) dx[i] = 0.f;
  }
};

// Scores of a pack; -inf outside of the row.
template <bool SOFTCAP, bool WHOLE, class T, int E>
__device__ __forceinline__ void scores(float (&s)[E], const Pack<T, E>& x, int n0, int N, float softcap) {
  const Inside<E, WHOLE> inside(n0, N);
#pragma unroll
  for (int i = 0; i < E; ++i) {
    s[i] = x[i];
    if constexpr (SOFTCAP) s[i] = softcapped(s[i], softcap);
    if (!inside[i]) s[i] = -INF;
  }
}

// WHOLE: every pack is inside of its row or beyond it, and every matrix is aligned.
template <class T, bool SOFTCAP, bool WHOLE, class Planted = NoBugs>
__global__ void __launch_bounds__(WHOLE && !SOFTCAP ? LEAN_RESIDENT : RESIDENT, 1)
cross_entropy_forward_kernel(const __grid_constant__ CrossEntropy p) {
  constexpr int E = PACK<T>, PACKS = FORWARD_BYTES / 16;
  Team<Planted> team(p.walk);
  const int last = p.walk.chunks - 1;
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    const T* x_row = row_of<T>(p.logits, at);
    const int shift = WHOLE ? 0 : shift_of(p.walk, x_row);
    const int64_t target = at.exists ? load_target(p.target, p.target_64, offset(at, p.target_step)) : 0;
    const ClassOfRow row = ClassOfRow::of<T>(p, target, at.exists, p.walk.N);
    const int N = row.counts ? p.walk.N : 0, columns = at.exists ? p.walk.N : 0;  // to be read, and to be written
    Chunk<T, E, PACKS, Planted> x;
    const auto read = [&](int c) {
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
        x.pack[v] = load<T, E, Read::Coherent, WHOLE>(x_row, pack_begin<E, PACKS>(team, c, v, shift), N, p.logits.wide);
    };

    // Pass 1: maximum, sum, and the score of the class
    ExpSum scan = ExpSum::none();
    for (int c = 0; c <= last; ++c) {
      read(c);
      if (c < last && c < p.walk.kept) x.keep(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, shift);
        if (n0 >= N) continue;
        float s[E];
        scores<SOFTCAP, WHOLE>(s, x.pack[v], n0, N, p.softcap);
        scan.add(s);
        if (row.t >= n0 && row.t < n0 + E) {
#pragma unroll
          for (int i = 0; i < E; ++i)
            if (n0 + i == row.t) scan.field[2] = s[i];
        }
      }
    }
    scan = team.reduce(scan);
    x.hold();
    const float log_sum = logf(scan.sum()), lse = scan.max() + log_sum;
    RowGradient gradient(p, row, scan.max(), log_sum, scan.sum());
    if (p.dloss.data && at.exists) gradient.factor *= load_number<T>(p.dloss, at);
    float loss = row.poison - gradient.q_t * ((scan.at() - scan.max()) - log_sum);

    // Pass 2: dlogits, and the loss against all classes
    Sums<1> log_probs{{0.f}};
    if (p.dlogits.data || p.smoothing > 0.f) {
      for (int c = last; c >= 0; --c) {
        if (c < last && c < p.walk.kept) x.recall(c);
        else if (c < last) read(c);
#pragma unroll
        for (int v = 0; v < PACKS; ++v) {
          const int n0 = pack_begin<E, PACKS>(team, c, v, shift);
          if (n0 >= columns) continue;
          float s[E], dx[E];
          scores<SOFTCAP, WHOLE>(s, x.pack[v], n0, N, p.softcap);
          if (p.smoothing > 0.f && n0 < N) {
            const Inside<E, WHOLE> inside(n0, N);
#pragma unroll
            for (int i = 0; i < E; ++i)
              if (inside[i]) log_probs.field[0] += (s[i] - scan.max()) - log_sum;
          }
          if (!p.dlogits.data) continue;
          gradient.of<SOFTCAP>(dx, s, n0, p.softcap);
          store<T, E, WHOLE>(row_of<T>(p.dlogits, at), n0, columns, p.dlogits.wide, dx);
        }
      }
    }
    if (p.smoothing > 0.f) loss -= gradient.q_all * team.reduce(log_probs).field[0];
    if (p.z_loss != 0.f) loss += p.z_loss * lse * lse;
    if (team.place() > 0 || !at.exists) continue;
    store_number<T>(p.loss, at, row.counts ? loss : 0.f);
    const int64_t i = offset(at, p.statistics);
    if (p.row_max) p.row_max[i] = scan.max();
    if (p.row_sum) p.row_sum[i] = scan.sum();
  }
}

template <class T, bool SOFTCAP, bool WHOLE>
__global__ void __launch_bounds__(WHOLE && !SOFTCAP ? LEAN_RESIDENT : RESIDENT, 1)
cross_entropy_backward_kernel(const __grid_constant__ CrossEntropy p) {
  constexpr int E = PACK<T>, PACKS = FORWARD_BYTES / 16;
  const Team<NoBugs> team(p.walk);
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    if (!at.exists) continue;
    const T* x_row = row_of<T>(p.logits, at);
    const int shift = WHOLE ? 0 : shift_of(p.walk, x_row);
    const int64_t target = load_target(p.target, p.target_64, offset(at, p.target_step));
    const ClassOfRow row = ClassOfRow::of<T>(p, target, true, p.walk.N);
    const int64_t i = offset(at, p.statistics);
    const float max = row.counts ? p.row_max[i] : 0.f, sum = row.counts ? p.row_sum[i] : 1.f;
    RowGradient gradient(p, row, max, logf(sum), sum);
    gradient.factor *= load_number<T>(p.dloss, at);
    for (int c = 0; c < p.walk.chunks; ++c) {
      Pack<T, E> x[PACKS];
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
        x[v] = load<T, E, Read::Coherent, WHOLE>(
            x_row, pack_begin<E, PACKS>(team, c, v, shift), row.counts ? p.walk.N : 0, p.logits.wide);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, shift);
        float s[E], dx[E];
        scores<SOFTCAP, WHOLE>(s, x[v], n0, p.walk.N, p.softcap);
        gradient.of<SOFTCAP>(dx, s, n0, p.softcap);
        store<T, E, WHOLE>(row_of<T>(p.dlogits, at), n0, p.walk.N, p.dlogits.wide, dx);
      }
    }
  }
}

// out = factor · x; over at once where that is nothing to do.
template <class T>
__global__ void __launch_bounds__(RESIDENT) scale_rows_kernel(const __grid_constant__ ScaleRows p) {
  constexpr int E = PACK<T>, PACKS = FORWARD_BYTES / 16;
  const Team<NoBugs> team(p.walk);
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    if (!at.exists) continue;
    const float factor = load_number<T>(p.factor, at);
    if (p.out.data == p.x.data && factor == 1.f) continue;
    const T* x_row = row_of<T>(p.x, at);
    const int shift = shift_of(p.walk, x_row);
    for (int c = 0; c < p.walk.chunks; ++c) {
      Pack<T, E> x[PACKS];
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
        x[v] = load<T, E, Read::Coherent>(x_row, pack_begin<E, PACKS>(team, c, v, shift), p.walk.N, p.x.wide);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        float out[E];
#pragma unroll
        for (int i = 0; i < E; ++i) out[i] = x[v][i] * factor;
        store<T, E>(row_of<T>(p.out, at), pack_begin<E, PACKS>(team, c, v, shift), p.walk.N, p.out.wide, out);
      }
    }
  }
}

template <class T> static RowProblem problem_of(const Walk& walk, bool keeps) {
  return {walk.N, PACK<T>, FORWARD_BYTES / int(sizeof(T)), keeps ? FORWARD_BYTES : 0, walk.shifted};
}

static void refuse(const CrossEntropy& p) {
  if (p.weight.data && p.smoothing > 0.f)
    throw std::invalid_argument("cross_entropy: weight and label_smoothing cannot be given together to these kernels");
  const Dtype dtype = p.logits.dtype;
  require(p.dlogits, "cross_entropy: dlogits", dtype, dtype);
  require(p.loss, "cross_entropy: loss", dtype, Dtype::Float32);
  require(p.dloss, "cross_entropy: dloss", dtype, Dtype::Float32);
  require(p.weight, "cross_entropy: weight", dtype, Dtype::Float32);
}

void cross_entropy_forward(CrossEntropy p, cudaStream_t stream) {
  refuse(p);
  with_dtype(p.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (Matrix* m : {&p.dlogits, &p.logits}) align(*m, PACK<T>);
    shift_unaligned(p.walk, {&p.logits, &p.dlogits});
    const RowConfig config = choose(problem_of<T>(p.walk, true), limits(cross_entropy_forward_kernel<T, false, false>));
    const LaunchShape shape = shape_of(config, p.walk);
    with_bool(whole(p.walk, PACK<T>, {&p.dlogits, &p.logits}), [&](auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      with_bugs<T>([&](auto planted) {
        using Planted = decltype(planted);
        if (p.softcap > 0.f) launch(cross_entropy_forward_kernel<T, true, WHOLE, Planted>, shape, stream, p);
        else launch(cross_entropy_forward_kernel<T, false, WHOLE, Planted>, shape, stream, p);
      });
    });
  });
}

// A row of these kernels is no more than its chunks: a CTA takes it alone.
constexpr RowLimits ALONE{false, REDUCTION_BYTES};

void cross_entropy_backward(CrossEntropy p, cudaStream_t stream) {
  refuse(p);
  with_dtype(p.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (Matrix* m : {&p.dlogits, &p.logits}) align(*m, PACK<T>);
    shift_unaligned(p.walk, {&p.logits, &p.dlogits});
    const LaunchShape shape = shape_of(choose(problem_of<T>(p.walk, false), ALONE), p.walk);
    with_bool(whole(p.walk, PACK<T>, {&p.dlogits, &p.logits}), [&](auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      if (p.softcap > 0.f) launch(cross_entropy_backward_kernel<T, true, WHOLE>, shape, stream, p);
      else launch(cross_entropy_backward_kernel<T, false, WHOLE>, shape, stream, p);
    });
  });
}

void scale_rows(ScaleRows p, cudaStream_t stream) {
  require(p.out, "scale_rows: out", p.x.dtype, p.x.dtype);
  require(p.factor, "scale_rows: factor", p.x.dtype, Dtype::Float32);
  with_dtype(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (Matrix* m : {&p.out, &p.x}) align(*m, PACK<T>);
    shift_unaligned(p.walk, {&p.x, &p.out});
    const LaunchShape shape = shape_of(choose(problem_of<T>(p.walk, false), ALONE), p.walk);
    launch(scale_rows_kernel<T>, shape, stream, p);
  });
}

}  // namespace rows
