// Softmax and log_softmax over rows, with scale, bool mask and causality, forward and backward.
//
//   y = exp(s - max s) / Σ exp(s - max s)        s = scale · x over the visible entries; hidden ones are 0
//   log y = (s - max s) - log Σ exp(s - max s)   hidden ones are -inf
//
//   dx = scale · y · (dy - Σ dy · y)             from y
//   dx = scale · (dy - exp(log y) · Σ dy)        from log y; hidden entries have no part in Σ and get 0
//
// Matrices are (M, N), mask (M, N) bool of any steps. What a hidden entry holds is never computed with, and not read
// beyond the causal diagonal. A row without visible entries is 0 (log: -inf); one whose visible entries are all -inf is
// NaN there. The arithmetic is fp32; maximum and sum are kept up to date together, so that a row is read once.
#include <rows/chunk.h>
#include <rows/launch_rows.h>
#include <rows/place.h>
#include <rows/softmax.h>
#include <rows/values.h>
#include <rows/visible.h>

namespace rows {

// WHOLE: every pack is inside of its row or beyond it, and every matrix is aligned.
template <class T, bool WHOLE, class Planted = NoBugs>
__global__ void __launch_bounds__(WHOLE ? LEAN_RESIDENT : RESIDENT, 1)
softmax_forward_kernel(const __grid_constant__ Softmax p) {
  constexpr int E = PACK<T>, PACKS = FORWARD_BYTES / 16;
  Team<Planted> team(p.walk);
  const int last = p.walk.chunks - 1;
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    const T* x_row = row_of<T>(p.x, at);
    const int N = at.exists ? p.walk.N : 0, limit = causal_limit(p, at), shift = WHOLE ? 0 : shift_of(p.walk, x_row);
    Chunk<T, E, PACKS, Planted> x;
    uint32_t keep[PACKS];
    const auto see = [&](int c) {
#pragma unroll
      for (int v = 0; v < PACKS; ++v) keep[v] = visible<E>(p, at, pack_begin<E, PACKS>(team, c, v, shift), limit);
    };
    const auto read = [&](int c) {
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
        x.pack[v] = load<T, E, Read::Coherent, WHOLE>(x_row, pack_begin<E, PACKS>(team, c, v, shift), limit, p.x.wide);
    };
    const auto score = [&](float(&s)[E], int v) {
#pragma unroll
      for (int i = 0; i < E; ++i) s[i] = x.pack[v][i] * p.scale;
      if (keep[v] == ALL<E>) return;
#pragma unroll
      for (int i = 0; i < E; ++i)
        if (!(keep[v] >> i & 1)) s[i] = -INF;
    };

    // Pass 1: maximum and sum
    ExpSum total = ExpSum::none();
    for (int c = 0; c <= last; ++c) {
      read(c);
      see(c);
      if (c < last && c < p.walk.kept) x.keep(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        if (!keep[v]) continue;
        float s[E];
        score(s, v);
        total.add(s);
      }
    }
    total = team.reduce(total);
    x.hold();
    const float max = total.max(), log_sum = logf(total.sum()), share = 1.f / total.sum();

    // Pass 2: y. In a row whose visible entries are all -inf, s - max is NaN.
    for (int c = last; c >= 0; --c) {
      if (c < last) {
        see(c);
        if (c < p.walk.kept) x.recall(c);
        else read(c);
      }
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        float s[E], y[E];
        score(s, v);
#pragma unroll
        for (int i = 0; i < E; ++i) y[i] = p.log ? (s[i] - max) - log_sum : exponential(s[i] - max) * share;
        if (keep[v] != ALL<E>) {
#pragma unroll
          for (int i = 0; i < E; ++i)
            if (!(keep[v] >> i & 1)) y[i] = p.log ? -INF : 0.f;
        }
        store<T, E, WHOLE>(row_of<T>(p.out, at), pack_begin<E, PACKS>(team, c, v, shift), N, p.out.wide, y);
      }
    }
  }
}

template <class T, bool WHOLE, class Planted = NoBugs>
__global__ void __launch_bounds__(WHOLE ? LEAN_RESIDENT : RESIDENT, 1)
softmax_backward_kernel(const __grid_constant__ Softmax p) {
  constexpr int E = PACK<T>, PACKS = BACKWARD_ELEMENTS / E;
  Team<Planted> team(p.walk);
  const int last = p.walk.chunks - 1;
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    const T *dy_row = row_of<T>(p.x, at), *y_row = row_of<T>(p.y, at);
    const int N = at.exists ? p.walk.N : 0, limit = causal_limit(p, at), shift = WHOLE ? 0 : shift_of(p.walk, dy_row);
    float dy[PACKS][E], prob[PACKS][E];
    uint32_t keep[PACKS];
    // The probabilities y or exp(log y), and dy, both 0 where hidden, of chunk c.
    const auto read = [&](int c) {
      Pack<T, E> dy_pack[PACKS], y_pack[PACKS];
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, shift);
        dy_pack[v] = load<T, E, Read::Streaming, WHOLE>(dy_row, n0, limit, p.x.wide);
        y_pack[v] = load<T, E, Read::Streaming, WHOLE>(y_row, n0, limit, p.y.wide);
        keep[v] = visible<E>(p, at, n0, limit);
      }
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
#pragma unroll
        for (int i = 0; i < E; ++i) {
          dy[v][i] = dy_pack[v][i];
          prob[v][i] = p.log ? exponential(y_pack[v][i]) : y_pack[v][i];
        }
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        if (keep[v] == ALL<E>) continue;
#pragma unroll
        for (int i = 0; i < E; ++i)
          if (!(keep[v] >> i & 1)) dy[v][i] = prob[v][i] = 0.f;
      }
    };

    // Pass 1: Σ dy · y, or Σ dy from log y
    Sums<1> dot{{0.f}};
    for (int c = 0; c <= last; ++c) {
      read(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
#pragma unroll
        for (int i = 0; i < E; ++i) dot.field[0] += p.log ? dy[v][i] : dy[v][i] * prob[v][i];
    }
    dot = team.reduce(dot);

    // Pass 2: dx. `keep` holds back a NaN that the row's own visible entries have brought into the sum.
    for (int c = last; c >= 0; --c) {
      if (c < last) read(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        float dx[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float value = p.log ? dy[v][i] - prob[v][i] * dot.field[0] : prob[v][i] * (dy[v][i] - dot.field[0]);
          dx[i] = p.scale * value;
        }
        if (keep[v] != ALL<E>) {
#pragma unroll
          for (int i = 0; i < E; ++i)
            if (!(keep[v] >> i & 1)) dx[i] = 0.f;
        }
        store<T, E, WHOLE>(row_of<T>(p.out, at), pack_begin<E, PACKS>(team, c, v, shift), N, p.out.wide, dx);
      }
    }
  }
}

// Every `wide` of p, and whether its rows are walked through from one 16-byte boundary to the next instead.
static void align_rows(Softmax& p, int E) {
  require(p.out, "softmax: its output", p.x.dtype, p.x.dtype);
  require(p.y, "softmax: y", p.x.dtype, p.x.dtype);
  for (Matrix* m : {&p.out, &p.x, &p.y}) align(*m, E);
  shift_unaligned(p.walk, {&p.x, &p.out, &p.y});
  p.mask_wide = !p.walk.shifted && p.mask_step[3] == 1 && reinterpret_cast<uintptr_t>(p.mask) % E == 0;
  for (int d = 0; d < 3; ++d) p.mask_wide &= p.mask_step[d] % E == 0;
}

void softmax_forward(Softmax p, cudaStream_t stream) {
  with_dtype(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int E = PACK<T>;
    align_rows(p, E);
    const RowProblem problem{p.walk.N, E, FORWARD_BYTES / int(sizeof(T)), FORWARD_BYTES, p.walk.shifted};
    const LaunchShape shape = shape_of(choose(problem, limits(softmax_forward_kernel<T, false>)), p.walk);
    with_bool(whole(p.walk, E, {&p.out, &p.x}), [&](auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      with_bugs<T>([&](auto planted) {
        launch(softmax_forward_kernel<T, WHOLE, decltype(planted)>, shape, stream, p);
      });
    });
  });
}

void softmax_backward(Softmax p, cudaStream_t stream) {
  with_dtype(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int E = PACK<T>;
    align_rows(p, E);
    const RowProblem problem{p.walk.N, E, BACKWARD_ELEMENTS, 0, p.walk.shifted};
    const LaunchShape shape = shape_of(choose(problem, limits(softmax_backward_kernel<T, false>)), p.walk);
    with_bool(whole(p.walk, E, {&p.out, &p.x, &p.y}), [&](auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      with_bugs<T>([&](auto planted) {
        launch(softmax_backward_kernel<T, WHOLE, decltype(planted)>, shape, stream, p);
      });
    });
  });
}

}  // namespace rows
