"""`info`: versions, devices, and on each device the backends that can run."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterator

import torch

import fastattn
from fastattn import backends, native
from fastattn.native.errors import BuildFailed, UnsafeCache


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("info", help="versions, devices, and the backends available on each")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, version in versions():
        print(f"{name:<9} {version}")
    for device, description in devices():
        print(f"\n{device}: {description}")
        for name in backends.ORDER:
            why = backends.get(name).available(device)
            print(f"  {name:<10} {'available' if why is None else f'not available: {why}'}")
    print("\nnative modules")
    for name, description in native_modules():
        print(f"  {name:<10} {description}")
    return 0


def native_modules() -> Iterator[tuple[str, str]]:
    """Each module that is compiled apart: for what and where it is, or how to get it."""
    missing = {
        "cpu": native.why_no_cpu(),
        "cuda": native.why_not(),
        "emulator": native.why_no_emulator() or "FASTATTN_EMULATE=1 compiles it with the first kernel that runs",
    }
    for target, why in missing.items():
        try:
            built = native.built(target)
        except (BuildFailed, UnsafeCache) as error:
            yield target, str(error)
            continue
        if not built:
            yield target, f"not there: {why}"
        for module in built:
            archs = f"for {', '.join(module.archs)} " if module.archs else ""
            yield target, f"compiled {archs}by {module.compiler}: {module.path}"


def versions() -> Iterator[tuple[str, str]]:
    yield "fastattn", fastattn.__version__
    yield "torch", torch.__version__
    if importlib.util.find_spec("triton") is None:
        yield "triton", "not installed"
    else:
        import triton

        yield "triton", triton.__version__
    yield "python", platform.python_version()


def devices() -> Iterator[tuple[torch.device, str]]:
    """Every device that torch sees, with its name and size."""
    yield torch.device("cpu"), f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        arch = getattr(device, "gcnArchName", f"sm_{device.major}{device.minor}")
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield torch.device("cuda", index), f"{device.name}, {arch}, {device.multi_processor_count} cores, {memory}"
