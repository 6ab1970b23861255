// fastattn._cpu. Tensors come as addresses, sizes and strides; torch is not included.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

void bind_cpu_attention(py::module_& m);
void bind_cpu_rows(py::module_& m);

PYBIND11_MODULE(_cpu, m) {
  m.def("isa", &fastattn::isa_name, "The instruction set in use.");
  m.def("set_isa", &fastattn::set_isa, py::arg("name"), "Use this one from now on; '' chooses as at the start.");
  m.def("available_isas", &fastattn::available_isas, "Those that this CPU has, the best last.");
  bind_cpu_attention(m);
  bind_cpu_rows(m);
}
