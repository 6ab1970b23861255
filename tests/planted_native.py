"""A csrc of a few lines, and an nvcc that is g++ in disguise: the build engine is tested in seconds, without CUDA."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Python's own C interface, because pybind11's headers take seconds to compile.
BINDINGS = """
#include <Python.h>
#include <params.h>
#include <stdexcept>
static PyObject* answer_py(PyObject*, PyObject*) {
  try {
    return PyLong_FromLong(answer() + offset());
  } catch (const std::runtime_error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}
static PyMethodDef methods[] = {{"answer", answer_py, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__cuda() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "file", __FILE__);
  PyModule_AddIntConstant(m, "sm90", FASTATTN_SM90);
  return m;
}
"""
CPU_BINDINGS = """
#include <Python.h>
#include "cpu/kernel.h"
static PyObject* value_py(PyObject*, PyObject*) { return PyLong_FromLong(fastattn::baseline::value()); }
static PyMethodDef methods[] = {{"value", value_py, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
"""
CPU_KERNEL = """
#include "cpu/kernel.h"
namespace fastattn::FASTATTN_ISA {
int value() { return 7; }
}
"""
FILES = {
    "params.h": "int answer();\nint offset();\n",
    "cuda/launch.h": "",
    "cuda/value.h": "#define VALUE 42\n",
    "cuda/answer.cu": "#include <params.h>\n#include <value.h>\nint answer() { return VALUE; }\n",
    "cuda/offset.cu": "#include <params.h>\nint offset() { return 0; }\n",
    "cuda/sm90/attention.cu": "void attention() {}\n",
    "bindings_cuda.cpp": BINDINGS,
    "bindings_cpu.cpp": CPU_BINDINGS,
    "cpu/kernel.h": "namespace fastattn::baseline {\nint value();\n}\n",
    "cpu/kernel.cpp": CPU_KERNEL,
    # what no target takes
    "cuda/tests/test.cu": "#error a test\n",
    "README.md": "",
}


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# Understands what the engine passes, and says what ptxas would; FAKE_PTXAS is what it adds for answer.cu.
FAKE_NVCC = r"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
  --list-gpu-code) printf 'sm_80\nsm_86\nsm_90\nsm_100\n'; exit 0 ;;
esac
echo "$@" >> "$(dirname "$0")/calls"
last=
for argument in "$@"; do
  shift
  case "$argument" in
    -Xptxas=* | -gencode=* | -lineinfo | -cudart=* | -Xlinker=* | -ccbin=*) ;;
    -Xcompiler=*) set -- "$@" $(echo "${argument#-Xcompiler=}" | tr , ' ') ;;
    *.cu) set -- "$@" -xc++ "$argument"; last=$argument ;;
    *) set -- "$@" "$argument" ;;
  esac
done
case "$last" in *answer.cu) [ -z "$FAKE_PTXAS" ] || echo "$FAKE_PTXAS" >&2 ;; esac
exec g++ "$@"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def fake_toolkit(folder: Path) -> Path:
    """CUDA_HOME with such an nvcc."""
    write_program(folder / "bin/nvcc", FAKE_NVCC)
    return folder


def calls(toolkit: Path) -> list[str]:
    """What the nvcc of fake_toolkit was called with, a line each."""
    path = toolkit / "bin/calls"
    return path.read_text().splitlines() if path.is_file() else []


def compiled(calls: list[str]) -> list[str]:
    """The sources that were compiled, sorted."""
    words = [line.split() for line in calls]
    return sorted(os.path.basename(line[line.index("-c") + 1]) for line in words if "-c" in line)
