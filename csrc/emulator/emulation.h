// What the module says of the emulator: how the launches to come are scheduled, and kernels with mistakes.
#pragma once
#include <bindings_attention.h>
#include <emulator/attention_variants.h>
#include <emulator/emulate.h>

template <class Module>
void bind_emulation(Module& m) {
  namespace py = pybind11;
  m.def("emulator_mode", &emulator::set_mode, py::arg("name"), py::arg("seed") = 0,
        "The schedule of the launches to come: eager, tma_last, wgmma_last, or random with a seed.");
  m.def("emulator_sms", &emulator::set_sm_count, py::arg("n"), "How many SMs the emulated GPU has.");
  m.def("emulator_attention", &emulator::set_attention_variant, py::arg("config"), py::arg("bug") = "None",
        "What attention_forward_variant launches from now on.");
  m.def("emulator_attention_variants", &emulator::attention_variants);
  m.def("emulator_attention_bugs", &emulator::attention_bugs);
  bindings::def_attention_forward<emulator::attention_forward_variant>(
      m, "attention_forward_variant", "attention_forward with the configuration and the bug of emulator_attention.");
}
