// h = residual + dropout(x), rounded to h's type;   x where there is no residual
// LayerNorm   x̂ = (h - mean) · rstd      rstd = 1 / sqrt(var + eps)             y = x̂ · weight + bias
// RMSNorm     x̂ = h · rstd               rstd = 1 / sqrt(mean_n(h²) + eps)      y = x̂ · (weight_offset + weight)
//
// A row is read once and kept as fp32. The variance is a sum of squares about the mean, never E[h²] - E[h]².
#include "norm.h"

#include "norm_parameters.h"

namespace fastattn::FASTATTN_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

// row (N,) = x; Σ x or, of RMSNorm, Σ x². fp32 is read where it lies.
template <bool RMS, class X>
float load_row(const X* x, float* row, int64_t N) {
  Vec sums[SUMS] = {};
  for_columns<SUMS>(N, [&](int64_t n, auto part, int k) FASTATTN_LAMBDA {
    const Vec v = load(x + n, part);
    if constexpr (sizeof(X) < 4) store(row + n, v);
    sums[k] = RMS ? fma(v, v, sums[k]) : sums[k] + v;
  });
  return total_of(sums);
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

// Of Σ h or, of RMSNorm, Σ h²
template <bool RMS>
Moments moments(const float* row, int64_t N, float sum, float eps) {
  const float count = (float)N;
  float mean = 0.f, squares = sum;
  if (!RMS) {
    mean = sum / count;
    Vec errors[SUMS] = {}, parts[SUMS] = {};
    for_columns<SUMS>(N, [&](int64_t n, auto part, int k) FASTATTN_LAMBDA {
      const Vec centred = only(part, load(row + n, part) - broadcast(mean));
      errors[k] += centred;
      parts[k] = fma(centred, centred, parts[k]);
    });
    // The mean was rounded at the size of Σ h, which may dwarf the spread of h; this is what it is off by.
    const float error = total_of(errors) / count;
    mean += error;
    squares = total_of(parts) - error * error * count;
  }
  return {mean, 1.f / __builtin_sqrtf(squares / count + eps)};
}

// y = x̂ · weight + bias
template <class Y>
void store_row(Y* y, const float* row, Moments m, const float* weight, const float* bias, int64_t N) {
  const Vec mean = broadcast(m.mean), rstd = broadcast(m.rstd);
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec x_hat = (load(row + n, part) - mean) * rstd;
    store(y + n, fma(x_hat, load(weight + n, part), load(bias + n, part)), part);
  });
}

template <bool RMS>
Moments forward_row(const NormForward& p, int64_t i, float* room, const float* weight, const float* bias) {
  const Place place = place_of(p.rows, i);
  const float* row = room;
  float sum = 0.f;
  with_type(p.x.type, [&](auto x_type) FASTATTN_LAMBDA {
    using X = decltype(x_type);
    const X* x = row_of<X>(p.x, place);
    if (p.residual.data == nullptr) {
      sum = load_row<RMS>(x, room, p.N);
      if constexpr (sizeof(X) == 4) row = x;
      return;
    }
    with_type(p.h.type, [&](auto h_type) FASTATTN_LAMBDA {
      using H = decltype(h_type);
      const H* residual = row_of<H>(p.residual, place);
      H* h = row_of<H>(p.h, place);
      if (p.dropout.seed == nullptr) {
        load_sum<false>(x, residual, h, room, p.N, i, p.dropout);
      } else {
        load_sum<true>(x, residual, h, room, p.N, i, p.dropout);
      }
    });
    sum = load_row<RMS>(room, room, p.N);
  });
  const Moments m = moments<RMS>(row, p.N, sum, p.eps);
  with_type(p.y.type, [&](auto type) FASTATTN_LAMBDA {
    store_row(row_of<decltype(type)>(p.y, place), row, m, weight, bias, p.N);
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
