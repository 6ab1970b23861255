// The same along a dimension that is not the contiguous one: LANES neighbours side by side, element after element.
// The equations are in softmax.cpp. A line is read three times, which while it fits a cache costs little.
#include "exponential.h"
#include "row_loops.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float INF = __builtin_inff();
constexpr int WIDTH = 4;  // vectors

FASTATTN_INLINE int size_of(All) { return LANES; }
FASTATTN_INLINE int size_of(First part) { return part.n; }

// call(first, last) for the elements of a line, as many at a time as a sum adds up before that is added to the others
template <class Call>
FASTATTN_INLINE void for_spans(int64_t N, const Call& call) {
  constexpr int64_t SIZE = 1024;
  for (int64_t first = 0; first < N; first += SIZE) call(first, smaller(first + SIZE, N));
}

// Which of n neighbouring lines see an entry
FASTATTN_INLINE Int seen(const uint8_t* mask, int64_t step, int n) {
  return load_strided(mask, step, n) != broadcast(0.f);
}

// Lines of `part` lanes from column m of row (i0, i1) on
template <bool LOG, bool MASK, class T, class Part>
FASTATTN_INLINE void forward_lines(const Softmax& p, Place place, Part part) {
  const T* x = row_of<const T>(p.x, place);
  T* y = row_of<T>(p.y, place);
  const uint8_t* mask = MASK ? row_of<const uint8_t>(p.mask, place) : nullptr;
  const Vec scale = broadcast(p.scale);
  const auto keep = [&](int64_t j) FASTATTN_LAMBDA {
    return seen(mask + j * p.along_mask, p.mask.steps[2], size_of(part));
  };
  const auto score = [&](int64_t j) FASTATTN_LAMBDA {
    const Vec s = load(x + j * p.along_x, part) * scale;
    return MASK ? select(keep(j), s, broadcast(-INF)) : s;
  };
  Vec highest = broadcast(-INF), sum{};
  for (int64_t j = 0; j < p.N; ++j) highest = max(highest, score(j));
  for_spans(p.N, [&](int64_t first, int64_t last) FASTATTN_LAMBDA {
    Vec own{};
    for (int64_t j = first; j < last; ++j) own += exp_for(score(j) - highest, T{});
    sum += own;
  });
  const Vec log_sum = LOG ? log(sum) : Vec{}, by = broadcast(1.f) / sum;
  for (int64_t j = 0; j < p.N; ++j) {
    const Vec s = score(j) - highest;
    Vec v = LOG ? s - log_sum : exp_for(s, T{}) * by;
    if (MASK) v = select(keep(j), v, broadcast(LOG ? -INF : 0.f));
    store(y + j * p.along_y, v, part);
  }
}

template <bool LOG, bool MASK, class T, class Part>
FASTATTN_INLINE void backward_lines(const Softmax& p, Place place, Part part) {
  const T *y = row_of<const T>(p.y, place), *dy = row_of<const T>(p.dy, place);
  T* dx = row_of<T>(p.dx, place);
  const uint8_t* mask = MASK ? row_of<const uint8_t>(p.mask, place) : nullptr;
  const auto keep = [&](int64_t j) FASTATTN_LAMBDA {
    return seen(mask + j * p.along_mask, p.mask.steps[2], size_of(part));
  };
  const auto probability = [&](int64_t j) FASTATTN_LAMBDA {
    Vec v = load(y + j * p.along_y, part);
    if (LOG) v = exp_for(v, T{});
    return MASK ? zero_unless(keep(j), v) : v;
  };
  const auto gradient = [&](int64_t j) FASTATTN_LAMBDA {
    const Vec v = load(dy + j * p.along_dy, part);
    return MASK ? zero_unless(keep(j), v) : v;
  };
  Vec dot{};
  for_spans(p.N, [&](int64_t first, int64_t last) FASTATTN_LAMBDA {
    Vec own{};
    for (int64_t j = first; j < last; ++j) own = LOG ? own + gradient(j) : fma(gradient(j), probability(j), own);
    dot += own;
  });
  for (int64_t j = 0; j < p.N; ++j) {
    const Vec q = probability(j), g = gradient(j);
    Vec d = LOG ? g - q * dot : q * (g - dot);
    if (MASK) d = zero_unless(keep(j), d);
    store(dx + j * p.along_dx, d * broadcast(p.scale), part);
  }
}

// lines(place, part) for strips of the R2 neighbours of every row (i0, i1)
template <class Call>
FASTATTN_INLINE void for_lines(const Softmax& p, int threads, const Call& call) {
  const int64_t M = p.rows.R2, strips = (M + WIDTH * LANES - 1) / (WIDTH * LANES);
  const int64_t grain = GRAIN / (WIDTH * LANES * (p.N < 1 ? 1 : p.N)) + 1;
  parallel_ranges(threads, p.rows.R0 * p.rows.R1 * strips, grain, [&](int64_t first, int64_t last, int) {
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t outer = strip / strips, start = strip % strips * (WIDTH * LANES);
      const int64_t end = smaller<int64_t>(M, start + WIDTH * LANES);
      for (int64_t m = start; m < end; m += LANES) {
        const Place place{outer / p.rows.R1, outer % p.rows.R1, m};
        if (m + LANES <= end) {
          call(place, All{});
        } else {
          call(place, First{int(end - m)});
        }
      }
    }
  });
}

template <bool LOG, bool MASK, class T>
void forward(const Softmax& p, int threads) {
  for_lines(p, threads, [&](Place place, auto part) { forward_lines<LOG, MASK, T>(p, place, part); });
}
template <bool LOG, bool MASK, class T>
void backward(const Softmax& p, int threads) {
  for_lines(p, threads, [&](Place place, auto part) { backward_lines<LOG, MASK, T>(p, place, part); });
}

}  // namespace

void softmax_columns(const Softmax& p, int threads) {
  with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
    using T = decltype(type);
    if (p.mask.data != nullptr) {
      p.log ? forward<true, true, T>(p, threads) : forward<false, true, T>(p, threads);
    } else {
      p.log ? forward<true, false, T>(p, threads) : forward<false, false, T>(p, threads);
    }
  });
}

void softmax_columns_backward(const Softmax& p, int threads) {
  with_type(p.y.type, [&](auto type) FASTATTN_LAMBDA {
    using T = decltype(type);
    if (p.mask.data != nullptr) {
      p.log ? backward<true, true, T>(p, threads) : backward<false, true, T>(p, threads);
    } else {
      p.log ? backward<true, false, T>(p, threads) : backward<false, false, T>(p, threads);
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA
