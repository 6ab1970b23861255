// What x̂ is multiplied with and what is added, as fp32.
#pragma once
#include "norm.h"
#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {

// `offset` + v, N elements; `absent` where v is null. The vector itself if it is that already, else in `room`.
FASTATTN_INLINE const float* widened(const Vector& v, float offset, float absent, int64_t N, float* room) {
  if (v.data == nullptr) {
    for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA { store(room + n, broadcast(absent), part); });
    return room;
  }
  if (v.type == DType::float32 && offset == 0.f) return (const float*)v.data;
  with_type(v.type, [&](auto type) FASTATTN_LAMBDA {
    const auto* p = (const decltype(type)*)v.data;
    for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
      store(room + n, load(p + n, part) + broadcast(offset), part);
    });
  });
  return room;
}

// Where rows of fp32 begin that are apart by N and the width of a vector
FASTATTN_INLINE int64_t padded(int64_t N) { return (N + 15) / 16 * 16; }

}  // namespace fastattn::FASTATTN_ISA
