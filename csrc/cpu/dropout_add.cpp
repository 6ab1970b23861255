#include "dropout_add.h"

#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Columns start … start + size - 1 of row i
template <class Y, class X>
void add_piece(const DropoutAdd& p, int64_t i, int64_t start, int64_t size) {
  const Place place = place_of(p.rows, i);
  const uint64_t key = (uint64_t)*p.dropout.seed;
  const X* x = row_of<const X>(p.x, place) + start;
  const Y* residual = p.residual.data == nullptr ? nullptr : row_of<const Y>(p.residual, place) + start;
  Y* y = row_of<Y>(p.y, place) + start;
  for_columns<1>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = drop(load(x + n, part), i, start + n, p.dropout, key);
    if (residual != nullptr) v += load(residual + n, part);
    store(y + n, v, part);
  });
}

template <class T, class F>
void scale_piece(const Scale& p, int64_t i, int64_t start, int64_t size) {
  const float factor = load_one((const F*)p.factor.data + i * p.factor_step);
  if (p.out.data == p.x.data && factor == 1.f) return;
  const Place place = place_of(p.rows, i);
  const T* x = row_of<const T>(p.x, place) + start;
  T* out = row_of<T>(p.out, place) + start;
  for_columns<4>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    store(out + n, load(x + n, part) * broadcast(factor), part);
  });
}

}  // namespace

void dropout_add(const DropoutAdd& p, int threads) {
  for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
    with_type(p.y.type, [&](auto y_type) FASTATTN_LAMBDA {
      with_type(p.x.type, [&](auto x_type) FASTATTN_LAMBDA {
        add_piece<decltype(y_type), decltype(x_type)>(p, i, start, size);
      });
    });
  });
}

void scale_rows(const Scale& p, int threads) {
  with_type(p.factor.type, [&](auto factor_type) FASTATTN_LAMBDA {
    using F = decltype(factor_type);
    if (p.out.data == p.x.data && p.factor_step == 0 && load_one((const F*)p.factor.data) == 1.f) return;
    for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
      with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA { scale_piece<decltype(type), F>(p, i, start, size); });
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
