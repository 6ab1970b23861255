// y = exp(s - max s) / Σ exp(s - max s)        s = scale · x over the visible entries; hidden ones are 0
// log y = (s - max s) - log Σ exp(s - max s)   hidden ones are -inf
//
// dx = scale · y · (dy - Σ dy · y)             from y
// dx = scale · (dy - exp(log y) · Σ dy)        from log y; hidden entries have no part in Σ and get 0
//
// An entry is visible where the mask is true and, if causal, where j <= i + shift. What a hidden entry holds is never
// computed with, nor is a column read that no row sees. A row without visible entries is 0 (log: -inf); one whose
// visible entries are all -inf is NaN there. A row comes from memory once and then from the cache.
#include "softmax.h"

#include "exponential.h"
#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float INF = __builtin_inff();

// What row i2 sees of N columns, the mask apart
FASTATTN_INLINE int64_t columns_in_sight(const Softmax& p, Place place) {
  if (!p.causal) return p.N;
  const int64_t n = place.i2 + p.shift + 1;
  return n < 0 ? 0 : n < p.N ? n : p.N;
}

// The mask of a row: null if there is none. One that is constant along the row hides all of it or nothing.
FASTATTN_INLINE const uint8_t* mask_of(const Softmax& p, Place place, int64_t& N) {
  if (p.mask.data == nullptr) return nullptr;
  const uint8_t* mask = row_of<uint8_t>(p.mask, place);
  if (p.along_mask != 0) return mask;
  if (*mask == 0) N = 0;
  return nullptr;
}

template <class Part>
FASTATTN_INLINE Int seen(const uint8_t* mask, int64_t n, Part part) {
  return load(mask + n, part) != broadcast(0.f);
}

template <class T>
FASTATTN_INLINE void fill(T* y, float value, int64_t first, int64_t last) {
  for_columns<1>(last - first, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    store(y + first + n, broadcast(value), part);
  });
}

// s = scale · x in columns n …, -inf where hidden
template <bool MASK, class T, class Part>
FASTATTN_INLINE Vec score(const T* x, const uint8_t* mask, int64_t n, Vec scale, Part part) {
  const Vec s = load(x + n, part) * scale;
  return MASK ? select(seen(mask, n, part), s, broadcast(-INF)) : s;
}

// max s, which passes over NaN. s is kept (N,) if it was masked, which is worth doing once.
template <bool MASK, class T>
FASTATTN_INLINE float highest_score(const T* x, const uint8_t* mask, float* s, Vec scale, int64_t N) {
  Vec most[4];
  for (Vec& m : most) m = broadcast(-INF);
  for_columns<4>(N, [&](int64_t n, auto part, int k) FASTATTN_LAMBDA {
    const Vec v = score<MASK>(x, mask, n, scale, part);
    if (MASK) store(s + n, v);
    most[k] = max(most[k], only(part, v, -INF));
  });
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

template <bool LOG, bool MASK, class T>
void forward_row(T* y, const T* x, const uint8_t* mask, float* s, float scale_, int64_t N) {
  const Vec scale = broadcast(scale_);
  const Vec highest = broadcast(highest_score<MASK>(x, mask, s, scale, N));
  const float sum = sum_columns(N, [&](int64_t n, auto part, Vec& total) FASTATTN_LAMBDA {
    const Vec v = MASK ? load(s + n, part) : score<false>(x, nullptr, n, scale, part);
    const Vec e = exp_for(v - highest, T{});
    if (!LOG) store(s + n, e);
    total += only(part, e);
  });
  const Vec log_sum = LOG ? log(broadcast(sum)) : Vec{}, by = broadcast(1.f / sum);
  // Where the row is not finite, what is hidden is so by its mask alone.
  const bool finite = sum - sum == 0.f;
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = LOG && !MASK ? score<false>(x, nullptr, n, scale, part) : load(s + n, part);
    v = LOG ? (v - highest) - log_sum : v * by;
    if (MASK && !finite) v = select(seen(mask, n, part), v, broadcast(LOG ? -INF : 0.f));
    store(y + n, v, part);
  });
}

template <bool LOG, class T>
void forward_rows(const Softmax& p, int64_t first, int64_t last, float* s) {
  for (int64_t i = first; i < last; ++i) {
    const Place place = place_of(p.rows, i);
    int64_t N = columns_in_sight(p, place);
    const uint8_t* mask = mask_of(p, place, N);
    const T* x = row_of<const T>(p.x, place);
    T* y = row_of<T>(p.y, place);
    if (N > 0 && mask != nullptr) {
      forward_row<LOG, true>(y, x, mask, s, p.scale, N);
    } else if (N > 0) {
      forward_row<LOG, false>(y, x, nullptr, s, p.scale, N);
    }
    fill(y, LOG ? -INF : 0.f, N, p.N);
  }
}

// p = y or exp(log y), and dy; 0 where hidden
template <bool LOG, bool MASK, class T, class Part>
FASTATTN_INLINE void load_gradient(
    const T* y, const T* dy, const uint8_t* mask, int64_t n, Part part, Vec& probability, Vec& gradient) {
  probability = load(y + n, part);
  if (LOG) probability = exp_for(probability, T{});
  gradient = load(dy + n, part);
  if (MASK) {
    const Int keep = seen(mask, n, part);
    probability = zero_unless(keep, probability);
    gradient = zero_unless(keep, gradient);
  }
}

template <bool LOG, bool MASK, class T>
void backward_row(T* dx, const T* dy, const T* y, const uint8_t* mask, float scale, int64_t N) {
  const float sum = sum_columns(N, [&](int64_t n, auto part, Vec& total) FASTATTN_LAMBDA {
    if (LOG) {
      Vec g = load(dy + n, part);
      if (MASK) g = zero_unless(seen(mask, n, part), g);
      total += g;
    } else {
      Vec q, g;
      load_gradient<LOG, MASK>(y, dy, mask, n, part, q, g);
      total = fma(g, q, total);
    }
  });
  const Vec dot = broadcast(sum), factor = broadcast(scale);
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec q, g;
    load_gradient<LOG, MASK>(y, dy, mask, n, part, q, g);
    Vec d = LOG ? g - q * dot : q * (g - dot);
    if (MASK) d = zero_unless(seen(mask, n, part), d);  // a NaN of the row's own entries stays with them
    store(dx + n, d * factor, part);
  });
}

template <bool LOG, class T>
void backward_rows(const Softmax& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Place place = place_of(p.rows, i);
    int64_t N = columns_in_sight(p, place);
    const uint8_t* mask = mask_of(p, place, N);
    const T *y = row_of<const T>(p.y, place), *dy = row_of<const T>(p.dy, place);
    T* dx = row_of<T>(p.dx, place);
    if (mask != nullptr) {
      backward_row<LOG, true>(dx, dy, y, mask, p.scale, N);
    } else {
      backward_row<LOG, false>(dx, dy, y, nullptr, p.scale, N);
    }
    fill(dx, 0.f, N, p.N);
  }
}

}  // namespace

void softmax_rows(const Softmax& p, int threads) {
  const int64_t M = count(p.rows), width = (p.N + 15) / 16 * 16;
  threads = threads_of(threads, M);
  Scratch scratch(sizeof(float) * width * threads);
  for_rows(threads, M, p.N, [&](int64_t first, int64_t last, int thread) {
    float* s = (float*)scratch.data() + thread * width;
    with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
      using T = decltype(type);
      if (p.log) {
        forward_rows<true, T>(p, first, last, s);
      } else {
        forward_rows<false, T>(p, first, last, s);
      }
    });
  });
}

void softmax_rows_backward(const Softmax& p, int threads) {
  for_rows(threads, count(p.rows), p.N, [&](int64_t first, int64_t last, int) {
    with_type(p.y.type, [&](auto type) FASTATTN_LAMBDA {
      using T = decltype(type);
      if (p.log) {
        backward_rows<true, T>(p, first, last);
      } else {
        backward_rows<false, T>(p, first, last);
      }
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
