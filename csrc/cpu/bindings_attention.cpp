// fastattn._cpu: attention. A tensor is (address, dtype, strides), or None; strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"

namespace py = pybind11;

namespace {

using fastattn::AttentionParams;
using fastattn::DType;

fastattn::Matrix matrix(const py::handle& tensor) {
  if (tensor.is_none()) return {};
  const auto [data, strides] = tensor.cast<std::pair<uintptr_t, std::vector<int64_t>>>();
  return {reinterpret_cast<char*>(data), strides.at(0), strides.at(1), strides.at(2), strides.at(3)};
}

fastattn::Entries entries(const py::handle& tensor) {
  if (tensor.is_none()) return {};
  const auto [data, dtype, strides] = tensor.cast<std::tuple<uintptr_t, int, std::vector<int64_t>>>();
  return {reinterpret_cast<const char*>(data), DType(dtype), strides.at(0), strides.at(1), strides.at(2),
          strides.at(3)};
}

// What else would be read and written out of bounds
void check_bounds(const char* name, const std::vector<int64_t>& bounds, int64_t rows, int64_t longest) {
  bool right = !bounds.empty() && bounds.front() == 0 && bounds.back() <= rows;
  for (size_t b = 0; right && b + 1 < bounds.size(); ++b)
    right = bounds[b] <= bounds[b + 1] && bounds[b + 1] - bounds[b] <= longest;
  if (!right)
    throw std::invalid_argument(std::string("`") + name + "` must begin with 0, must not decrease, and must end at " +
                                std::to_string(rows) + ", the number of rows, or before; a sequence may have up to " +
                                std::to_string(longest) + " of them.");
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

void bind_cpu_attention(py::module_& m) {
  py::class_<AttentionParams>(m, "Attention", "One call: its tensors, sizes and options.")
      .def(py::init([](int dtype, std::vector<int64_t> sizes, const py::object& q, const py::object& k,
                       const py::object& v, const py::object& o, uintptr_t lse, uintptr_t lse_low) {
             AttentionParams p;
             p.dtype = DType(dtype);
             p.B = int(sizes.at(0)), p.H = int(sizes.at(1)), p.H_kv = int(sizes.at(2));
             p.rows_q = sizes.at(3), p.rows_k = sizes.at(4), p.D = int(sizes.at(5)), p.D_v = int(sizes.at(6));
             p.q = matrix(q), p.k = matrix(k), p.v = matrix(v), p.o = matrix(o);
             p.lse = floats(lse), p.lse_low = floats(lse_low);
             p.sequences.assign(p.B, {0, 0, int(p.rows_q), int(p.rows_k)});
             return p;
           }),
           "sizes: B, H, H_kv, S_q, S_k, D, D_v")
      .def("window",
           [](AttentionParams& p, int64_t left, int64_t right, bool top_left) {
             p.left = left, p.right = right, p.top_left = top_left;
           },
           "-1: unbounded")
      .def("score",
           [](AttentionParams& p, float scale, float softcap, const py::object& bias, const py::object& mask,
              std::vector<float> slopes, std::vector<float> sinks) {
             p.scale = scale, p.softcap = softcap;
             p.bias = entries(bias), p.mask = entries(mask);
             p.slopes = std::move(slopes), p.sinks = std::move(sinks);
           },
           "softcap 0: none; slopes (B, H) and sinks (H,), or empty")
      .def("dropout",
           [](AttentionParams& p, int64_t seed, int64_t threshold, float scale) {
             p.dropout = true, p.seed = uint64_t(seed), p.dropout_threshold = threshold, p.dropout_scale = scale;
           })
      .def("packed",
           [](AttentionParams& p, const std::vector<int64_t>& q, const std::vector<int64_t>& k, int64_t longest_q,
              int64_t longest_k) {
             check_bounds("cu_seqlens_q", q, p.rows_q, longest_q);
             check_bounds("cu_seqlens_k", k, p.rows_k, longest_k);
             if (q.size() != k.size())
               throw std::invalid_argument("`cu_seqlens_q` and `cu_seqlens_k` are of " + std::to_string(q.size()) +
                                           " and " + std::to_string(k.size()) + " numbers; they must be of as many.");
             p.packed = true;
             p.q.b = p.k.b = p.v.b = p.o.b = 0;
             p.sequences.clear();
             for (size_t b = 0; b + 1 < q.size(); ++b)
               p.sequences.push_back({q[b], k.at(b), int(q[b + 1] - q[b]), int(k.at(b + 1) - k[b])});
             p.B = int(p.sequences.size());
           },
           "cu_seqlens of q and k; the longest sequences that bias and mask have entries for")
      .def("forward",
           [](const AttentionParams& p, int threads) { fastattn::attention_forward(p, threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("backward",
           [](const AttentionParams& p, const py::object& d_o, const py::object& dlse, const py::object& dq,
              const py::object& dk, const py::object& dv, uintptr_t dbias, const std::vector<int64_t>& dbias_sizes,
              uintptr_t dslopes, uintptr_t dsinks, int threads) {
             fastattn::AttentionGradients g;
             g.d_o = matrix(d_o), g.dq = matrix(dq), g.dk = matrix(dk), g.dv = matrix(dv);
             if (p.packed) g.d_o.b = g.dq.b = g.dk.b = g.dv.b = 0;
             if (!dlse.is_none()) {
               const auto [data, strides] = dlse.cast<std::pair<uintptr_t, std::vector<int64_t>>>();
               g.dlse = floats(data), g.dlse_h = strides.at(1), g.dlse_m = strides.at(2);
               g.dlse_b = p.packed ? 0 : strides.at(0);
             }
             g.dbias = floats(dbias), g.dslopes = floats(dslopes), g.dsinks = floats(dsinks);
             for (size_t i = 0; i < dbias_sizes.size(); ++i) g.dbias_sizes[i] = dbias_sizes[i];
             py::gil_scoped_release release;
             fastattn::attention_backward(p, g, threads);
           },
           "Addresses of 0 and matrices that are None are not wanted.");
}
