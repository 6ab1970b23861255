#include "dropout_add.h"

#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class Y, class X>
void add(const DropoutAdd& p, int threads) {
  const uint64_t key = (uint64_t)*p.dropout.seed;
  for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
    const Place place = place_of(p.rows, i);
    const X* x = row_of<const X>(p.x, place) + start;
    const Y* residual = p.residual.data == nullptr ? nullptr : row_of<const Y>(p.residual, place) + start;
    Y* y = row_of<Y>(p.y, place) + start;
    for_columns<2>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
      Vec v = drop(load(x + n, part), i, start + n, p.dropout, key);
      if (residual != nullptr) v += load(residual + n, part);
      store(y + n, v, part);
    });
  });
}

}  // namespace

void dropout_add(const DropoutAdd& p, int threads) {
  with_type(p.y.type, [&](auto y_type) FASTATTN_LAMBDA {
    with_type(p.x.type, [&](auto x_type) FASTATTN_LAMBDA { add<decltype(y_type), decltype(x_type)>(p, threads); });
  });
}

void scale_rows(const Scale& p, int threads) {
  const bool in_place = p.out.data == p.x.data;
  with_type(p.x.type, [&](auto type) FASTATTN_LAMBDA {
    using T = decltype(type);
    with_type(p.factor.type, [&](auto factor_type) FASTATTN_LAMBDA {
      const auto* factors = (const decltype(factor_type)*)p.factor.data;
      if (in_place && p.factor_step == 0 && load_one(factors) == 1.f) return;
      for_pieces(threads, count(p.rows), p.N, [&](int64_t i, int64_t start, int64_t size) FASTATTN_LAMBDA {
        const float factor = load_one(factors + i * p.factor_step);
        if (in_place && factor == 1.f) return;
        const Place place = place_of(p.rows, i);
        const T* x = row_of<const T>(p.x, place) + start;
        T* out = row_of<T>(p.out, place) + start;
        for_columns<4>(size, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
          store(out + n, load(x + n, part) * broadcast(factor), part);
        });
      });
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
