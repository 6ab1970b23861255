// LayerNorm and RMSNorm over rows, behind a residual sum, forward and backward.
//
//   h = residual + x, rounded to residual's type;   x where there is no residual
//   LayerNorm   x̂ = (h - mean) · rstd    rstd = 1 / √(Σ (h - mean)² / N + eps)   y = x̂ · (offset + weight) + bias
//   RMSNorm     x̂ = h · rstd               rstd = 1 / √(Σ h² / N + eps)
//
//   g = dy · (offset + weight)
//   dresidual = dh + rstd · (g - Σ g / N - x̂ · Σ (g · x̂) / N)         RMSNorm: without Σ g / N;   dx is the same
//   dweight = Σ_m dy · x̂           dbias = Σ_m dy
//
// Matrices are (M, N), weight, bias, dweight and dbias (N,), stats (2, M) mean and rstd, of RMSNorm (1, M) rstd.
// The arithmetic is fp32. A thread takes the mean and the squares about it of what it holds; these are merged by Chan's
// formula, never E[h²] - E[h]². All are taken of h - pivot, with the mean of the first chunk as the pivot: means that are
// rounded at the size of h, which may dwarf its spread, would spoil the squares when they are merged.
//
// The backward stays: a CTA, or a cluster, takes every P-th row, and sums dweight and dbias in registers into one row
// of parts (P, N); a second kernel adds these up in order. Rows of more than one chunk add to their row of parts in
// memory.
#include <rows/chunk.h>
#include <rows/launch_rows.h>
#include <rows/layer_norm.h>
#include <rows/place.h>
#include <rows/values.h>

namespace rows {

// Pack of a vector, whose dtype is T or fp32, as fp32.
template <class T, bool WHOLE, int E>
__device__ __forceinline__ void load_vector(float (&out)[E], const Vector& v, int n0, int N) {
  if (v.dtype == Dtype::Float32) {
    const auto pack = load<float, E, Read::Constant, WHOLE>(static_cast<const float*>(v.data), n0, N, v.wide);
#pragma unroll
    for (int i = 0; i < E; ++i) out[i] = pack[i];
  } else if constexpr (sizeof(T) == 2) {
    const auto pack = load<T, E, Read::Constant, WHOLE>(static_cast<const T*>(v.data), n0, N, v.wide);
#pragma unroll
    for (int i = 0; i < E; ++i) out[i] = pack[i];
  }
}

// y, or another output of a dtype that is T or fp32.
template <class T, bool WHOLE, int E>
__device__ __forceinline__ void store_row(const Matrix& m, const Place& at, int n0, int N, const float (&value)[E]) {
  if (m.dtype == Dtype::Float32) store<float, E, WHOLE>(row_of<float>(m, at), n0, N, m.wide, value);
  else if constexpr (sizeof(T) == 2) store<T, E, WHOLE>(row_of<T>(m, at), n0, N, m.wide, value);
}

// Sum of this thread's part of a chunk, which holds 0 beyond the row.
template <class H, int E, int PACKS, class Planted>
__device__ __forceinline__ float chunk_sum(const Chunk<H, E, PACKS, Planted>& h) {
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < PACKS; ++v)
#pragma unroll
    for (int i = 0; i < E; ++i) sum += h.pack[v][i];
  return sum;
}

// Count, mean and squares of h - pivot in this thread's part of a chunk.
template <bool WHOLE, class H, int E, int PACKS, class Planted>
__device__ __forceinline__ Moments chunk_moments(
    const Chunk<H, E, PACKS, Planted>& h, float pivot, const Team<Planted>& team, int c, int N) {
  float sum = 0.f, count = 0.f;
#pragma unroll
  for (int v = 0; v < PACKS; ++v) {
    const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
    if (n0 >= N) continue;
    const Inside<E, WHOLE> inside(n0, N);
    count += WHOLE || n0 + E <= N ? float(E) : float(N - n0);
#pragma unroll
    for (int i = 0; i < E; ++i) sum += inside[i] ? h.pack[v][i] - pivot : 0.f;
  }
  if (count == 0.f) return {{0.f, 0.f, 0.f}};
  const float share = ptx::rcp_approx(count), mean = sum * share;
  float squares = 0.f, error = 0.f;  // the mean was rounded
#pragma unroll
  for (int v = 0; v < PACKS; ++v) {
    const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
    if (n0 >= N) continue;
    const Inside<E, WHOLE> inside(n0, N);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float centred = inside[i] ? h.pack[v][i] - pivot - mean : 0.f;
      error += centred;
      squares += centred * centred;
    }
  }
  error *= share;
  return {{count, mean + error, squares - error * error * count}};
}

// WHOLE: every pack is inside of its row or beyond it, and every tensor is aligned.
template <class X, class H, bool WHOLE, class Planted = NoBugs>
__global__ void __launch_bounds__(WHOLE ? LEAN_RESIDENT : RESIDENT, 1)
norm_forward_kernel(const __grid_constant__ NormForward p) {
  constexpr int E = PACK<X>, PACKS = FORWARD_BYTES / int(sizeof(H)) / E;
  Team<Planted> team(p.walk);
  const int last = p.walk.chunks - 1;
  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const Place at = locate(p.walk, first + team.group);
    const int N = at.exists ? p.walk.N : 0;
    Chunk<H, E, PACKS, Planted> h;

    // Pass 1: h, and its statistics
    Moments moments{{0.f, 0.f, 0.f}};
    float pivot = 0.f;
    for (int c = 0; c <= last; ++c) {
      if (!p.residual.data) {
#pragma unroll
        for (int v = 0; v < PACKS; ++v) {
          const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
          h.pack[v] = load<H, E, Read::Streaming, WHOLE>(row_of<H>(p.x, at), n0, N, p.x.wide);
        }
      } else {
        Pack<X, E> x[PACKS];
#pragma unroll
        for (int v = 0; v < PACKS; ++v) {
          const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
          x[v] = load<X, E, Read::Streaming, WHOLE>(row_of<X>(p.x, at), n0, N, p.x.wide);
          h.pack[v] = load<H, E, Read::Streaming, WHOLE>(row_of<H>(p.residual, at), n0, N, p.residual.wide);
        }
#pragma unroll
        for (int v = 0; v < PACKS; ++v) {
          float sum[E];
#pragma unroll
          for (int i = 0; i < E; ++i) sum[i] = h.pack[v][i] + x[v][i];
          h.pack[v] = to_pack<H, E>(sum);
          store<H, E, WHOLE>(row_of<H>(p.h, at), pack_begin<E, PACKS>(team, c, v, 0), N, p.h.wide, sum);
        }
      }
      if (c < last && c < p.walk.kept) h.keep(c);
      if (p.rms) {
#pragma unroll
        for (int v = 0; v < PACKS; ++v)
#pragma unroll
          for (int i = 0; i < E; ++i) moments.field[2] += h.pack[v][i] * h.pack[v][i];
      } else {
        if (c == 0) pivot = team.reduce(Sums<1>{{chunk_sum(h)}}).field[0] / max(1, min(N, PACKS * team.width() * E));
        moments = Moments::merge(moments, chunk_moments<WHOLE>(h, pivot, team, c, N));
      }
    }
    if (p.rms) moments.field[2] = team.reduce(Sums<1>{{moments.squares()}}).field[0];
    else moments = team.reduce(moments);
    h.hold();
    const float mean = p.rms ? 0.f : pivot + moments.mean();
    const float rstd = 1.f / sqrtf(moments.squares() / p.walk.N + p.eps);
    if (team.place() == 0 && at.exists) {
      float* stats = p.stats + first + team.group;
      if (!p.rms) {
        *stats = mean;
        stats += p.walk.M;
      }
      *stats = rstd;
    }

    // Pass 2: y
    for (int c = last; c >= 0; --c) {
      if (c < last && c < p.walk.kept) {
        h.recall(c);
      } else if (c < last) {
        const Matrix& source = p.residual.data ? p.h : p.x;
#pragma unroll
        for (int v = 0; v < PACKS; ++v) {
          const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
          h.pack[v] = load<H, E, Read::Coherent, WHOLE>(row_of<H>(source, at), n0, N, source.wide);
        }
      }
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
        if (n0 >= N) continue;
        float y[E], weight[E], bias[E];
        if (p.weight.data) load_vector<X, WHOLE>(weight, p.weight, n0, N);
        if (p.bias.data) load_vector<X, WHOLE>(bias, p.bias, n0, N);
#pragma unroll
        for (int i = 0; i < E; ++i) y[i] = (h.pack[v][i] - mean) * rstd;
        if (p.weight.data && p.weight_offset != 0.f) {
#pragma unroll
          for (int i = 0; i < E; ++i) weight[i] += p.weight_offset;
        }
        if (p.weight.data && p.bias.data) {
#pragma unroll
          for (int i = 0; i < E; ++i) y[i] = y[i] * weight[i] + bias[i];
        } else if (p.weight.data || p.bias.data) {
#pragma unroll
          for (int i = 0; i < E; ++i) y[i] = p.weight.data ? y[i] * weight[i] : y[i] + bias[i];
        }
        store_row<X, WHOLE>(p.y, at, n0, N, y);
      }
    }
  }
}

// A pack of a matrix whose dtype is T or fp32, as fp32.
template <class T, bool WHOLE, int E>
__device__ __forceinline__ void load_row(float (&out)[E], const Matrix& m, const Place& at, int n0, int N) {
  if (m.dtype == Dtype::Float32) {
    const auto pack = load<float, E, Read::Streaming, WHOLE>(row_of<float>(m, at), n0, N, m.wide);
#pragma unroll
    for (int i = 0; i < E; ++i) out[i] = pack[i];
  } else if constexpr (sizeof(T) == 2) {
    const auto pack = load<T, E, Read::Streaming, WHOLE>(row_of<T>(m, at), n0, N, m.wide);
#pragma unroll
    for (int i = 0; i < E; ++i) out[i] = pack[i];
  }
}

// parts[n] += value, or = value, by the one thread that has these columns.
template <int E>
__device__ __forceinline__ void add_to_parts(float* parts, int n0, int N, bool begin, const float (&value)[E]) {
#pragma unroll
  for (int i = 0; i < E; ++i)
    if (n0 + i < N) ptx::st_global(parts + n0 + i, value[i] + (begin ? 0.f : ptx::ld_global(parts + n0 + i)));
}

// One row of parts from the sums of every thread: added up in order of the CTA's groups, through shared memory.
template <int E, int PACKS, class Planted>
__device__ __forceinline__ void flush(float* parts, const float (&sum)[PACKS][E], const Team<Planted>& team, int N) {
  if (team.groups == 1) {
#pragma unroll
    for (int v = 0; v < PACKS; ++v) add_to_parts<E>(parts, pack_begin<E, PACKS>(team, 0, v, 0), N, true, sum[v]);
    return;
  }
  const int columns = team.threads * PACKS * E;
  const uint32_t base = ptx::dynamic_shared() + REDUCTION_BYTES;
  ptx::cta_sync();  // what the area held before has been read
#pragma unroll
  for (int v = 0; v < PACKS; ++v)
#pragma unroll
    for (int i = 0; i < E; ++i)
      ptx::st_shared(base + 4 * (team.group * columns + pack_begin<E, PACKS>(team, 0, v, 0) + i), sum[v][i]);
  if (!Planted::has(Bug::NoFlushBarrier)) ptx::cta_sync();
  for (int n = threadIdx.x; n < N; n += blockDim.x) {
    float total = 0.f;
    for (int g = 0; g < (Planted::has(Bug::OneGroup) ? 1 : team.groups); ++g)
      total += ptx::ld_shared<float>(base + 4 * (g * columns + n));
    ptx::st_global(parts + n, total);
  }
}

// ONE_CHUNK: registers hold the row, and its sums. WHOLE as above.
template <class X, class H, bool ONE_CHUNK, bool WHOLE, class Planted = NoBugs>
__global__ void __launch_bounds__(RESIDENT) norm_backward_kernel(const __grid_constant__ NormBackward p) {
  constexpr int E = PACK<X>, PACKS = BACKWARD_ELEMENTS / E;
  Team<Planted> team(p.walk);
  const int last = ONE_CHUNK ? 0 : p.walk.chunks - 1;
  const int64_t part = int64_t(blockIdx.x / team.cluster) * p.walk.N;
  float* const dweight_part = p.dweight_parts ? p.dweight_parts + part : nullptr;
  float* const dbias_part = p.dbias_parts ? p.dbias_parts + part : nullptr;
  float dweight[PACKS][E] = {}, dbias[PACKS][E] = {};

  for (int64_t first = team.first_row(); first < p.walk.M; first += team.row_step()) {
    const int64_t m = first + team.group;
    const Place at = locate(p.walk, m);
    const int N = at.exists ? p.walk.N : 0;
    const float mean = at.exists && !p.rms ? p.stats[m] : 0.f;
    const float rstd = at.exists ? p.stats[p.rms ? m : p.walk.M + m] : 0.f;
    float x_hat[PACKS][E], g[PACKS][E];
    // x̂ and dy of chunk c; dy is not yet g.
    const auto read = [&](int c) {
      Pack<H, E> h[PACKS];
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
        h[v] = load<H, E, Read::Streaming, WHOLE>(row_of<H>(p.h, at), n0, N, p.h.wide);
        load_row<X, WHOLE>(g[v], p.dy, at, n0, N);
      }
#pragma unroll
      for (int v = 0; v < PACKS; ++v)
#pragma unroll
        for (int i = 0; i < E; ++i) x_hat[v][i] = (h[v][i] - mean) * rstd;
    };
    // g of pack v from dy.
    const auto scale = [&](int c, int v) {
      if (!p.weight.data) return;
      float weight[E];
      load_vector<X, WHOLE>(weight, p.weight, pack_begin<E, PACKS>(team, c, v, 0), N);
#pragma unroll
      for (int i = 0; i < E; ++i) g[v][i] *= p.weight_offset + weight[i];
    };

    // Pass 1: Σ g and Σ g · x̂, and this row's part of dweight and dbias
    Sums<2> sums{{0.f, 0.f}};
    for (int c = 0; c <= last; ++c) {
      read(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        if constexpr (ONE_CHUNK) {
#pragma unroll
          for (int i = 0; i < E; ++i) {
            dweight[v][i] = (Planted::has(Bug::LastRowOnly) ? 0.f : dweight[v][i]) + g[v][i] * x_hat[v][i];
            dbias[v][i] += g[v][i];
          }
        } else {
          const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
          const bool begin = first == team.first_row();
          float product[E];
#pragma unroll
          for (int i = 0; i < E; ++i) product[i] = g[v][i] * x_hat[v][i];
          if (p.dweight_parts) add_to_parts<E>(dweight_part, n0, N, begin, product);
          if (p.dbias_parts) add_to_parts<E>(dbias_part, n0, N, begin, g[v]);
        }
        scale(c, v);
#pragma unroll
        for (int i = 0; i < E; ++i) {
          sums.field[0] += g[v][i];
          sums.field[1] += g[v][i] * x_hat[v][i];
        }
      }
    }
    sums = team.reduce(sums);
    const float g_mean = p.rms ? 0.f : sums.field[0] / p.walk.N, dot_mean = sums.field[1] / p.walk.N;

    // Pass 2: the gradients of the row
    if (!p.dx.data && !p.dresidual.data) continue;
    for (int c = last; c >= 0; --c) {
      if (c < last) read(c);
#pragma unroll
      for (int v = 0; v < PACKS; ++v) {
        const int n0 = pack_begin<E, PACKS>(team, c, v, 0);
        if (c < last) scale(c, v);
        float total[E];
#pragma unroll
        for (int i = 0; i < E; ++i) total[i] = (g[v][i] - g_mean - x_hat[v][i] * dot_mean) * rstd;
        if (p.dh.data) {
          const auto dh = load<H, E, Read::Streaming, WHOLE>(row_of<H>(p.dh, at), n0, N, p.dh.wide);
#pragma unroll
          for (int i = 0; i < E; ++i) total[i] += dh[i];
        }
        if (p.dx.data) store<X, E, WHOLE>(row_of<X>(p.dx, at), n0, N, p.dx.wide, total);
        if (p.dresidual.data) store<H, E, WHOLE>(row_of<H>(p.dresidual, at), n0, N, p.dresidual.wide, total);
      }
    }
  }
  if constexpr (!ONE_CHUNK) return;
  if (p.dweight_parts) flush<E, PACKS>(dweight_part, dweight, team, p.walk.N);
  if (p.dbias_parts) flush<E, PACKS>(dbias_part, dbias, team, p.walk.N);
}

constexpr int SUM_COLUMNS = 32, SUM_DEPTH = 8;

// out[n] = Σ_p parts[p, n]: thread (d, n) adds up every SUM_DEPTH-th part, from the d-th on.
__global__ void __launch_bounds__(SUM_COLUMNS * SUM_DEPTH) sum_parts_kernel(const __grid_constant__ SumParts p) {
  const int column = threadIdx.x % SUM_COLUMNS, depth = threadIdx.x / SUM_COLUMNS;
  const int n = blockIdx.x * SUM_COLUMNS + column;
  const uint32_t base = ptx::dynamic_shared();
  float total = 0.f;
  if (n < p.N)
    for (int i = depth; i < p.P; i += SUM_DEPTH) total += ptx::ld_global_streaming(p.parts + int64_t(i) * p.N + n);
  ptx::st_shared(base + 4 * threadIdx.x, total);
  ptx::cta_sync();
  if (depth > 0 || n >= p.N) return;
  total = 0.f;
#pragma unroll
  for (int d = 0; d < SUM_DEPTH; ++d) total += ptx::ld_shared<float>(base + 4 * (d * SUM_COLUMNS + column));
  if (p.out.dtype == Dtype::Float32) static_cast<float*>(p.out.data)[n] = total;
  else if (p.out.dtype == Dtype::Bfloat16) static_cast<ptx::bf16*>(p.out.data)[n] = ptx::from_float<ptx::bf16>(total);
  else static_cast<ptx::fp16*>(p.out.data)[n] = ptx::from_float<ptx::fp16>(total);
}

static void launch_sum_parts(const Vector& out, const float* parts, int P, int N, cudaStream_t stream) {
  if (!out.data) return;
  const dim3 grid((N + SUM_COLUMNS - 1) / SUM_COLUMNS);
  constexpr int threads = SUM_COLUMNS * SUM_DEPTH;
  launch(sum_parts_kernel, LaunchShape{grid, threads, threads * 4}, stream, SumParts{out, parts, P, N});
}

// The kernels of x's dtype, and of h's: that, or fp32.
template <class F> static void with_dtypes(Dtype x, Dtype h, F f) {
  with_dtype(x, [&](auto x_zero) {
    if (h == x) f(x_zero, x_zero);
    else if (h == Dtype::Float32) f(x_zero, float{});
    else throw std::invalid_argument("norm: residual is of another 16-bit dtype than x; it must be of x's or float32");
  });
}

void norm_forward(NormForward p, cudaStream_t stream) {
  const Dtype x = p.x.dtype;
  require(p.y, "norm: y", x, Dtype::Float32);
  require(p.weight, "norm: weight", x, Dtype::Float32);
  require(p.bias, "norm: bias", x, Dtype::Float32);
  require(p.residual, "norm: residual", x, Dtype::Float32);
  require(p.h, "norm: h", p.residual.dtype, p.residual.dtype);
  with_dtypes(p.x.dtype, p.residual.data ? p.residual.dtype : p.x.dtype, [&](auto x_zero, auto h_zero) {
    using X = decltype(x_zero);
    using H = decltype(h_zero);
    constexpr int E = PACK<X>;
    const RowProblem problem{p.walk.N, E, FORWARD_BYTES / int(sizeof(H)), FORWARD_BYTES};
    const RowConfig config = choose(problem, limits(norm_forward_kernel<X, H, false>));
    for (Matrix* m : {&p.y, &p.h, &p.x, &p.residual}) align(*m, E);
    for (Vector* v : {&p.weight, &p.bias}) align(*v, E);
    const LaunchShape shape = shape_of(config, p.walk);
    with_bool(whole(p.walk, E, {&p.y, &p.h, &p.x, &p.residual}, {&p.weight, &p.bias}), [&](auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      with_bugs<X>([&](auto planted) {
        launch(norm_forward_kernel<X, H, WHOLE, decltype(planted)>, shape, stream, p);
      });
    });
  });
}

template <class X, class H> static RowConfig backward_config(int N) {
  constexpr int E = PACK<X>;
  RowConfig config = choose({N, E, BACKWARD_ELEMENTS, 0}, limits(norm_backward_kernel<X, H, true, false>));
  if (config.rows_per_cta() > 1) config.shared_bytes += config.threads * BACKWARD_ELEMENTS * 4;  // of `flush`
  return config;
}

static int parts_of(const RowConfig& config, int M) {
  const int at_once = std::max(1, sm_count() * (RESIDENT / config.threads) / config.cluster);
  return std::max(1, std::min((M + config.rows_per_cta() - 1) / config.rows_per_cta(), at_once));
}

int norm_backward_parts(int M, int N, Dtype x, Dtype h) {
  int P = 0;
  with_dtypes(x, h, [&](auto x_zero, auto h_zero) {
    P = parts_of(backward_config<decltype(x_zero), decltype(h_zero)>(N), M);
  });
  return P;
}

void norm_backward(NormBackward p, Dtype x, const Vector& dweight, const Vector& dbias, cudaStream_t stream) {
  require(p.dx, "norm: dx", x, x);
  require(p.dy, "norm: dy", x, Dtype::Float32);
  require(p.h, "norm: h", x, Dtype::Float32);
  require(p.weight, "norm: weight", x, Dtype::Float32);
  require(p.dresidual, "norm: dresidual", p.h.dtype, p.h.dtype);
  require(p.dh, "norm: dh", p.h.dtype, p.h.dtype);
  with_dtypes(x, p.h.dtype, [&](auto x_zero, auto h_zero) {
    using X = decltype(x_zero);
    using H = decltype(h_zero);
    const RowConfig config = backward_config<X, H>(p.walk.N);
    for (Matrix* m : {&p.dx, &p.dresidual, &p.dy, &p.h, &p.dh}) align(*m, PACK<X>);
    align(p.weight, PACK<X>);
    const bool sums = dweight.data || dbias.data;
    LaunchShape shape = shape_of(config, p.walk);
    const int P = parts_of(config, p.walk.M);
    if (sums) shape.grid.x = P * config.cluster;
    const bool lean =
        config.chunks == 1 && whole(p.walk, PACK<X>, {&p.dx, &p.dresidual, &p.dy, &p.h, &p.dh}, {&p.weight});
    with_bugs<X>([&](auto planted) {
      using Planted = decltype(planted);
      if (lean) launch(norm_backward_kernel<X, H, true, true, Planted>, shape, stream, p);
      else if (config.chunks == 1) launch(norm_backward_kernel<X, H, true, false, Planted>, shape, stream, p);
      else launch(norm_backward_kernel<X, H, false, false, Planted>, shape, stream, p);
    });
    launch_sum_parts(dweight, p.dweight_parts, P, p.walk.N, stream);
    launch_sum_parts(dbias, p.dbias_parts, P, p.walk.N, stream);
  });
}

}  // namespace rows
