// y = a(gate) · up
// dgate = dy · up · a'(gate)     dup = dy · a(gate)
#include "gated.h"

#include "activation.h"
#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Columns start … start + size - 1 of row i
template <Activation A, class T>
void forward(const Gated& p, int64_t i, int64_t start, int64_t size) {
  const Place place = place_of(p.rows, i);
  const T *gate = row_of<const T>(p.gate, place) + start, *up = row_of<const T>(p.up, place) + start;
  T* y = row_of<T>(p.y, place) + start;
  for_columns<2>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    store(y + n, activate<A, T>(load(gate + n, part)) * load(up + n, part), part);
  });
}

template <Activation A, class T>
void backward(const Gated& p, int64_t i, int64_t start, int64_t size) {
  const Place place = place_of(p.rows, i);
  const T *gate = row_of<const T>(p.gate, place) + start, *up = row_of<const T>(p.up, place) + start;
  const T* dy = row_of<const T>(p.dy, place) + start;
  T* dgate = p.dgate.data == nullptr ? nullptr : row_of<T>(p.dgate, place) + start;
  T* dup = p.dup.data == nullptr ? nullptr : row_of<T>(p.dup, place) + start;
  for_columns<1>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec slope;
    const Vec a = activate_with_slope<A, T>(load(gate + n, part), slope), d = load(dy + n, part);
    if (dgate != nullptr) store(dgate + n, d * load(up + n, part) * slope, part);
    if (dup != nullptr) store(dup + n, d * a, part);
  });
}

// call(T{}, activation), the latter as a type
template <Activation A>
struct Is {
  static constexpr Activation activation = A;
};
template <class Call>
FASTATTN_INLINE void choose(const Gated& p, const Call& call) {
  with_type(p.gate.type, [&](auto type) FASTATTN_LAMBDA {
    if (p.activation == Activation::silu) return call(type, Is<Activation::silu>{});
    if (p.activation == Activation::gelu) return call(type, Is<Activation::gelu>{});
    call(type, Is<Activation::gelu_tanh>{});
  });
}

}  // namespace

void gated_forward(const Gated& p, int threads) {
  for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
    choose(p, [&](auto type, auto is) FASTATTN_LAMBDA {
      forward<decltype(is)::activation, decltype(type)>(p, i, start, size);
    });
  });
}

void gated_backward(const Gated& p, int threads) {
  for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
    choose(p, [&](auto type, auto is) FASTATTN_LAMBDA {
      backward<decltype(is)::activation, decltype(type)>(p, i, start, size);
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
