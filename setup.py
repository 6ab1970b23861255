"""Everything that is not in pyproject.toml: fastattn._cpu where there is a C++ compiler, fastattn._cuda where there is
nvcc and a GPU to compile for."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_native() -> Any:
    """fastattn.native by its path: importing fastattn needs torch, which is not installed where a wheel is built."""
    folder = ROOT / "fastattn/native"
    spec = importlib.util.spec_from_file_location(
        "_fastattn_native", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NATIVE = load_native().__name__
KERNELS = {"cuda": "CUDA kernels", "cpu": "CPU kernels"}
try:
    DECISIONS = import_module(f"{NATIVE}.installation").decide(os.environ)
except ValueError as error:
    sys.exit(f"fastattn: {error}")
for target, decision in DECISIONS.items():
    if decision.required and not decision.compiles:
        sys.exit(f"fastattn: FASTATTN_BUILD is 1, but the {KERNELS[target]} cannot be compiled: {decision.reason}")


def manifest_name(target: str) -> str:
    return f"_{target}.json"


class BuildPy(build_py):
    """Ships csrc inside the package, so that `python -m fastattn build` works from a wheel.

    Not through package_dir, which would turn an editable installation's path entry into an import hook.
    """

    def run(self) -> None:
        for target, decision in DECISIONS.items():
            if not decision.compiles:
                print(f"fastattn: {KERNELS[target]} are not compiled: {decision.reason}")
        super().run()
        if not self.editable_mode:
            plan = import_module(f"{NATIVE}.plan")
            target = Path(self.build_lib) / "fastattn/csrc"
            shutil.rmtree(target, ignore_errors=True)
            for patterns in plan.PATTERNS.values():
                for name, content in plan.read_sources(ROOT / "csrc", patterns).items():
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (target / name).write_bytes(content)


class BuildExt(build_ext):
    """Compiles by fastattn's own engine; a failure is told, and the package installed without the module."""

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.removeprefix("fastattn._")
        decision, workplace = DECISIONS[target], import_module(f"{NATIVE}.workplace")
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        try:
            wanted = decision.plan()
            folder = Path(self.build_temp).resolve() / f"{wanted.target}-{wanted.workplace_key}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(workplace.run(wanted, folder), module)
        except (RuntimeError, ValueError) as error:
            if decision.required:
                sys.exit(f"fastattn: the {KERNELS[target]} do not compile, and FASTATTN_BUILD is 1: {error}")
            print(f"fastattn: installed without {KERNELS[target]}, which do not compile: {error}")
            return
        manifest = {**wanted.manifest(), "module": module.name}
        (module.parent / manifest_name(target)).write_text(json.dumps(manifest, indent=1))
        print(f"fastattn: compiled the {KERNELS[target]} for {', '.join(wanted.archs)} with {wanted.compiler}")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for target in DECISIONS:
            built = Path(self.build_lib) / "fastattn" / manifest_name(target)
            if built.is_file():
                shutil.copy2(built, ROOT / "fastattn" / built.name)


setup(
    # Without any the wheel fits every platform.
    ext_modules=[
        Extension(f"fastattn._{target}", sources=[], optional=True)
        for target, decision in DECISIONS.items()
        if decision.compiles
    ],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
