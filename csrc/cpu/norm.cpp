// h = residual + dropout(x), rounded to h's type;   x where there is no residual
// LayerNorm   x̂ = (h - mean) · rstd      rstd = 1 / sqrt(var + eps)             y = x̂ · weight + bias
// RMSNorm     x̂ = h · rstd               rstd = 1 / sqrt(mean_n(h²) + eps)      y = x̂ · (weight_offset + weight)
//
// The variance is a sum of squares about a number close to the mean, never E[h²] - E[h]²: first about the mean of the
// row's beginning, and only where that turns out to be far off, once more about the mean itself.
#include "norm.h"

#include "norm_parameters.h"

namespace fastattn::FASTATTN_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

// row (N,) = x
template <class X>
void load_row(const X* x, float* row, int64_t N) {
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA { store(row + n, load(x + n, part)); });
}

// row (N,) = h = residual + dropout(x); DROP: row i of the matrix
template <bool DROP, class X, class H>
void load_sum(const X* x, const H* residual, H* h, float* row, int64_t N, int64_t i, const RowDropout& dropout) {
  const uint64_t key = DROP ? (uint64_t)*dropout.seed : 0;
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = load(x + n, part);
    if (DROP) v = drop(v, i, n, dropout, key);
    v = rounded(v + load(residual + n, part), H{});
    store(h + n, v, part);
    store(row + n, v);
  });
}

struct Sums {
  float mean, squares;  // about the mean
};

// Of h about a number `centre`; `off` is how far that is from the mean; share = 1 / N
template <class H>
Sums sums_about(const H* h, int64_t N, float share, float centre, float& off) {
  float totals[2];
  sum_columns(N, totals, [&](int64_t n, auto part, Vec (&sums)[2]) FASTATTN_LAMBDA {
    const Vec centred = only(part, load(h + n, part) - broadcast(centre));
    sums[0] += centred;
    sums[1] = fma(centred, centred, sums[1]);
  });
  off = totals[0] * share;
  // Squares that overflow are infinite, however far off the centre was.
  const float excess = smaller(off * off * (float)N, __FLT_MAX__);
  return {centre + off, totals[1] - excess};
}

template <bool RMS, class H>
Moments moments(const H* h, int64_t N, float eps) {
  const float share = 1.f / (float)N;
  if (RMS) {
    const float squares = sum_columns(N, [&](int64_t n, auto part, Vec& sum) FASTATTN_LAMBDA {
      const Vec v = load(h + n, part);
      sum = fma(v, v, sum);
    });
    return {0.f, 1.f / __builtin_sqrtf(squares * share + eps)};
  }
  const int64_t beginning = smaller<int64_t>(N, 4 * LANES);
  Vec begun{};
  for_columns<1>(beginning, [&](int64_t n, auto part, int) FASTATTN_LAMBDA { begun += load(h + n, part); });
  float off;
  const float centre = reduce_sum(begun) * (beginning == N ? share : 1.f / (4 * LANES));
  Sums sums = sums_about(h, N, share, centre, off);
  // Their difference was one of numbers up to 1¼ times as large; or NaN, for which nothing helps.
  if (off * off * (float)N > 0.25f * sums.squares) sums = sums_about(h, N, share, sums.mean, off);
  return {sums.mean, 1.f / __builtin_sqrtf(sums.squares * share + eps)};
}

// y = x̂ · weight + bias
template <class H, class Y>
void store_row(Y* y, const H* h, Moments m, const float* weight, const float* bias, int64_t N) {
  const Vec mean = broadcast(m.mean), rstd = broadcast(m.rstd);
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec x_hat = (load(h + n, part) - mean) * rstd;
    store(y + n, fma(x_hat, load(weight + n, part), load(bias + n, part)), part);
  });
}

// h of row i into `room` (N,), and as a tensor if there is a residual
void load_h(const NormForward& p, int64_t i, Place place, float* room) {
  with_type(p.x.type, [&](auto x_type) FASTATTN_LAMBDA {
    using X = decltype(x_type);
    const X* x = row_of<const X>(p.x, place);
    if (p.residual.data == nullptr) return load_row(x, room, p.N);
    with_type(p.h.type, [&](auto h_type) FASTATTN_LAMBDA {
      using H = decltype(h_type);
      const H* residual = row_of<const H>(p.residual, place);
      H* h = row_of<H>(p.h, place);
      if (p.dropout.seed == nullptr) {
        load_sum<false>(x, residual, h, room, p.N, i, p.dropout);
      } else {
        load_sum<true>(x, residual, h, room, p.N, i, p.dropout);
      }
    });
  });
}

template <bool RMS>
Moments forward_row(const NormForward& p, int64_t i, float* room, const float* weight, const float* bias) {
  const Place place = place_of(p.rows, i);
  Moments m;
  if (p.residual.data == nullptr && p.x.type == p.y.type) {
    with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
      using X = decltype(type);
      const X* x = row_of<const X>(p.x, place);
      m = moments<RMS>(x, p.N, p.eps);
      store_row(row_of<X>(p.y, place), x, m, weight, bias, p.N);
    });
    return m;
  }
  load_h(p, i, place, room);
  m = moments<RMS>(room, p.N, p.eps);
  with_type(p.y.type, [&](auto type) FASTATTN_LAMBDA {
    store_row(row_of<decltype(type)>(p.y, place), room, m, weight, bias, p.N);
  });
  return m;
}

}  // namespace

void norm_forward(const NormForward& p, int threads) {
  const int64_t M = count(p.rows), N = p.N, width = padded(N);
  threads = threads_of(threads, M);
  Scratch scratch(sizeof(float) * width * (2 + threads));
  float* room = (float*)scratch.data();
  const float* weight = widened(p.weight, p.weight_offset, 1.f, N, room);
  const float* bias = widened(p.bias, 0.f, 0.f, N, room + width);
  for_rows(threads, M, N, [&](int64_t first, int64_t last, int thread) {
    float* row = room + (2 + thread) * width;
    for (int64_t i = first; i < last; ++i) {
      if (p.rms) {
        p.stats[i] = forward_row<true>(p, i, row, weight, bias).rstd;
      } else {
        const Moments m = forward_row<false>(p, i, row, weight, bias);
        p.stats[i] = m.mean;
        p.stats[M + i] = m.rstd;
      }
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
