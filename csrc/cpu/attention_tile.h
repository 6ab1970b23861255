// A tile of scores, transposed: s (N, width), keys by rows and queries by lanes, and what acts on it before the softmax.
#pragma once
#include "attention.h"
#include "dropout.h"
#include "pack.h"
#include "simd_math.h"

namespace fastattn::FASTATTN_ISA {

constexpr int VECTORS = BLOCK_M / LANES;

// Lane l is row row[l] of head head[l]. Lanes from n on repeat the last one; what they compute is never read.
struct Tile {
  int n = 0, width = 0;  // width: n rounded up to a multiple of 16
  int first_row = 0, last_row = 0;
  int32_t row[BLOCK_M], head[BLOCK_M];

  FASTATTN_INLINE Int rows(int j) const { return *(const UnalignedInt*)(row + j * LANES); }
  FASTATTN_INLINE Int heads(int j) const { return *(const UnalignedInt*)(head + j * LANES); }
  FASTATTN_INLINE int vectors() const { return width / LANES; }

  // Tile `index` of the heads that read key head h_kv; see RowLayout
  static FASTATTN_INLINE Tile of(const RowLayout& layout, int h_kv, int index) {
    Tile t;
    int first, end;  // among G · S_q rows
    if (layout.shared()) {
      first = index * BLOCK_M;
      end = smaller(first + BLOCK_M, layout.G * layout.S_q);
    } else {
      const int g = index / layout.tiles_of_head(), block = index % layout.tiles_of_head();
      first = g * layout.S_q + block * BLOCK_M;
      end = smaller(first + BLOCK_M, (g + 1) * layout.S_q);
    }
    t.n = end - first;
    t.width = round_up(t.n, 16);
    int row = first % layout.S_q, head = h_kv * layout.G + first / layout.S_q;
    const bool wraps = row + t.n > layout.S_q;  // into the next head
    t.first_row = wraps ? 0 : row;
    t.last_row = wraps ? layout.S_q - 1 : row + t.n - 1;
    for (int l = 0; l < BLOCK_M; ++l) {
      t.row[l] = row;
      t.head[l] = head;
      if (l + 1 >= t.n) continue;
      if (++row == layout.S_q) row = 0, ++head;
    }
    return t;
  }

  // The addresses of its rows in one sequence of a matrix
  template <class T>
  FASTATTN_INLINE void addresses(const Matrix& x, int b, int64_t first, const T* (&rows)[BLOCK_M]) const {
    const T* base = (const T*)x.data + b * x.b + first * x.row;
    for (int l = 0; l < n; ++l) rows[l] = base + head[l] * x.h + row[l] * x.row;
  }
};

// Row i sees keys j with i + low ≤ j ≤ i + high and 0 ≤ j < S_k.
struct Window {
  int64_t low, high;
  int S_k;

  static FASTATTN_INLINE Window of(const AttentionParams& p, const Sequence& s) {
    const int64_t shift = p.top_left ? 0 : s.S_k - s.S_q;
    const int64_t far = int64_t(s.S_q) + s.S_k + 1;
    return {p.left < 0 ? -far : shift - smaller(p.left, 2 * far), p.right < 0 ? far : shift + smaller(p.right, 2 * far),
            s.S_k};
  }
  // Keys first … end - 1 are those that any of its rows sees
  FASTATTN_INLINE int first(const Tile& t) const { return (int)larger(t.first_row + low, int64_t(0)); }
  FASTATTN_INLINE int end(const Tile& t) const {
    return (int)larger(smaller(t.last_row + high + 1, int64_t(S_k)), int64_t(0));
  }
  // Whether every row sees all of keys lo … hi - 1
  FASTATTN_INLINE bool whole(const Tile& t, int lo, int hi) const {
    return lo >= t.last_row + low && hi - 1 <= t.first_row + high;
  }
};

// What a lane reads from a broadcast tensor: element offset[l] for key 0, then every n elements
struct Lanes {
  int64_t offset[BLOCK_M];
  bool uniform;  // all lanes read the same

  FASTATTN_INLINE Lanes(const Entries& x, const Tile& t, int b) : uniform(true) {
    for (int l = 0; l < BLOCK_M; ++l) {
      offset[l] = b * x.b + t.head[l] * x.h + t.row[l] * x.m;
      uniform = uniform && offset[l] == offset[0];
    }
  }
};

// dst (n, width): entries (key n_0 + i, lane) of a broadcast tensor, as floats
template <class T>
static void load_entries(const T* x, const Lanes& lanes, int64_t stride, int n_0, int n, const Tile& t, float* dst) {
  x += n_0 * stride;
  if (lanes.uniform) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < t.vectors(); ++j)
        store(dst + i * t.width + j * LANES, broadcast(load_one(x + lanes.offset[0] + i * stride)));
    return;
  }
  if (stride == 1) {
    for (int m = 0; m < t.width; m += LANES)
      for (int i = 0; i < n; i += LANES) {
        Int block[LANES];
        const int rows = smaller(LANES, n - i);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) {
          const T* at = x + lanes.offset[m + l] + i;
          block[l] = as_int(rows == LANES ? load(at) : load(at, rows));
        }
        transpose(block);
        for (int k = 0; k < rows; ++k) store(dst + (i + k) * t.width + m, as_float(block[k]));
      }
    return;
  }
  for (int l = 0; l < t.width; ++l)
    for (int i = 0; i < n; ++i) dst[i * t.width + l] = load_one(x + lanes.offset[l] + i * stride);
}

static void load_entries(const Entries& x, const Tile& t, int b, int n_0, int n, float* dst) {
  const Lanes lanes(x, t, b);
  switch (x.dtype) {
    case DType::float32: return load_entries((const float*)x.data, lanes, x.n, n_0, n, t, dst);
    case DType::bfloat16: return load_entries((const bf16*)x.data, lanes, x.n, n_0, n, t, dst);
    case DType::float16: return load_entries((const fp16*)x.data, lanes, x.n, n_0, n, t, dst);
  }
}

enum class Seen { nothing, part, all };

// How much of a block of keys the rows of a tile see, by a bool mask alone
static Seen seen_by_mask(const Entries& mask, const Tile& t, int b, int n_0, int n) {
  const Lanes lanes(mask, t, b);
  bool any = false, all = true;
  for (int l = 0; l < (lanes.uniform ? 1 : t.n) && !(any && !all); ++l) {
    const char* x = mask.data + lanes.offset[l] + n_0 * mask.n;
    if (mask.n == 1) {
      int i = 0;
      uint64_t either = 0, both = ~uint64_t(0);
      for (; i + 8 <= n; i += 8) {
        uint64_t eight;
        memcpy(&eight, x + i, 8);
        either |= eight;
        both &= eight;
      }
      any = any || either != 0;
      all = all && (both & 0x0101010101010101u) == 0x0101010101010101u;
      for (; i < n; ++i) any = any || x[i], all = all && x[i];
    } else {
      for (int i = 0; i < n; ++i) any = any || x[i * mask.n], all = all && x[i * mask.n];
    }
  }
  return !any ? Seen::nothing : all ? Seen::all : Seen::part;
}

FASTATTN_INLINE Seen seen(const AttentionParams& p, const Window& w, const Tile& t, int b, int lo, int hi) {
  if (lo >= hi) return Seen::nothing;
  const Seen in_window = w.whole(t, lo, hi) ? Seen::all : Seen::part;
  if (p.mask.data == nullptr) return in_window;
  const Seen masked = seen_by_mask(p.mask, t, b, lo, hi - lo);
  return masked == Seen::all ? in_window : masked;
}

// keep (N, width): -1 where a row sees a key
static void visible(const AttentionParams& p, const Window& w, const Tile& t, int b, int n_0, int n, int32_t* keep) {
  const bool masked = p.mask.data != nullptr;
  if (masked) {
    const Lanes lanes(p.mask, t, b);
    load_entries((const uint8_t*)p.mask.data, lanes, p.mask.n, n_0, n, t, (float*)keep);
  }
  for (int j = 0; j < t.vectors(); ++j) {
    const Int low = t.rows(j) + (int32_t)w.low, high = t.rows(j) + (int32_t)w.high;
    for (int i = 0; i < n; ++i) {
      UnalignedInt* at = (UnalignedInt*)(keep + i * t.width + j * LANES);
      const Int key = broadcast(int32_t(n_0 + i));
      const Int in_window = (key >= low) & (key <= high);
      *at = masked ? in_window & (*at != 0) : in_window;
    }
  }
}

// From q kᵀ to logits in base 2 up to `factor`: exp(logit) = exp2(factor · s). With nothing but a positive scale,
// s is q kᵀ itself and factor = scale · log2 e.
struct Score {
  bool prescaled;
  float factor, scale, softcap;

  explicit FASTATTN_INLINE Score(const AttentionParams& p)
      : prescaled(!(p.scale > 0.f) || p.softcap != 0.f || p.bias.data != nullptr || !p.slopes.empty()),
        factor(prescaled ? 1.f : p.scale * LOG2_E),
        scale(p.scale),
        softcap(p.softcap) {}
};

// |i + S_k - S_q - j|, what ALiBi multiplies by the slope
FASTATTN_INLINE Vec distance(Int row, int shift, int key) { return abs(to_float(row + (shift - key))); }

// s: q kᵀ -> softcap · tanh(scale q kᵀ / softcap) + bias - slope · distance, in base 2. `derivative`, unless nullptr:
// of the softcap, 1 - tanh². `entries`: room for a tile.
static void apply_score(const AttentionParams& p, const Sequence& sequence, const Score& score, const Tile& t, int b,
                        int n_0, int n, float* s, float* derivative, float* entries) {
  if (!score.prescaled) return;
  const int size = n * t.width;
  if (score.softcap != 0.f) {
    const Vec inner = broadcast(score.scale / score.softcap), outer = broadcast(score.softcap * LOG2_E);
    for (int i = 0; i < size; i += LANES) {
      const Vec u = tanh(load(s + i) * inner);
      store(s + i, u * outer);
      if (derivative != nullptr) store(derivative + i, fma(-u, u, broadcast(1.f)));
    }
  } else {
    const Vec scale = broadcast(score.scale * LOG2_E);
    for (int i = 0; i < size; i += LANES) store(s + i, load(s + i) * scale);
  }
  if (p.bias.data != nullptr) {
    load_entries(p.bias, t, b, n_0, n, entries);
    for (int i = 0; i < size; i += LANES) store(s + i, fma(load(entries + i), broadcast(LOG2_E), load(s + i)));
  }
  if (!p.slopes.empty()) {
    const int shift = sequence.S_k - sequence.S_q;
    for (int j = 0; j < t.vectors(); ++j) {
      Vec slope{};
      for (int l = 0; l < LANES; ++l) slope[l] = p.slopes.data()[int64_t(b) * p.H + t.head[j * LANES + l]] * LOG2_E;
      for (int i = 0; i < n; ++i) {
        float* at = s + i * t.width + j * LANES;
        store(at, fma(-slope, distance(t.rows(j), shift, n_0 + i), load(at)));
      }
    }
  }
}

static void hide(const int32_t* keep, int size, float* s) {
  for (int i = 0; i < size; i += LANES)
    store(s + i, select(*(const UnalignedInt*)(keep + i), load(s + i), broadcast(-__builtin_inff())));
}

FASTATTN_INLINE Vec dropout_factor(const AttentionParams& p, const Tile& t, int b, int j, int key) {
  const UInt c0 = (UInt)broadcast(int32_t(key)), c3 = (UInt)broadcast(int32_t(b));
  const UInt word = philox(p.seed, c0, (UInt)t.rows(j), (UInt)t.heads(j), c3);
  return dropout_factor(word, p.dropout_threshold, p.dropout_scale);
}

}  // namespace fastattn::FASTATTN_ISA
