// fastattn._cuda: built by nvcc for GPUs, and by g++ with the emulator for any CPU. Tensors come as addresses, sizes and
// strides; torch is not included.
#include <emulation.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_rows(py::module_& m);

PYBIND11_MODULE(_cuda, m) {
#if FASTATTN_SM90
  bind_attention(m);
#endif
  bind_rows(m);
  bind_emulation(m);
}
