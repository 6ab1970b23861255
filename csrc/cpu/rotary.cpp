// y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        inverse: with -sin
//
// Pairs of the first R = 2 · half elements are (i, i + half), or interleaved (2i, 2i + 1); the others are copied. A
// position is the token's index, or what positions say; of packed sequences, the index less where the token's sequence
// begins. One outside of the table gives NaN and reads nothing; tokens after the last sequence are not rotated.
#include "rotary.h"

#include "row_loops.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t MOST_TOKENS = 32;

// The angles of one token, for both elements of a pair: y = x · cos + partner · sin; null: it is not rotated
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

// `count` pieces of D elements, one after the other by steps of y and x, with the angles of piece k
template <class T, class AnglesOf>
FASTATTN_INLINE void rotate_pieces(
    const Rotary& p, T* y, const T* x, int64_t count, int64_t y_step, int64_t x_step, const AnglesOf& angles_of_piece) {
  const int64_t R = 2 * p.half, D = p.D;
  const float sign = p.inverse ? -1.f : 1.f;
  const bool interleaved = p.interleaved;
  for (int64_t k = 0; k < count; ++k, y += y_step, x += x_step) {
    const Angles angles = angles_of_piece(k);
    if (angles.cos == nullptr) {
      copy(y, x, 0, D);
      continue;
    }
    if (interleaved) {
      rotate_pairs(y, x, angles, R);
    } else {
      rotate_halves(y, x, angles, sign, R / 2);
    }
    copy(y, x, R, D);
  }
}

// Tokens (b, s) … (b, s + n - 1): one with all its heads, several head by head
template <class T>
FASTATTN_INLINE void rotate_tokens(const Rotary& p, int64_t b, int64_t s, const Angles* angles, int64_t n) {
  for (int i = 0; i < p.n_heads; ++i) {
    const RotaryHeads& of = p.heads[i];
    T* y = (T*)of.y + b * of.y_steps[0] + s * of.y_steps[2];
    const T* x = (const T*)of.x + b * of.x_steps[0] + s * of.x_steps[2];
    if (n == 1) {
      rotate_pieces(p, y, x, of.H, of.y_steps[1], of.x_steps[1],
                    [all = angles[0]](int64_t) FASTATTN_LAMBDA { return all; });
      continue;
    }
    for (int64_t h = 0; h < of.H; ++h, y += of.y_steps[1], x += of.x_steps[1]) {
      rotate_pieces(p, y, x, n, of.y_steps[2], of.x_steps[2],
                    [&](int64_t k) FASTATTN_LAMBDA { return angles[k]; });
    }
  }
}

// How many tokens to take head by head: one where its heads lie together, else several, which lie together, but not so
// many that threads go idle
FASTATTN_INLINE int64_t tile_of(const Rotary& p, int64_t tokens, int threads) {
  const RotaryHeads& of = p.heads[0];
  if (of.x_steps[1] <= of.x_steps[2]) return 1;
  return larger<int64_t>(1, smaller<int64_t>(MOST_TOKENS, tokens / (4 * threads)));
}

}  // namespace

void rotary(const Rotary& p, int threads) {
  int64_t heads = 0;
  for (int i = 0; i < p.n_heads; ++i) heads += p.heads[i].H;
  const int64_t tokens = p.B * p.S, width = 4 * p.half;
  threads = threads_of(threads, tokens);
  const int64_t tile = tile_of(p, tokens, threads);
  const int64_t grain = larger(GRAIN / larger<int64_t>(heads * p.D, 1), tile);
  Scratch scratch(sizeof(float) * width * tile * threads);
  parallel_ranges(threads, tokens, grain, [&](int64_t first, int64_t last, int thread) {
    float* room = (float*)scratch.data() + thread * tile * width;
    int64_t sequence = sequence_of(p, first % p.S);
    with_type(p.type, [&](auto type) FASTATTN_LAMBDA {
      Angles angles[MOST_TOKENS];
      for (int64_t token = first, n; token < last; token += n) {
        const int64_t b = token / p.S, s = token % p.S;
        n = smaller(smaller(tile, last - token), p.S - s);
        for (int64_t k = 0; k < n; ++k) {
          const int64_t position = position_of(p, b, s + k, sequence);
          const bool turned = p.cu_seqlens == nullptr || sequence < p.sequences;
          angles[k] = turned ? angles_of(p, b, position, room + k * width) : Angles{};
        }
        rotate_tokens<decltype(type)>(p, b, s, angles, n);
      }
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
