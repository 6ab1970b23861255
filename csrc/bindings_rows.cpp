// Python's door to the row kernels. A tensor comes as a tuple of its address, its dtype and, in elements, the steps
// between rows; rows are numbered (i0 · R1 + i1) · R2 + i2, and their elements are neighbours.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <params_rows.h>
#include <rows/config.h>
#include <rows/cross_entropy.h>
#include <rows/layer_norm.h>
#include <rows/softmax.h>
#include <rows/target.h>

#include <optional>
#include <stdexcept>
#include <tuple>

namespace py = pybind11;
using namespace py::literals;

namespace {

using RowsArgument = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>;
using VectorArgument = std::optional<std::tuple<uintptr_t, int>>;
using MaskArgument = std::optional<std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>>;
using TargetArgument = std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t>;

rows::Dtype dtype_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype is " + std::to_string(code) + "; it must be FLOAT32, BFLOAT16 or FLOAT16");
  return static_cast<rows::Dtype>(code);
}

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

rows::Matrix matrix(const RowsArgument& t) {
  if (!t) return {};
  const auto& [address, dtype, s0, s1, s2] = *t;
  return {pointer<void>(address), {s0, s1, s2}, dtype_of(dtype), false};
}

rows::Column column(const RowsArgument& t) {
  const rows::Matrix m = matrix(t);
  return {m.data, {m.step[0], m.step[1], m.step[2]}, m.dtype};
}

rows::Vector vector(const VectorArgument& t) {
  if (!t) return {};
  return {pointer<void>(std::get<0>(*t)), dtype_of(std::get<1>(*t)), false};
}

rows::Walk walk(int64_t M, int64_t N, int64_t R1, int64_t R2) {
  if (M < 1 || N < 1 || M > INT32_MAX || N > INT32_MAX)
    throw std::invalid_argument("M and N are " + std::to_string(M) + " and " + std::to_string(N) +
                                "; they must be from 1 to 2147483647");
  if (R1 < 1 || R2 < 1 || M % (R1 * R2) != 0)
    throw std::invalid_argument("R1 and R2 are " + std::to_string(R1) + " and " + std::to_string(R2) +
                                "; M, " + std::to_string(M) + ", must be a multiple of their product");
  rows::Walk w;
  w.M = static_cast<int>(M);
  w.N = static_cast<int>(N);
  w.R1 = static_cast<int>(R1);
  w.R2 = static_cast<int>(R2);
  return w;
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void norm_forward(const RowsArgument& y, const RowsArgument& h, uintptr_t stats, const RowsArgument& x,
                  const VectorArgument& weight, const VectorArgument& bias, const RowsArgument& residual, int64_t M,
                  int64_t N, int64_t R1, int64_t R2, bool rms, float eps, float weight_offset, uintptr_t stream) {
  const rows::NormForward p{walk(M, N, R1, R2), matrix(y),    matrix(h),     matrix(x),           matrix(residual),
                            vector(weight),     vector(bias), pointer<float>(stats), eps, weight_offset, rms};
  rows::norm_forward(p, stream_of(stream));
}

void norm_backward(const RowsArgument& dx, const VectorArgument& dweight, const VectorArgument& dbias,
                   const RowsArgument& dresidual, uintptr_t dweight_parts, uintptr_t dbias_parts,
                   const RowsArgument& dy, const RowsArgument& dh, const RowsArgument& h, const VectorArgument& weight, uintptr_t stats,
                   int x_dtype, int64_t M, int64_t N, int64_t R1, int64_t R2, bool rms, float weight_offset,
                   uintptr_t stream) {
  const rows::NormBackward p{walk(M, N, R1, R2), matrix(dx), matrix(dresidual), matrix(dy), matrix(h), matrix(dh),
                             vector(weight), pointer<float>(stats), pointer<float>(dweight_parts),
                             pointer<float>(dbias_parts), weight_offset, rms};
  rows::norm_backward(p, dtype_of(x_dtype), vector(dweight), vector(dbias), stream_of(stream));
}

rows::Softmax softmax(const RowsArgument& out, const RowsArgument& x, const RowsArgument& y, const MaskArgument& mask,
                      int64_t M, int64_t N, int64_t R1, int64_t R2, float scale, bool log, bool causal,
                      int64_t diagonal) {
  rows::Softmax p{};
  p.walk = walk(M, N, R1, R2);
  p.out = matrix(out);
  p.x = matrix(x);
  p.y = matrix(y);
  if (mask) {
    p.mask = pointer<const uint8_t>(std::get<0>(*mask));
    const int64_t steps[] = {std::get<1>(*mask), std::get<2>(*mask), std::get<3>(*mask), std::get<4>(*mask)};
    for (int d = 0; d < 4; ++d) p.mask_step[d] = steps[d];
  }
  p.scale = scale;
  p.log = log;
  p.causal = causal;
  p.diagonal = static_cast<int>(diagonal);
  return p;
}

void softmax_forward(const RowsArgument& y, const RowsArgument& x, const MaskArgument& mask, int64_t M, int64_t N,
                     int64_t R1, int64_t R2, float scale, bool log, bool causal, int64_t diagonal, uintptr_t stream) {
  const rows::Softmax p = softmax(y, x, std::nullopt, mask, M, N, R1, R2, scale, log, causal, diagonal);
  rows::softmax_forward(p, stream_of(stream));
}

void softmax_backward(const RowsArgument& dx, const RowsArgument& dy, const RowsArgument& y, const MaskArgument& mask,
                      int64_t M, int64_t N, int64_t R1, int64_t R2, float scale, bool log, bool causal,
                      int64_t diagonal, uintptr_t stream) {
  rows::softmax_backward(softmax(dx, dy, y, mask, M, N, R1, R2, scale, log, causal, diagonal), stream_of(stream));
}

void put_target(rows::CrossEntropy& p, const TargetArgument& target) {
  const auto& [address, is_64, s0, s1, s2] = target;
  p.target = pointer<const void>(address);
  p.target_64 = is_64;
  const int64_t steps[] = {s0, s1, s2};
  for (int d = 0; d < 3; ++d) p.target_step[d] = steps[d];
}

void cross_entropy_forward(const RowsArgument& loss, uintptr_t row_max, uintptr_t row_sum, uintptr_t divisor,
                           const RowsArgument& dlogits, const RowsArgument& logits, const TargetArgument& target,
                           const VectorArgument& weight, const RowsArgument& dloss, int64_t M, int64_t N, int64_t R1,
                           int64_t R2, int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                           uintptr_t stream) {
  rows::CrossEntropy p{};
  p.walk = walk(M, N, R1, R2);
  p.dlogits = matrix(dlogits);
  p.logits = matrix(logits);
  p.loss = column(loss);
  p.dloss = column(dloss);
  p.row_max = pointer<float>(row_max);
  p.row_sum = pointer<float>(row_sum);
  for (int d = 0; d < 3; ++d) p.statistics[d] = p.loss.step[d];
  put_target(p, target);
  p.weight = vector(weight);
  p.divisor = pointer<const float>(divisor);
  p.ignore_index = ignore_index;
  p.smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  rows::cross_entropy_forward(p, stream_of(stream));
}

void cross_entropy_backward(const RowsArgument& dlogits, const RowsArgument& dloss, const RowsArgument& logits,
                            const TargetArgument& target, const VectorArgument& weight, const RowsArgument& row_max,
                            uintptr_t row_sum, uintptr_t divisor, int64_t M, int64_t N, int64_t R1, int64_t R2,
                            int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                            uintptr_t stream) {
  rows::CrossEntropy p{};
  p.walk = walk(M, N, R1, R2);
  p.dlogits = matrix(dlogits);
  p.logits = matrix(logits);
  p.dloss = column(dloss);
  const rows::Column statistics = column(row_max);
  p.row_max = static_cast<float*>(statistics.data);
  p.row_sum = pointer<float>(row_sum);
  for (int d = 0; d < 3; ++d) p.statistics[d] = statistics.step[d];
  put_target(p, target);
  p.weight = vector(weight);
  p.divisor = pointer<const float>(divisor);
  p.ignore_index = ignore_index;
  p.smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  rows::cross_entropy_backward(p, stream_of(stream));
}

void scale_rows(const RowsArgument& out, const RowsArgument& x, const RowsArgument& factor, int64_t M, int64_t N,
                int64_t R1, int64_t R2, uintptr_t stream) {
  rows::scale_rows({walk(M, N, R1, R2), matrix(out), matrix(x), column(factor)}, stream_of(stream));
}

void count_classes(uintptr_t out, uintptr_t partial, uintptr_t target, bool target_64, const VectorArgument& weight,
                   int64_t ignore_index, int64_t P, int64_t N, uintptr_t stream) {
  const rows::CountClasses p{{pointer<void>(out), rows::Dtype::Float32, false}, pointer<const void>(target), target_64,
                             vector(weight), ignore_index, static_cast<int>(N), P};
  rows::count_classes(p, pointer<float>(partial), stream_of(stream));
}

void sum_values(const VectorArgument& out, uintptr_t partial, uintptr_t values, uintptr_t divisor, int64_t P,
                uintptr_t stream) {
  const rows::SumValues p{vector(out), pointer<const float>(values), pointer<const float>(divisor), P};
  rows::sum_values(p, pointer<float>(partial), stream_of(stream));
}

}  // namespace

// The launchers wait for nobody; in the emulator they are the kernel.
using Released = py::call_guard<py::gil_scoped_release>;

void bind_rows(py::module_& m) {
  m.attr("FLOAT32") = 0;
  m.attr("BFLOAT16") = 1;
  m.attr("FLOAT16") = 2;
  rows::bind_target(m);

  m.def("row_config",
        [](int N, int pack, int elements, int kept_bytes, bool shifted, bool clusters, int shared) {
          const rows::RowProblem problem{N, pack, elements, kept_bytes, shifted};
          const rows::RowLimits limits{clusters, shared, rows::MAX_THREADS};
          const rows::RowConfig c = rows::choose(problem, limits);
          return py::dict("threads"_a = c.threads, "threads_per_row"_a = c.threads_per_row, "cluster"_a = c.cluster,
                          "chunks"_a = c.chunks, "kept"_a = c.kept, "shared_bytes"_a = c.shared_bytes,
                          "illegal"_a = rows::illegal(c, problem, limits));
        },
        "N"_a, "pack"_a, "elements"_a, "kept_bytes"_a, "shifted"_a, "clusters"_a, "shared"_a,
        R"(What the launchers choose for rows of N elements, and why that is illegal ('' where it is not).

pack: elements of 16 bytes of x; elements: that a thread holds; kept_bytes: of a thread's chunk in shared memory, or 0;
shifted: rows begin off alignment; clusters: the GPU has them; shared: bytes of a CTA.)");

  m.def("norm_forward", &norm_forward, "y"_a, "h"_a, "stats"_a, "x"_a, "weight"_a, "bias"_a, "residual"_a, "M"_a, "N"_a,
        "R1"_a, "R2"_a, "rms"_a, "eps"_a, "weight_offset"_a, "stream"_a, Released(),
        R"(LayerNorm or RMSNorm of h = residual + x, or of x: fills y, h and stats.

y, h, x, residual: (address, dtype, step0, step1, step2) of (M, N), elements of a row next to one another; h and
residual None without a residual. y is of x's dtype or FLOAT32; residual and h are of one dtype, x's or FLOAT32.
weight, bias: (address, dtype) of (N,), contiguous, of x's dtype or FLOAT32, or None.
stats: address of (2, M) fp32, mean and rstd; with rms (1, M), rstd.)");
  m.def("norm_backward_parts",
        [](int64_t M, int64_t N, int x_dtype, int h_dtype) {
          const rows::Walk w = walk(M, N, 1, M);
          return rows::norm_backward_parts(w.M, w.N, dtype_of(x_dtype), dtype_of(h_dtype));
        },
        "M"_a, "N"_a, "x_dtype"_a, "h_dtype"_a, "Rows P of norm_backward's dweight_parts and dbias_parts, on this GPU.");
  m.def("norm_backward", &norm_backward, "dx"_a, "dweight"_a, "dbias"_a, "dresidual"_a, "dweight_parts"_a,
        "dbias_parts"_a, "dy"_a, "dh"_a, "h"_a, "weight"_a, "stats"_a, "x_dtype"_a, "M"_a, "N"_a, "R1"_a, "R2"_a,
        "rms"_a, "weight_offset"_a, "stream"_a, Released(),
        R"(Gradients of norm_forward: fills those of dx, dresidual, dweight and dbias that are not None.

dx, dresidual, dy, dh, h: (address, dtype, step0, step1, step2) of (M, N). dx is of x_dtype, dy of that or FLOAT32; h,
what was normalised, dresidual and dh, its gradient beside that through y, or None, are of one dtype, x_dtype or FLOAT32.
dweight, dbias: (address, dtype) of (N,), or None; dweight_parts, dbias_parts: address of (P, N) fp32 for each, or 0,
P = norm_backward_parts(M, N, x_dtype, dtype of h). weight: (address, dtype) of (N,), or None. stats: as filled.)");

  m.def("softmax_forward", &softmax_forward, "y"_a, "x"_a, "mask"_a, "M"_a, "N"_a, "R1"_a, "R2"_a, "scale"_a, "log"_a,
        "causal"_a, "diagonal"_a, "stream"_a, Released(),
        R"(Fills y, softmax or log_softmax of scale · x over each row's visible entries; y may be x.

y, x: (address, dtype, step0, step1, step2) of (M, N), of one dtype. mask: (address, step0, step1, step2, step_n) of
bool (M, N), any steps, 0 included, or None. causal: row (i0, i1, i2) sees n <= i2 + diagonal.)");
  m.def("softmax_backward", &softmax_backward, "dx"_a, "dy"_a, "y"_a, "mask"_a, "M"_a, "N"_a, "R1"_a, "R2"_a, "scale"_a,
        "log"_a, "causal"_a, "diagonal"_a, "stream"_a, Released(),
        "Fills dx from dy and softmax_forward's y; all three of one dtype. The rest as of softmax_forward.");

  m.def("cross_entropy_forward", &cross_entropy_forward, "loss"_a, "row_max"_a, "row_sum"_a, "divisor"_a, "dlogits"_a,
        "logits"_a, "target"_a, "weight"_a, "dloss"_a, "M"_a, "N"_a, "R1"_a, "R2"_a, "ignore_index"_a,
        "label_smoothing"_a, "z_loss"_a, "softcap"_a, "stream"_a, Released(),
        R"(Losses of M rows of N logits, not reduced, and what there is of the other outputs.

loss: (address, dtype, step0, step1, step2) of (M,), of the logits' dtype or FLOAT32. row_max, row_sum: address of fp32
by loss's steps, or 0. dlogits, logits: (address, dtype, step0, step1, step2) of (M, N), of one dtype; dlogits may be
logits, or None. target: (address, whether int64 and not int32, step0, step1, step2) of (M,). weight: (address, dtype)
of (N,), of the logits' dtype or FLOAT32, or None; not together with label_smoothing. divisor: address of fp32 (1,) that dlogits is
divided by, or 0. dloss: (address, FLOAT32, steps) of (M,), a factor on dlogits, or None. softcap: 0 for none.)");
  m.def("cross_entropy_backward", &cross_entropy_backward, "dlogits"_a, "dloss"_a, "logits"_a, "target"_a, "weight"_a,
        "row_max"_a, "row_sum"_a, "divisor"_a, "M"_a, "N"_a, "R1"_a, "R2"_a, "ignore_index"_a, "label_smoothing"_a,
        "z_loss"_a, "softcap"_a, "stream"_a, Released(),
        R"(Fills dlogits, which may be logits, from what cross_entropy_forward filled.

dloss: (address, dtype, step0, step1, step2) of (M,), of the logits' dtype or FLOAT32; steps 0 for a scalar. row_max:
(address, FLOAT32, step0, step1, step2); row_sum: address, by the same steps. The rest as of cross_entropy_forward.)");
  m.def("scale_rows", &scale_rows, "out"_a, "x"_a, "factor"_a, "M"_a, "N"_a, "R1"_a, "R2"_a, "stream"_a, Released(),
        R"(out = factor · x, row by row; out may be x, and rows of factor 1 are then not touched.

out, x: (address, dtype, step0, step1, step2) of (M, N), of one dtype. factor: the same of (M,), of that dtype or
FLOAT32.)");

  m.def("sum_partials", &rows::sum_partials, "P"_a, "Floats of `partial` that sum_values and count_classes need.");
  m.def("count_classes", &count_classes, "out"_a, "partial"_a, "target"_a, "target_64"_a, "weight"_a, "ignore_index"_a,
        "P"_a, "N"_a, "stream"_a, Released(),
        R"(out (1,) fp32 = Σ of the weights of P classes, 1 each without weight; but not of ignore_index, nor of none of N.

out, partial, target: addresses; target (P,) contiguous, int64 or int32. weight: (address, dtype) of (N,), or None.)");
  m.def("sum_values", &sum_values, "out"_a, "partial"_a, "values"_a, "divisor"_a, "P"_a, "stream"_a, Released(),
        R"(out (1,) = Σ values / divisor, in one order.

out: (address, dtype). partial, values (P,) fp32, divisor (1,) fp32, or 0: addresses.)");
}
