#include "attention_tile.h"

#include "dropout.h"
#include "simd_transpose.h"

namespace fastattn::FASTATTN_ISA {
namespace {

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
void load_entries(const T* x, const Lanes& lanes, int64_t stride, int n_0, int n, const Tile& t, float* dst) {
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

void load_entries(const Entries& x, const Tile& t, int b, int n_0, int n, float* dst) {
  const Lanes lanes(x, t, b);
  switch (x.dtype) {
    case DType::float32: return load_entries((const float*)x.data, lanes, x.n, n_0, n, t, dst);
    case DType::bfloat16: return load_entries((const bf16*)x.data, lanes, x.n, n_0, n, t, dst);
    case DType::float16: return load_entries((const fp16*)x.data, lanes, x.n, n_0, n, t, dst);
  }
}

// How much of a block of keys the rows of a tile see, by a bool mask alone
Seen seen_by_mask(const Entries& mask, const Tile& t, int b, int n_0, int n) {
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

}  // namespace

Seen seen(const AttentionParams& p, const Window& w, const Tile& t, int b, int lo, int hi) {
  if (lo >= hi) return Seen::nothing;
  const Seen in_window = w.whole(t, lo, hi) ? Seen::all : Seen::part;
  if (p.mask.data == nullptr) return in_window;
  const Seen masked = seen_by_mask(p.mask, t, b, lo, hi - lo);
  return masked == Seen::all ? in_window : masked;
}

void visible(const AttentionParams& p, const Window& w, const Tile& t, int b, int n_0, int n, int32_t* keep) {
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

void apply_score(const AttentionParams& p, const Sequence& sequence, const Score& score, const Tile& t, int b, int n_0,
                 int n, float* s, float* derivative, float* entries) {
  if (!score.prescaled) return;
  const int size = n * t.width;
  if (score.softcap != 0.f) {
    const Vec inner = broadcast(score.scale / score.softcap), outer = broadcast(score.softcap);
    for (int i = 0; i < size; i += LANES) {
      const Vec u = tanh(load(s + i) * inner);
      store(s + i, u * outer);
      if (derivative != nullptr) store(derivative + i, fma(-u, u, broadcast(1.f)));
    }
  } else {
    const Vec scale = broadcast(score.scale);
    for (int i = 0; i < size; i += LANES) store(s + i, load(s + i) * scale);
  }
  if (p.bias.data != nullptr) {
    load_entries(p.bias, t, b, n_0, n, entries);
    for (int i = 0; i < size; i += LANES) store(s + i, load(entries + i) + load(s + i));
  }
  if (!p.slopes.empty()) {
    const int shift = sequence.S_k - sequence.S_q;
    for (int j = 0; j < t.vectors(); ++j) {
      Vec slope{};
      for (int l = 0; l < LANES; ++l) slope[l] = p.slopes.data()[int64_t(b) * p.H + t.head[j * LANES + l]];
      for (int i = 0; i < n; ++i) {
        float* at = s + i * t.width + j * LANES;
        store(at, fma(-slope, distance(t.rows(j), shift, n_0 + i), load(at)));
      }
    }
  }
}

void dropout_factors(const AttentionParams& p, const Tile& t, int b, int n_0, int n, float* factors) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < t.vectors(); ++j) {
      const UInt c0 = (UInt)broadcast(int32_t(n_0 + i)), c3 = (UInt)broadcast(int32_t(b));
      const UInt word = philox(p.seed, c0, (UInt)t.rows(j), (UInt)t.heads(j), c3);
      store(factors + i * t.width + j * LANES, dropout_factor(word, p.dropout_threshold, p.dropout_scale));
    }
}

}  // namespace fastattn::FASTATTN_ISA
