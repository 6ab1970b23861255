// y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        inverse: with -sin
//
// Pairs of the first R = 2 · half elements are (i, i + half), or interleaved (2i, 2i + 1); the others are copied. A
// position is the token's index, or what positions say; of packed sequences, the index less where the token's sequence
// begins. One outside of the table gives NaN and reads nothing; tokens after the last sequence are not rotated.
#include "rotary.h"

#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The angles of one token, for both elements of a pair: y = x · cos + partner · sin
struct Angles {
  const float *cos, *sin;  // (half,); interleaved (R,), with the signs of sin
};

template <class T>
FASTATTN_INLINE void rotate_halves(T* y, const T* x, const Angles& a, float sign, int64_t half) {
  for_columns<2>(half, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec x1 = load(x + n, part), x2 = load(x + half + n, part);
    const Vec c = load(a.cos + n, part), s = load(a.sin + n, part) * broadcast(sign);
    store(y + n, fma(x1, c, -(x2 * s)), part);
    store(y + half + n, fma(x2, c, x1 * s), part);
  });
}

FASTATTN_INLINE Vec partners(Vec x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

template <class T>
FASTATTN_INLINE void rotate_pairs(T* y, const T* x, const Angles& a, int64_t R) {
  for_columns<2>(R, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec v = load(x + n, part);
    store(y + n, fma(v, load(a.cos + n, part), partners(v) * load(a.sin + n, part)), part);
  });
}

template <class T>
FASTATTN_INLINE void copy(T* y, const T* x, int64_t first, int64_t last) {
  if (y != x && last > first) memcpy(y + first, x + first, sizeof(T) * (last - first));
}

// The first packed sequence that ends after token s; p.sequences if none does
FASTATTN_INLINE int64_t sequence_of(const Rotary& p, int64_t s) {
  if (p.cu_seqlens == nullptr) return 0;
  int64_t low = 0, high = p.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle + 1] <= s) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The position of token (b, s); `sequence` is the one of the token before it, and becomes its own
FASTATTN_INLINE int64_t position_of(const Rotary& p, int64_t b, int64_t s, int64_t& sequence) {
  if (p.positions != nullptr) return p.positions[b * p.position_batch + s];
  if (p.cu_seqlens == nullptr) return s;
  while (sequence < p.sequences && p.cu_seqlens[sequence + 1] <= s) ++sequence;
  return s - p.cu_seqlens[sequence];
}

// The angles of a token, in `room` (2 R,) where they are not read as they lie
FASTATTN_INLINE Angles angles_of(const Rotary& p, int64_t b, int64_t position, float* room) {
  const bool known = position >= 0 && position < p.table_rows;
  const float* cos = p.cos + b * p.table_batch + position * p.half;
  const float* sin = p.sin + b * p.table_batch + position * p.half;
  if (known && !p.interleaved) return {cos, sin};
  const int64_t R = 2 * p.half;
  if (!known) {
    for (int64_t r = 0; r < 2 * R; ++r) room[r] = __builtin_nanf("");
    return {room, room + R};
  }
  const float sign = p.inverse ? -1.f : 1.f;
  for (int64_t i = 0; i < p.half; ++i) {
    room[2 * i] = room[2 * i + 1] = cos[i];
    room[R + 2 * i] = -sign * sin[i];
    room[R + 2 * i + 1] = sign * sin[i];
  }
  return {room, room + R};
}

template <class T>
FASTATTN_INLINE void rotate_token(const Rotary& p, int64_t b, int64_t s, bool turned, const Angles& angles) {
  for (int i = 0; i < p.n_heads; ++i) {
    const RotaryHeads& of = p.heads[i];
    T* y = (T*)of.y + b * of.y_steps[0] + s * of.y_steps[2];
    const T* x = (const T*)of.x + b * of.x_steps[0] + s * of.x_steps[2];
    for (int64_t h = 0; h < of.H; ++h, y += of.y_steps[1], x += of.x_steps[1]) {
      if (!turned) {
        copy(y, x, 0, p.D);
        continue;
      }
      if (p.interleaved) {
        rotate_pairs(y, x, angles, 2 * p.half);
      } else {
        rotate_halves(y, x, angles, p.inverse ? -1.f : 1.f, p.half);
      }
      copy(y, x, 2 * p.half, p.D);
    }
  }
}

}  // namespace

void rotary(const Rotary& p, int threads) {
  int64_t heads = 0;
  for (int i = 0; i < p.n_heads; ++i) heads += p.heads[i].H;
  const int64_t tokens = p.B * p.S, width = 4 * p.half;
  threads = threads_of(threads, tokens);
  Scratch scratch(sizeof(float) * width * threads);
  for_rows(threads, tokens, heads * p.D, [&](int64_t first, int64_t last, int thread) {
    float* room = (float*)scratch.data() + thread * width;
    int64_t sequence = sequence_of(p, first % p.S);
    with_type(p.type, [&](auto type) FASTATTN_LAMBDA {
      for (int64_t token = first; token < last; ++token) {
        const int64_t b = token / p.S, s = token % p.S;
        const int64_t position = position_of(p, b, s, sequence);
        const bool turned = p.cu_seqlens == nullptr || sequence < p.sequences;
        const Angles angles = turned ? angles_of(p, b, position, room) : Angles{};
        rotate_token<decltype(type)>(p, b, s, turned, angles);
      }
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
