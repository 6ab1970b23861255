// s = softcap · tanh(x / softcap)   or x          log p_j = (s_j - max s) - log Σ exp(s_l - max s)
// loss of a row = -Σ_j q_j log p_j + z_loss · lse²          lse = max s + log Σ exp(s_l - max s)
// dx_j = (Σ q p_j - q_j + 2 z_loss lse p_j) · ds_j / dx_j   ds / dx = 1 - tanh²(x / softcap)  or 1
//
// q_j = (1 - ε) w_t [j = t] + ε / V · w_j         for a class t of V, w = 1 without class weights
// q_j = w_j ((1 - ε) y_j + ε / V)                 for probabilities y
//
// A row is read twice: for its maximum, or a number close to it, and sum, kept up to date as they come by, and for its
// gradient, which may be written over it. One to be ignored is not read at all. q of a class without weights is a
// constant and a spike; other q, and the tanh of scores with a cap, are kept in a row of fp32. Row losses are added in
// one order.
#include "cross_entropy.h"

#include "exponential.h"
#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {

// Scores with a cap: s = cap · u, u = tanh(x / cap). Otherwise scores are the logits, T* or float*.
struct Capped {
  const float* u;
  float cap;
  FASTATTN_INLINE Capped operator+(int64_t n) const { return {u + n, cap}; }
};
FASTATTN_INLINE Vec load(Capped s) { return broadcast(s.cap) * load(s.u); }
FASTATTN_INLINE Vec load(Capped s, int n) { return broadcast(s.cap) * load(s.u, n); }
FASTATTN_INLINE Vec load(Capped s, All) { return load(s); }
FASTATTN_INLINE Vec load(Capped s, First part) { return load(s, part.n); }
FASTATTN_INLINE float load_one(Capped s) { return s.cap * *s.u; }

namespace {

constexpr float INF = __builtin_inff(), NOT_A_NUMBER = __builtin_nanf("");
constexpr float SLACK = 4.f;

struct Statistics {
  float highest, sum, log_sum;  // m, Σ exp(s - m) and its logarithm
};

// q = spike · [j = t] + what is spread over all classes: a constant, or a row of fp32
struct Target {
  int64_t t;  // -1: none
  float spike, constant;
  float total;    // Σ q
  bool counts;
  float poison;   // NaN where the class does not exist, else 0
};

// ds / dx
template <class Part>
FASTATTN_INLINE Vec slope(Capped s, Part part) {
  const Vec u = load(s.u, part);
  return broadcast(1.f) - u * u;
}
template <class T, class Part>
FASTATTN_INLINE Vec slope(const T*, Part) { return broadcast(1.f); }

// m and Σ exp(s - m) of (V,), m being within SLACK of the maximum: it is raised, and the sums scaled, where a number
// exceeds it by more, which after the first few vectors is rare. A NaN is in the sum.
template <class S>
Statistics statistics(S s, int64_t V) {
  float highest = -INF;
  double total = 0.;  // of the spans before this one
  Vec limit = broadcast(-INF), offset{}, sums[4] = {};
  const auto raise = [&](Vec most) FASTATTN_LAMBDA {
    const float before = highest;
    highest = reduce_max(most);
    if (before != -INF) {
      const Vec scale = exp2_below(broadcast((before - highest) * LOG2_E));
      total *= scale[0];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] *= scale;
    }
    offset = broadcast(highest);
    limit = offset + broadcast(SLACK);
  };
  const auto add = [&](Vec x, int k) FASTATTN_LAMBDA { sums[k] += exp2_below((x - offset) * broadcast(LOG2_E)); };
  int64_t n = 0;
  while (true) {
    const int64_t end = smaller(V, n + SPAN);
    for (; n + 4 * LANES <= end; n += 4 * LANES) {
      const Vec x[4] = {load(s + n), load(s + n + LANES), load(s + n + 2 * LANES), load(s + n + 3 * LANES)};
      const Vec most = max(max(x[0], x[1]), max(x[2], x[3]));
      if (any(most > limit)) raise(most);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) add(x[k], k);
    }
    if (n + 4 * LANES > V) break;
    total += total_of(sums);
    for (Vec& sum : sums) sum = Vec{};
  }
  for (; n < V; n += LANES) {
    const Vec x = n + LANES <= V ? load(s + n) : only(First{int(V - n)}, load(s + n, int(V - n)), -INF);
    if (any(x > limit)) raise(x);
    add(x, 0);
  }
  const float sum = V <= SPAN ? total_of(sums) : (float)(total + total_of(sums));
  return {highest, sum, log(broadcast(sum))[0]};
}

// Σ log p, or with Q Σ q log p
template <bool Q, class S>
float sum_log_p(S s, const float* q, Statistics row, int64_t V) {
  const Vec highest = broadcast(row.highest), log_sum = broadcast(row.log_sum);
  return sum_columns(V, [&](int64_t n, auto part, Vec& sum) FASTATTN_LAMBDA {
    Vec log_p = (load(s + n, part) - highest) - log_sum;
    if (Q) log_p *= load(q + n, part);
    sum += only(part, log_p);
  });
}

// dx = (total · p - q + pull · p) · factor [· ds / dx],   p = e^(s - m) / Σ, whose exponent has the one rounding of s - m
template <bool Q, class S, class T>
void gradient(
    T* dx, S s, const float* q, const Target& target, Statistics row, float pull, float factor, int64_t V) {
  using Accuracy = std::conditional_t<std::is_same_v<T, bf16>, fp16, T>;  // 1e-4 of p shows where p is close to q
  const float share = 1.f / row.sum;
  const Vec highest = broadcast(row.highest), pull_ = broadcast(pull * share);
  const Vec total = broadcast(target.total * share), both = broadcast((target.total + pull) * share);
  const Vec constant = broadcast(target.constant), factor_ = broadcast(factor);
  // The class's entry apart: where p is close to q the difference of those two is small beside the pull.
  float at_t = 0.f;
  if (target.t >= 0) {
    const float spread = Q ? q[target.t] : target.constant;
    const float score = load_one(s + target.t);
    const float p = exp(broadcast(score - row.highest))[0] * share;
    at_t = ((target.total * p - (target.spike + spread)) + pull * p) * factor * slope(s + target.t, First{1})[0];
  }
  for_columns<4>(V, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec score = load(s + n, part);
    const Vec e = exp_for(score - highest, Accuracy{});
    Vec d = Q ? fma(pull_, e, total * e - load(q + n, part)) : fma(both, e, -constant);
    store(dx + n, d * factor_ * slope(s + n, part), part);
  });
  if (target.t >= 0) store_one(dx + target.t, at_t);
}

// u (V,) of logits x
template <class T>
Capped capped(const T* x, float* u, float cap, int64_t V) {
  for_columns<1>(V, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    store(u + n, tanh(load(x + n, part) / broadcast(cap)), part);
  });
  return {u, cap};
}

// q (V,) of probabilities, or what a class spreads over all; returns Σ q
template <class Y>
float load_q(const CrossEntropy& p, const Y* y, float* q) {
  const Vec keep = broadcast(1.f - p.smoothing), spread = broadcast(p.smoothing / (float)p.V);
  for_columns<1>(p.V, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = y == nullptr ? spread : fma(load(y + n, part), keep, spread);
    if (p.weight != nullptr) v *= load(p.weight + n, part);
    store(q + n, v, part);
  });
  return sum_columns(p.V, [&](int64_t n, auto part, Vec& sum) FASTATTN_LAMBDA { sum += load(q + n, part); });
}

// Whether q is more than a constant and a spike
FASTATTN_INLINE bool has_row_of_q(const CrossEntropy& p) {
  return p.q.data != nullptr || (p.smoothing != 0.f && p.weight != nullptr);
}

FASTATTN_INLINE Target target_of(const CrossEntropy& p, int64_t i) {
  Target target{-1, 0.f, 0.f, 0.f, true, 0.f};
  if (p.target == nullptr) return target;
  const int64_t t = p.target[i];
  target.counts = t != p.ignore_index;
  if (!target.counts) return target;
  const bool exists = t >= 0 && t < p.V;
  target.t = exists ? t : -1;
  target.poison = exists ? 0.f : NOT_A_NUMBER;
  target.spike = (1.f - p.smoothing) * (!exists ? 0.f : p.weight == nullptr ? 1.f : p.weight[t]);
  target.constant = p.smoothing / (float)p.V;
  target.total = target.spike + p.smoothing;
  return target;
}

FASTATTN_INLINE float load_vector(const Vector& v, int64_t i) {
  float value = 0.f;
  with_type(v.type, [&](auto type) FASTATTN_LAMBDA { value = load_one((const decltype(type)*)v.data + i); });
  return value;
}

FASTATTN_INLINE float factor_of(const CrossEntropy& p, int64_t i) {
  float factor = p.factor.data == nullptr ? 1.f : load_vector(p.factor, i * p.factor_step);
  if (p.divisor != nullptr) factor /= *p.divisor;
  return factor;
}

// One row; its statistics are given or, if known is null, found, and then its loss is returned.
template <class T, class S>
float finish_row(
    const CrossEntropy& p, int64_t i, Place place, S s, const float* q, const Target& target,
    Statistics* statistics_out, const Statistics* known) {
  const int64_t V = p.V;
  const Statistics row = known != nullptr ? *known : statistics(s, V);
  if (statistics_out != nullptr) *statistics_out = row;
  const float lse = row.highest + row.log_sum;
  float loss = target.poison;
  if (known == nullptr) {
    if (target.t >= 0) loss -= target.spike * ((load_one(s + target.t) - row.highest) - row.log_sum);
    if (q != nullptr) {
      loss -= sum_log_p<true>(s, q, row, V);
    } else if (target.constant != 0.f) {
      loss -= target.constant * sum_log_p<false>(s, nullptr, row, V);
    }
    if (p.z_loss != 0.f) loss += p.z_loss * lse * lse;
  }
  if (p.dx.data != nullptr) {
    T* dx = row_of<T>(p.dx, place);
    const float pull = 2.f * p.z_loss * lse, factor = factor_of(p, i) + target.poison;
    if (q != nullptr) {
      gradient<true>(dx, s, q, target, row, pull, factor, V);
    } else {
      gradient<false>(dx, s, nullptr, target, row, pull, factor, V);
    }
  }
  return loss;
}

template <class T>
float one_row(
    const CrossEntropy& p, int64_t i, float* room, int64_t width, Statistics* statistics_out, const Statistics* known) {
  const Place place = place_of(p.rows, i);
  Target target = target_of(p, i);
  if (!target.counts) {
    if (p.dx.data != nullptr) {
      T* dx = row_of<T>(p.dx, place);
      for_columns<1>(p.V, [&](int64_t n, auto part, int) FASTATTN_LAMBDA { store(dx + n, Vec{}, part); });
    }
    if (statistics_out != nullptr) *statistics_out = {-INF, 0.f, -INF};
    return 0.f;
  }
  const T* x = row_of<const T>(p.x, place);
  const float* q = nullptr;
  if (has_row_of_q(p)) {
    q = room + width;
    with_type(p.q.type, [&](auto type) FASTATTN_LAMBDA {
      using Y = decltype(type);
      const Y* y = p.q.data == nullptr ? nullptr : row_of<const Y>(p.q, place);
      target.total = target.spike + load_q(p, y, room + width);
    });
  }
  if (p.softcap == 0.f) return finish_row<T>(p, i, place, x, q, target, statistics_out, known);
  const Capped s = capped(x, room, p.softcap, p.V);
  return finish_row<T>(p, i, place, s, q, target, statistics_out, known);
}

// row(i, room, width) for every row, with room for what a thread keeps of a row
template <class Call>
FASTATTN_INLINE void for_each_row(const CrossEntropy& p, int threads, const Call& call) {
  const int64_t M = count(p.rows), width = (p.V + 15) / 16 * 16;
  threads = threads_of(threads, M);
  const int64_t room = p.softcap != 0.f || has_row_of_q(p) ? 2 * width : 0;
  Scratch scratch(sizeof(float) * room * threads);
  for_rows(threads, M, p.V, [&](int64_t first, int64_t last, int thread) {
    for (int64_t i = first; i < last; ++i) call(i, (float*)scratch.data() + thread * room, width);
  });
}

// Σ w_t over the rows that count; of probabilities the number of rows
float divisor_of(const CrossEntropy& p, int64_t M) {
  if (p.target == nullptr) return (float)M;
  double sum = 0.;
  for (int64_t i = 0; i < M; ++i) {
    const int64_t t = p.target[i];
    if (t == p.ignore_index || t < 0 || t >= p.V) continue;
    sum += p.weight == nullptr ? 1. : p.weight[t];
  }
  return (float)sum;
}

}  // namespace

void cross_entropy_forward(CrossEntropy p, const CrossEntropyLoss& out, int threads) {
  const int64_t M = count(p.rows);
  float divisor = 1.f;
  if (out.mean) {
    divisor = divisor_of(p, M);
    if (out.divisor != nullptr) *out.divisor = divisor;
    p.divisor = &divisor;
  }
  Scratch scratch(out.reduced ? sizeof(float) * M : 0);
  float* losses = (float*)scratch.data();
  with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
    using T = decltype(type);
    for_each_row(p, threads, [&](int64_t i, float* room, int64_t width) {
      Statistics row;
      const float loss = one_row<T>(p, i, room, width, &row, nullptr);
      if (out.row_max != nullptr) {
        out.row_max[i] = row.highest;
        out.row_sum[i] = row.sum;
      }
      if (out.reduced) {
        losses[i] = loss;
      } else {
        with_type(out.loss.type, [&](auto loss_type) FASTATTN_LAMBDA {
          store_one((decltype(loss_type)*)out.loss.data + i, loss);
        });
      }
    });
  });
  if (!out.reduced) return;
  double sum = 0.;
  for (int64_t i = 0; i < M; ++i) sum += losses[i];
  const float total = (float)(out.mean ? sum / divisor : sum);
  with_type(out.loss.type, [&](auto type) FASTATTN_LAMBDA { store_one((decltype(type)*)out.loss.data, total); });
}

void cross_entropy_backward(const CrossEntropy& p, const float* row_max, const float* row_sum, int threads) {
  with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
    for_each_row(p, threads, [&](int64_t i, float* room, int64_t width) {
      const Statistics known{row_max[i], row_sum[i], log(broadcast(row_sum[i]))[0]};
      one_row<decltype(type)>(p, i, room, width, nullptr, &known);
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
