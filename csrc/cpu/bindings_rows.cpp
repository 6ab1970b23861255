// The row kernels for Python. A tensor is (address, three steps, dtype) or None, a vector (address, dtype) or None.
#include <pybind11/pybind11.h>

#include "cross_entropy.h"
#include "dropout_add.h"
#include "gated.h"
#include "norm.h"
#include "rotary.h"
#include "softmax.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

int64_t integer(PyObject* item) {
  const int64_t value = PyLong_AsLongLong(item);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The items of a tuple of `size` integers
template <int size>
struct Integers {
  int64_t items[size];

  explicit Integers(py::handle h) {
    if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != size) {
      throw py::type_error("A tuple of " + std::to_string(size) + " integers was expected.");
    }
    for (int i = 0; i < size; ++i) items[i] = integer(PyTuple_GET_ITEM(h.ptr(), i));
  }
  int64_t operator[](int i) const { return items[i]; }
};

Rows rows_of(py::handle h) {
  const Integers<3> sizes(h);
  return {sizes[0], sizes[1], sizes[2]};
}

RowTensor tensor(py::handle h) {
  if (h.is_none()) return {};
  const Integers<5> t(h);
  return {(void*)t[0], {t[1], t[2], t[3]}, DType(t[4])};
}

Vector vector(py::handle h) {
  if (h.is_none()) return {};
  const Integers<2> v(h);
  return {(void*)v[0], DType(v[1])};
}

RowDropout dropout_of(int64_t seed, double p) {
  return {(const int64_t*)seed, int64_t(p * 4294967296.0), p == 1.0 ? 0.f : float(1.0 / (1.0 - p))};
}

void norm_forward(py::handle rows, int64_t N, py::handle y, py::handle h, int64_t stats, py::handle x,
                  py::handle weight, py::handle bias, py::handle residual, float eps, float weight_offset, bool rms,
                  int64_t seed, double dropout_p, int threads) {
  NormForward p;
  p.rows = rows_of(rows);
  p.N = N;
  p.x = tensor(x);
  p.residual = tensor(residual);
  p.y = tensor(y);
  p.h = tensor(h);
  p.stats = (float*)stats;
  p.weight = vector(weight);
  p.bias = vector(bias);
  p.eps = eps;
  p.weight_offset = weight_offset;
  p.rms = rms;
  p.dropout = dropout_of(seed, dropout_p);
  py::gil_scoped_release release;
  FASTATTN_CALL(norm_forward(p, threads));
}

void norm_backward(py::handle rows, int64_t N, py::handle dx, py::handle dweight, py::handle dbias,
                   py::handle dresidual, py::handle dy, py::handle dh, py::handle base, py::handle weight,
                   py::handle bias, int64_t stats, float weight_offset, bool rms, bool from_y, int64_t seed,
                   double dropout_p, int threads) {
  NormBackward p;
  p.rows = rows_of(rows);
  p.N = N;
  p.dx = tensor(dx);
  p.dresidual = tensor(dresidual);
  p.dy = tensor(dy);
  p.dh = tensor(dh);
  p.base = tensor(base);
  p.dweight = vector(dweight);
  p.dbias = vector(dbias);
  p.stats = (const float*)stats;
  p.weight = vector(weight);
  p.bias = vector(bias);
  p.weight_offset = weight_offset;
  p.rms = rms;
  p.from_y = from_y;
  p.dropout = dropout_of(seed, dropout_p);
  py::gil_scoped_release release;
  FASTATTN_CALL(norm_backward(p, threads));
}

// Sizes are the three of the rows and N; `along` the steps of y, x, mask, or of dx, dy, y, mask; `columns` chooses
// softmax_columns.
Softmax softmax_of(py::handle sizes, py::handle mask, double scale, bool log, bool causal, int64_t shift) {
  const Integers<4> s(sizes);
  Softmax p{};
  p.rows = {s[0], s[1], s[2]};
  p.N = s[3];
  p.mask = tensor(mask);
  p.scale = float(scale);
  p.log = log;
  p.causal = causal;
  p.shift = shift;
  return p;
}

void softmax_forward(py::handle sizes, py::handle y, py::handle x, py::handle mask, py::handle along, bool columns,
                     double scale, bool log, bool causal, int64_t shift, int threads) {
  Softmax p = softmax_of(sizes, mask, scale, log, causal, shift);
  const Integers<3> steps(along);
  p.y = tensor(y);
  p.x = tensor(x);
  p.along_y = steps[0];
  p.along_x = steps[1];
  p.along_mask = steps[2];
  py::gil_scoped_release release;
  if (columns) {
    FASTATTN_CALL(softmax_columns(p, threads));
  } else {
    FASTATTN_CALL(softmax_rows(p, threads));
  }
}

void softmax_backward(py::handle sizes, py::handle dx, py::handle dy, py::handle y, py::handle mask, py::handle along,
                      bool columns, double scale, bool log, bool causal, int64_t shift, int threads) {
  Softmax p = softmax_of(sizes, mask, scale, log, causal, shift);
  const Integers<4> steps(along);
  p.dx = tensor(dx);
  p.dy = tensor(dy);
  p.y = tensor(y);
  p.along_dx = steps[0];
  p.along_dy = steps[1];
  p.along_y = steps[2];
  p.along_mask = steps[3];
  py::gil_scoped_release release;
  if (columns) {
    FASTATTN_CALL(softmax_columns_backward(p, threads));
  } else {
    FASTATTN_CALL(softmax_rows_backward(p, threads));
  }
}

// `options`: ignore_index, label_smoothing, z_loss, softcap (0: none)
CrossEntropy cross_entropy_of(py::handle rows, int64_t V, py::handle dx, py::handle x, int64_t target, py::handle q,
                              int64_t weight, int64_t divisor, py::handle factor, int64_t factor_step,
                              const std::tuple<int64_t, double, double, double>& options) {
  CrossEntropy p;
  p.rows = rows_of(rows);
  p.V = V;
  p.x = tensor(x);
  p.dx = tensor(dx);
  p.q = tensor(q);
  p.target = (const int64_t*)target;
  p.weight = (const float*)weight;
  p.ignore_index = std::get<0>(options);
  p.smoothing = float(std::get<1>(options));
  p.z_loss = float(std::get<2>(options));
  p.softcap = float(std::get<3>(options));
  p.divisor = (const float*)divisor;
  p.factor = vector(factor);
  p.factor_step = factor_step;
  return p;
}

// `statistics`: addresses of row_max and row_sum
void cross_entropy_forward(py::handle rows, int64_t V, py::handle loss, int reduction, py::handle statistics,
                           int64_t divisor_out, py::handle dx, py::handle x, int64_t target, py::handle q,
                           int64_t weight, int64_t divisor, py::handle factor,
                           const std::tuple<int64_t, double, double, double>& options, int threads) {
  const CrossEntropy p = cross_entropy_of(rows, V, dx, x, target, q, weight, divisor, factor, 1, options);
  const Integers<2> addresses(statistics);
  const CrossEntropyLoss out{vector(loss), reduction != 0, reduction == 2, (float*)addresses[0], (float*)addresses[1],
                             (float*)divisor_out};
  py::gil_scoped_release release;
  FASTATTN_CALL(cross_entropy_forward(p, out, threads));
}

void cross_entropy_backward(py::handle rows, int64_t V, py::handle dx, py::handle x, int64_t target, py::handle q,
                            int64_t weight, int64_t divisor, py::handle factor, int64_t factor_step,
                            py::handle statistics, const std::tuple<int64_t, double, double, double>& options,
                            int threads) {
  const CrossEntropy p = cross_entropy_of(rows, V, dx, x, target, q, weight, divisor, factor, factor_step, options);
  const Integers<2> addresses(statistics);
  py::gil_scoped_release release;
  FASTATTN_CALL(cross_entropy_backward(p, (const float*)addresses[0], (const float*)addresses[1], threads));
}

// Of each of `heads`: addresses of y and x, H, steps of y and of x along B, H and S. `sizes`: B, S, D, half. `table`:
// addresses of cos and sin, their rows and the step of a batch. `places`: addresses of positions and their step of a
// batch, of cu_seqlens, and the number of sequences.
void rotary(py::tuple heads, int type, py::handle sizes, py::handle table, py::handle places, bool interleaved,
            bool inverse, int threads) {
  Rotary p;
  p.n_heads = int(heads.size());
  for (int i = 0; i < p.n_heads; ++i) {
    const Integers<9> h(heads[i]);
    p.heads[i] = {(void*)h[0], (void*)h[1], h[2], {h[3], h[4], h[5]}, {h[6], h[7], h[8]}};
  }
  const Integers<4> size(sizes), angles(table), at(places);
  p.type = DType(type);
  p.B = size[0];
  p.S = size[1];
  p.D = size[2];
  p.half = size[3];
  p.cos = (const float*)angles[0];
  p.sin = (const float*)angles[1];
  p.table_rows = angles[2];
  p.table_batch = angles[3];
  p.positions = (const int64_t*)at[0];
  p.position_batch = at[1];
  p.cu_seqlens = (const int32_t*)at[2];
  p.sequences = at[3];
  p.interleaved = interleaved;
  p.inverse = inverse;
  py::gil_scoped_release release;
  FASTATTN_CALL(rotary(p, threads));
}

void gated_forward(py::handle rows, int64_t N, py::handle y, py::handle gate, py::handle up, int activation,
                   int threads) {
  Gated p;
  p.rows = rows_of(rows);
  p.N = N;
  p.y = tensor(y);
  p.gate = tensor(gate);
  p.up = tensor(up);
  p.activation = Activation(activation);
  py::gil_scoped_release release;
  FASTATTN_CALL(gated_forward(p, threads));
}

void gated_backward(py::handle rows, int64_t N, py::handle dgate, py::handle dup, py::handle dy, py::handle gate,
                    py::handle up, int activation, int threads) {
  Gated p;
  p.rows = rows_of(rows);
  p.N = N;
  p.dgate = tensor(dgate);
  p.dup = tensor(dup);
  p.dy = tensor(dy);
  p.gate = tensor(gate);
  p.up = tensor(up);
  p.activation = Activation(activation);
  py::gil_scoped_release release;
  FASTATTN_CALL(gated_backward(p, threads));
}

void dropout_add(py::handle rows, int64_t N, py::handle y, py::handle residual, py::handle x, int64_t seed,
                 double dropout_p, int threads) {
  const DropoutAdd p{rows_of(rows), N, tensor(y), tensor(residual), tensor(x), dropout_of(seed, dropout_p)};
  py::gil_scoped_release release;
  FASTATTN_CALL(dropout_add(p, threads));
}

void scale_rows(py::handle rows, int64_t N, py::handle out, py::handle x, py::handle factor, int64_t factor_step,
                int threads) {
  const Scale p{rows_of(rows), N, tensor(out), tensor(x), vector(factor), factor_step};
  py::gil_scoped_release release;
  FASTATTN_CALL(scale_rows(p, threads));
}

}  // namespace

void bind_cpu_rows(py::module_& m) {
  m.def("norm_forward", &norm_forward);
  m.def("norm_backward", &norm_backward);
  m.def("softmax_forward", &softmax_forward);
  m.def("softmax_backward", &softmax_backward);
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("rotary", &rotary);
  m.def("gated_forward", &gated_forward);
  m.def("gated_backward", &gated_backward);
  m.def("dropout_add", &dropout_add);
  m.def("scale_rows", &scale_rows);
}
