// The kernels of attention are there only where Hopper is among the architectures.
#if FASTATTN_SM90
#include <bindings_attention.h>
#include <sm90/attention.h>

void bind_attention(pybind11::module_& m) {
  bindings::def_attention_forward<attention_forward>(
      m, "attention_forward", "o = softmax(f(q k^T)) v and its lse on sm_90a; see csrc/params.h.");
  m.def("attention_forward_config", &attention_forward_config, pybind11::arg("D"), pybind11::arg("D_v"),
        pybind11::arg("S_q") = 4096, "The tile configuration for these sizes, as text; '' where there is none.");
}
#endif
