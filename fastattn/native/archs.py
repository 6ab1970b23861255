"""The architectures that can be asked for, the one that is there, and which of them a GPU can run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

from .errors import UnknownArch

# name -> the cards it is for. With an `a`: only that very card, and instructions that no other has.
ACCEPTED = {
    "sm_80": "A100, A30",
    "sm_86": "A40, A10, RTX 30",
    "sm_87": "Jetson AGX Orin",
    "sm_89": "L4, L40, RTX 40",
    "sm_90": "H100, H200, without the kernels written for Hopper",
    "sm_90a": "H100, H200, GH200",
    "sm_100": "B200, GB200",
    "sm_100a": "B200, GB200",
    "sm_103": "B300, GB300",
    "sm_103a": "B300, GB300",
    "sm_110": "Jetson Thor",
    "sm_110a": "Jetson Thor",
    "sm_120": "RTX 50, RTX PRO Blackwell",
    "sm_120a": "RTX 50, RTX PRO Blackwell",
    "sm_121": "GB10",
    "sm_121a": "GB10",
}
HOPPER = "sm_90a"  # the only one that csrc/cuda/sm90 is compiled for


def parse(text: str) -> tuple[str, ...]:
    """The architectures in a text such as "80;90a", "sm_90a" or "9.0a, 8.0", each once, in the order of the list."""
    names = [f"sm_{word.removeprefix('sm_').replace('.', '')}" for word in re.split(r"[;,\s]+", text) if word]
    for name in names:
        if name not in ACCEPTED:
            raise UnknownArch(f"{name.removeprefix('sm_')!r} is no architecture known here; {_accepted()}")
    if not names:
        raise UnknownArch(f"{text!r} names no architecture; {_accepted()}")
    return tuple(name for name in ACCEPTED if name in names)


def _accepted() -> str:
    return f"accepted are {', '.join(ACCEPTED)}, also written as in 80;90a or 9.0a."


def of_capability(capability: tuple[int, int]) -> str:
    """The architecture to compile for, for a GPU: with Hopper's own instructions on Hopper, which kernels here use."""
    if capability == (9, 0):
        return HOPPER
    major, minor = capability
    names = (f"sm_{major}{lower}" for lower in range(minor, -1, -1))  # code for x.y runs on x.z, z ≥ y
    if found := next((name for name in names if name in ACCEPTED), None):
        return found
    raise UnknownArch(f"A GPU of compute capability {major}.{minor} is not known here; {_accepted()}")


def covers(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code compiled for one of the architectures runs on a GPU of that compute capability."""
    major, minor = capability
    for arch in archs:
        digits = arch.removeprefix("sm_").rstrip("a")
        if arch.endswith("a"):
            if digits == f"{major}{minor}":
                return True
        elif digits[:-1] == str(major) and int(digits[-1]) <= minor:
            return True
    return False


def present() -> tuple[str, ...]:
    """The architectures of the GPUs in this machine, by NVIDIA's own tool; empty if there is none, or no driver."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ()
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    wanted = {of_capability((int(major), int(minor))) for major, minor in found if int(major) >= 8}
    return tuple(name for name in ACCEPTED if name in wanted)
