// A tile of scores, transposed: s (N, width), keys by rows and queries by lanes, and what acts on it before a softmax.
#pragma once
#include "attention.h"
#include "pack.h"
#include "simd_math.h"

namespace fastattn::FASTATTN_ISA {

// Hands out pieces of a thread's memory; from nullptr it only counts.
class Memory {
 public:
  explicit Memory(char* begin) : begin_(begin) {}
  template <class T>
  void take(T*& at, int64_t elements) {
    at = begin_ == nullptr ? nullptr : (T*)(begin_ + used_);
    used_ += (elements * sizeof(T) + 63) / 64 * 64;
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

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
    int first, end;  // among G · S_q rows
    if (layout.shared()) {
      first = index * BLOCK_M;
      end = smaller(first + BLOCK_M, layout.G * layout.S_q);
    } else {
      const int g = index / layout.tiles_of_head(), block = index % layout.tiles_of_head();
      first = g * layout.S_q + block * BLOCK_M;
      end = smaller(first + BLOCK_M, (g + 1) * layout.S_q);
    }
    return of_rows(layout, h_kv * layout.G, first, end);
  }

  // Rows m_0 … m_0 + M - 1 of head h
  static FASTATTN_INLINE Tile of_head(int S_q, int h, int m_0) {
    return of_rows(RowLayout{1, S_q}, h, m_0, smaller(m_0 + BLOCK_M, S_q));
  }

  // The rows first … end - 1 of heads h, h + 1, … one after the other
  static FASTATTN_INLINE Tile of_rows(const RowLayout& layout, int h, int first, int end) {
    Tile t;
    t.n = end - first;
    t.width = round_up(t.n, 16);
    int row = first % layout.S_q, head = h + first / layout.S_q;
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

// Whether rows are read where they lie: floats whose rows are near each other, so that they do not share cache sets
template <class T>
FASTATTN_INLINE bool in_place(const Matrix& x, int D) {
  if (x.col != 1) return false;
  if constexpr (Element<T>::DEPTH == 2) return D % 2 == 0 && x.row == D;
  return std::is_same_v<T, float> && x.row >= D && x.row <= 2 * D;
}

// n rows of a matrix as A of a product over D: in place, or packed into `room`
template <class T>
FASTATTN_INLINE Operand rows_in_place(const Matrix& x, int D, const T* const* rows, int n, int32_t* room) {
  if (in_place<T>(x, D)) return {(const char*)rows[0], int64_t(x.row * sizeof(T)), 4};
  pack_rows(rows, n, x.col, D, depth_of<T>(D), room);
  return {(const char*)room, depth_of<T>(D) * 4, 4};
}

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

enum class Seen { nothing, part, all };

// How much of keys lo … hi - 1 the rows of a tile see
Seen seen(const AttentionParams& p, const Window& w, const Tile& t, int b, int lo, int hi);

// keep (N, width): -1 where a row sees a key
void visible(const AttentionParams& p, const Window& w, const Tile& t, int b, int n_0, int n, int32_t* keep);

// From q kᵀ to logits up to `factor`: logit = factor · s. With nothing but a positive scale, s is q kᵀ itself.
//
// A maximum is subtracted before anything is multiplied: exp2((s - max) · factor · log2 e) is exactly 1 at the maximum,
// however large, while a product of its own would leave half a unit in the last place of the logit in the exponent.
// The backward rounds as lse was rounded, for the same reason: exp2((factor · s - lse) · log2 e).
struct Score {
  bool prescaled;
  float factor, scale, softcap;

  explicit FASTATTN_INLINE Score(const AttentionParams& p)
      : prescaled(!(p.scale > 0.f) || p.softcap != 0.f || p.bias.data != nullptr || !p.slopes.empty()),
        factor(prescaled ? 1.f : p.scale),
        scale(p.scale),
        softcap(p.softcap) {}
};

// |i + S_k - S_q - j|, what ALiBi multiplies by the slope
FASTATTN_INLINE Vec distance(Int row, int shift, int key) { return abs(to_float(row + (shift - key))); }

// s: q kᵀ -> softcap · tanh(scale q kᵀ / softcap) + bias - slope · distance. `derivative`, unless nullptr: of the
// softcap, 1 - tanh². `entries`: room for a tile.
void apply_score(const AttentionParams& p, const Sequence& sequence, const Score& score, const Tile& t, int b, int n_0,
                 int n, float* s, float* derivative, float* entries);

// factors (N, width): what probabilities are multiplied by, 0 or the dropout scale. The counter of an entry is (column,
// row, head, sequence).
void dropout_factors(const AttentionParams& p, const Tile& t, int b, int n_0, int n, float* factors);

}  // namespace fastattn::FASTATTN_ISA
