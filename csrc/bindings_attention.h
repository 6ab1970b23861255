// Python's door to a launcher of the attention forward: tensors come as addresses, strides and sizes.
#pragma once
#include <params.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

namespace bindings {

using Strides = std::array<int64_t, 3>;  // of batch, head and row, in elements

inline AttentionDtype attention_dtype(const std::string& name) {
  if (name == "bf16") return AttentionDtype::Bf16;
  if (name == "fp16") return AttentionDtype::Fp16;
  throw std::invalid_argument("`dtype` is '" + name + "'; it must be 'bf16' or 'fp16'.");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// m.name(*, q, k, …): what each argument means is in params.h.
template <void (*LAUNCH)(const AttentionForwardParams&, void*)>
void def_attention_forward(pybind11::module_& m, const char* name, const char* doc) {
  namespace py = pybind11;
  const auto forward = [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t lse, uintptr_t lse_low,
                          const Strides& q_strides, const Strides& k_strides, const Strides& v_strides, const Strides& o_strides, int B, int H,
                          int H_kv, int S_q, int S_k, int D, int D_v, const std::string& dtype, float scale,
                          float softcap, int64_t left, int64_t right, bool bottom_right, uintptr_t cu_seqlens_q,
                          uintptr_t cu_seqlens_k, uintptr_t counter, uintptr_t stream) {
    AttentionForwardParams x{};
    x.dtype = attention_dtype(dtype);
    x.q = pointer<void>(q), x.k = pointer<void>(k), x.v = pointer<void>(v), x.o = pointer<void>(o);
    x.lse = pointer<float>(lse), x.lse_low = pointer<float>(lse_low);
    x.stride_qb = q_strides[0], x.stride_qh = q_strides[1], x.stride_qm = q_strides[2];
    x.stride_kb = k_strides[0], x.stride_kh = k_strides[1], x.stride_kn = k_strides[2];
    x.stride_vb = v_strides[0], x.stride_vh = v_strides[1], x.stride_vn = v_strides[2];
    x.stride_ob = o_strides[0], x.stride_oh = o_strides[1], x.stride_om = o_strides[2];
    x.cu_seqlens_q = pointer<int>(cu_seqlens_q), x.cu_seqlens_k = pointer<int>(cu_seqlens_k);
    x.counter = pointer<int>(counter);
    x.B = B, x.H = H, x.H_kv = H_kv, x.S_q = S_q, x.S_k = S_k, x.D = D, x.D_v = D_v;
    x.scale = scale, x.softcap = softcap, x.left = left, x.right = right, x.bottom_right = bottom_right;
    py::gil_scoped_release released;
    LAUNCH(x, pointer<void>(stream));
  };
  constexpr int64_t ALL = int64_t{1} << 62;
  m.def(name, forward, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"),
        py::arg("lse_low"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("o_strides"), py::arg("B"),
        py::arg("H"), py::arg("H_kv"), py::arg("S_q"), py::arg("S_k"), py::arg("D"), py::arg("D_v"), py::arg("dtype"),
        py::arg("scale"), py::arg("softcap") = 0.0f, py::arg("left") = ALL, py::arg("right") = ALL,
        py::arg("bottom_right") = true, py::arg("cu_seqlens_q") = 0, py::arg("cu_seqlens_k") = 0,
        py::arg("counter") = 0, py::arg("stream") = 0, doc);
}

}  // namespace bindings
