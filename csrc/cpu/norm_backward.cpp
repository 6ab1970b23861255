// g = dy · weight
// dh += rstd · (g - mean_n(g) - x̂ · mean_n(g · x̂))    RMSNorm: without mean_n(g);   on top of the gradient of h
// dresidual = dh       dx = dropout(dh)
// dweight = Σ_m dy · x̂           dbias = Σ_m dy
//
// x̂ = (h - mean) · rstd, or (y - bias) / weight where y was kept. Rows are read twice, the second time from the cache.
// Blocks of rows, which depend on M alone, each sum their part of dweight and dbias; the parts are added in order.
#include "norm.h"
#include "norm_parameters.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t BACKWARD_SPAN = 256 * LANES;  // SPAN for sums of one accumulator
constexpr int TILE = 4;  // rows that share one read and write of the sums of dweight and dbias
constexpr int64_t WORTH_A_TILE = 512;  // columns; shorter rows side by side are streams too short to be fetched ahead
constexpr int64_t ROWS_PER_PART = 16, MOST_PARTS = 128;

// One row: x̂ = (base - mean) · scale
template <class Base, class Dy>
struct Row {
  const Base* base;
  const Dy* dy;
  float mean, scale;
  float g_mean, dot_mean;  // of g and g · x̂, from `row_sums`
};

// x̂ where y was kept, in fp32
template <class Y>
void recover(const Y* y, const float* weight, const float* bias, float* x_hat, int64_t N) {
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    store(x_hat + n, (load(y + n, part) - load(bias + n, part)) / load(weight + n, part), part);
  });
}

// Means over ROWS rows, whose dy · x̂ and dy are added to dweight and dbias (N,) if SUMS
template <bool RMS, bool SUMS, int ROWS, class Base, class Dy>
void row_sums(Row<Base, Dy>* rows, const float* weight, float* dweight, float* dbias, int64_t N) {
  double g_total[ROWS] = {}, dot_total[ROWS] = {};
  Vec mean[ROWS], scale[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    mean[r] = broadcast(rows[r].mean);
    scale[r] = broadcast(rows[r].scale);
  }
  for (int64_t start = 0; start < N; start += BACKWARD_SPAN) {
    Vec g_sum[ROWS] = {}, dot[ROWS] = {};
    for_columns<1>(smaller(BACKWARD_SPAN, N - start), [&](int64_t column, auto part, int) FASTATTN_LAMBDA {
      const int64_t n = start + column;
      const Vec w = load(weight + n, part);
      Vec dw{}, db{};
      if (SUMS) {
        dw = load(dweight + n, part);
        if (!RMS) db = load(dbias + n, part);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vec dy = load(rows[r].dy + n, part);
        const Vec x_hat = only(part, (load(rows[r].base + n, part) - mean[r]) * scale[r]);
        const Vec g = dy * w;
        dot[r] = fma(g, x_hat, dot[r]);
        if (!RMS) g_sum[r] += g;
        if (SUMS) {
          dw = fma(dy, x_hat, dw);
          if (!RMS) db += dy;
        }
      }
      if (SUMS) {
        store(dweight + n, dw, part);
        if (!RMS) store(dbias + n, db, part);
      }
    });
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      g_total[r] += reduce_sum(g_sum[r]);
      dot_total[r] += reduce_sum(dot[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    rows[r].g_mean = RMS ? 0.f : (float)g_total[r] / (float)N;
    rows[r].dot_mean = (float)dot_total[r] / (float)N;
  }
}

// out = rstd · (g - mean_n(g) - x̂ · mean_n(g · x̂))
template <class Base, class Dy, class Out>
void store_gradient(Out* out, const Row<Base, Dy>& row, float rstd, const float* weight, int64_t N) {
  const Vec mean = broadcast(row.mean), scale = broadcast(row.scale), rstd_ = broadcast(rstd);
  const Vec g_mean = broadcast(row.g_mean), dot_mean = broadcast(row.dot_mean);
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    const Vec x_hat = (load(row.base + n, part) - mean) * scale;
    const Vec g = load(row.dy + n, part) * load(weight + n, part) - g_mean;
    store(out + n, (g - x_hat * dot_mean) * rstd_, part);
  });
}

// total (N,) += dh, stored as dresidual
template <class H>
void add_stream(float* total, const H* dh, H* dresidual, int64_t N) {
  for_columns<4>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = load(total + n, part);
    if (dh != nullptr) v += load(dh + n, part);
    store(total + n, v, part);
    if (dresidual != nullptr) store(dresidual + n, v, part);
  });
}

// dx = dropout(total)
template <class X>
void store_dropped(X* dx, const float* total, int64_t N, int64_t i, const RowDropout& dropout) {
  const uint64_t key = dropout.seed == nullptr ? 0 : (uint64_t)*dropout.seed;
  for_columns<1>(N, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
    Vec v = load(total + n, part);
    if (dropout.seed != nullptr) v = drop(v, i, n, dropout, key);
    store(dx + n, v, part);
  });
}

struct Room {
  float *total, *x_hat;          // (N,); (TILE, width)
  const float *weight, *bias;    // (N,)
  float *dweight, *dbias;        // (N,), sums of a block of rows, or null
  int64_t width;
};

template <class Base, class Dy>
void finish_row(const NormBackward& p, int64_t i, Place place, const Row<Base, Dy>& row, float rstd, const Room& room) {
  if (p.dx.data == nullptr && p.dresidual.data == nullptr) return;
  if constexpr (sizeof(Base) == sizeof(Dy)) {
    const bool plain = p.dresidual.data == nullptr && p.dh.data == nullptr && p.dropout.seed == nullptr;
    if (plain && p.dx.type == p.dy.type) {
      return store_gradient(row_of<Dy>(p.dx, place), row, rstd, room.weight, p.N);
    }
  }
  store_gradient(room.total, row, rstd, room.weight, p.N);
  if (p.dh.data != nullptr || p.dresidual.data != nullptr) {
    with_type(p.dh.data != nullptr ? p.dh.type : p.dresidual.type, [&](auto type) FASTATTN_LAMBDA {
      using H = decltype(type);
      const H* dh = p.dh.data == nullptr ? nullptr : row_of<H>(p.dh, place);
      H* dresidual = p.dresidual.data == nullptr ? nullptr : row_of<H>(p.dresidual, place);
      add_stream(room.total, dh, dresidual, p.N);
    });
  }
  if (p.dx.data != nullptr) {
    with_type(p.dx.type, [&](auto type) FASTATTN_LAMBDA {
      store_dropped(row_of<decltype(type)>(p.dx, place), room.total, p.N, i, p.dropout);
    });
  }
}

// Rows i … i + ROWS - 1
template <bool RMS, int ROWS, class Base, class Dy>
void backward_rows(const NormBackward& p, int64_t i, const Room& room) {
  const float* rstd = p.stats + (RMS ? 0 : count(p.rows)) + i;
  Row<Base, Dy> rows[ROWS];
  Place places[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    places[r] = place_of(p.rows, i + r);
    rows[r] = {nullptr, row_of<const Dy>(p.dy, places[r]), RMS ? 0.f : p.stats[i + r], rstd[r], 0.f, 0.f};
    if (!p.from_y) {
      rows[r].base = row_of<const Base>(p.base, places[r]);
    } else if constexpr (sizeof(Base) == 4) {
      float* x_hat = room.x_hat + r * room.width;
      with_type(p.base.type, [&](auto type) FASTATTN_LAMBDA {
        recover(row_of<decltype(type)>(p.base, places[r]), room.weight, room.bias, x_hat, p.N);
      });
      rows[r].base = x_hat;
      rows[r].mean = 0.f;
      rows[r].scale = 1.f;
    }
  }
  if (room.dweight != nullptr) {
    row_sums<RMS, true, ROWS>(rows, room.weight, room.dweight, room.dbias, p.N);
  } else {
    row_sums<RMS, false, ROWS>(rows, room.weight, nullptr, nullptr, p.N);
  }
  for (int r = 0; r < ROWS; ++r) finish_row(p, i + r, places[r], rows[r], rstd[r], room);
}

template <bool RMS, class Base, class Dy>
void backward_block(const NormBackward& p, int64_t first, int64_t last, const Room& room) {
  int64_t i = first;
  for (; p.N >= WORTH_A_TILE && i + TILE <= last; i += TILE) backward_rows<RMS, TILE, Base, Dy>(p, i, room);
  for (; i < last; ++i) backward_rows<RMS, 1, Base, Dy>(p, i, room);
}

template <class Base, class Dy>
void choose_block(const NormBackward& p, int64_t first, int64_t last, const Room& room) {
  if (p.rms) {
    backward_block<true, Base, Dy>(p, first, last, room);
  } else {
    backward_block<false, Base, Dy>(p, first, last, room);
  }
}

// out (N,) = Σ of `parts` vectors (N,) that are `width` apart, columns first … last - 1
void add_parts(const Vector& out, const float* parts, int64_t n_parts, int64_t width, int64_t first, int64_t last) {
  if (out.data == nullptr) return;
  with_type(out.type, [&](auto type) FASTATTN_LAMBDA {
    auto* to = (decltype(type)*)out.data + first;
    for_columns<1>(last - first, [&](int64_t n, auto part, int) FASTATTN_LAMBDA {
      Vec total{};
      for (int64_t k = 0; k < n_parts; ++k) total += load(parts + k * width + first + n, part);
      store(to + n, total, part);
    });
  });
}

}  // namespace

// base and dy have one type, or base is fp32, or, of y that was kept, any
void norm_backward(const NormBackward& p, int threads) {
  const int64_t M = count(p.rows), N = p.N, width = padded(N);
  const bool sums = p.dweight.data != nullptr || p.dbias.data != nullptr;
  const int64_t worth = larger<int64_t>(smaller<int64_t>(4 * GRAIN / N, ROWS_PER_PART), TILE);
  const int64_t block = larger<int64_t>((M + MOST_PARTS - 1) / MOST_PARTS, worth);
  const int64_t n_parts = (M + block - 1) / block;
  threads = threads_of(threads, n_parts);
  const int64_t per_thread = (1 + TILE) * width, n_sums = sums ? n_parts * width : 0;
  Scratch scratch(sizeof(float) * (2 * width + threads * per_thread + 2 * n_sums));
  float* room = (float*)scratch.data();
  float* dweight = room + 2 * width + threads * per_thread;
  float* dbias = dweight + n_sums;
  const float* weight = widened(p.weight, p.weight_offset, 1.f, N, room);
  const float* bias = p.from_y ? widened(p.bias, 0.f, 0.f, N, room + width) : nullptr;
  parallel_shares(M * N < 2 * GRAIN ? 1 : threads, n_parts, [&](int64_t part, int thread) {
    float* own = room + 2 * width + thread * per_thread;
    Room mine{own, own + width, weight, bias, nullptr, nullptr, width};
    if (sums) {
      mine.dweight = dweight + part * width;
      mine.dbias = dbias + part * width;
      memset(mine.dweight, 0, sizeof(float) * width);
      memset(mine.dbias, 0, sizeof(float) * width);
    }
    const int64_t first = part * block, last = smaller(first + block, M);
    with_type(p.dy.type, [&](auto type) FASTATTN_LAMBDA {
      using Dy = decltype(type);
      if (p.from_y || p.base.type == DType::float32) {
        choose_block<float, Dy>(p, first, last, mine);
      } else {
        choose_block<Dy, Dy>(p, first, last, mine);
      }
    });
  });
  if (!sums) return;
  parallel_ranges(n_parts * N < 2 * GRAIN ? 1 : threads, N, 512, [&](int64_t first, int64_t last, int) {
    add_parts(p.dweight, dweight, n_parts, width, first, last);
    add_parts(p.dbias, dbias, n_parts, width, first, last);
  });
}

}  // namespace fastattn::FASTATTN_ISA
