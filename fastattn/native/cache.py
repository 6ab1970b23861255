"""The user's own folder of built modules: private, written atomically, safe for processes that build at once.

<root>/native/<target>-<key>/            a published module and its manifest.json; never changed afterwards
<root>/native/build/<target>-<key>/      sources, objects, build.ninja: kept, so that only what changed is compiled
<root>/native/build/<target>-<key>.lock  held by the one process that builds there
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import workplace
from .errors import UnsafeCache
from .plan import Plan

MANIFEST = "manifest.json"
KEPT = 16  # published modules of one target


def location() -> Path:
    """FASTATTN_CACHE, else fastattn in XDG_CACHE_HOME, else ~/.cache/fastattn. It need not exist."""
    if own := os.environ.get("FASTATTN_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "fastattn"


def private_root(create: bool = True) -> Path | None:
    """The folder, or None if it is not there and not to be created. Refused if others could put code into it."""
    folder = location().resolve()  # once: a link that is replaced afterwards leads nowhere else
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except FileExistsError as error:
        raise UnsafeCache(f"The cache {folder} is not a folder; name another in FASTATTN_CACHE.") from error
    except OSError as error:
        if create:
            raise UnsafeCache(f"The cache folder cannot be made: {error}. Name another in FASTATTN_CACHE.") from error
        return None
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafeCache(f"The cache {folder} is not a folder; name another in FASTATTN_CACHE.")
    if status.st_uid != os.geteuid():
        raise UnsafeCache(
            f"The cache folder {folder} belongs to user {status.st_uid}, not to {os.geteuid()} who runs this; "
            "name another in FASTATTN_CACHE."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeCache(
            f"The cache folder {folder} can be written to by others (mode {stat.S_IMODE(status.st_mode):o}): what is "
            f"built there could be replaced. `chmod go-w {folder}`, or name another in FASTATTN_CACHE."
        )
    return folder


@dataclass(frozen=True)
class Built:
    """A module that is there, and what its manifest says."""

    path: Path
    target: str
    sources: str  # digest
    archs: tuple[str, ...]
    abi: str
    compiler: str


def read_manifest(path: Path) -> Built | None:
    """What a manifest describes; None if it cannot be read, or its module is gone."""
    try:
        content = json.loads(path.read_text())
        built = Built(
            path=path.parent / str(content["module"]),
            target=str(content["target"]),
            sources=str(content["sources"]),
            archs=tuple(map(str, content["archs"])),
            abi=str(content["abi"]),
            compiler=str(content["compiler"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if built.path.is_file() else None


def published(target: str) -> list[Built]:
    """Every module of a target, the newest first."""
    if (root := private_root(create=False)) is None:
        return []
    found = ((path.stat().st_mtime_ns, path) for path in (root / "native").glob(f"{target}-*/{MANIFEST}"))
    return [built for _, path in sorted(found, reverse=True) if (built := read_manifest(path)) is not None]


def build(plan: Plan, jobs: int | None = None, progress: workplace.Progress | None = None) -> tuple[Built, bool]:
    """The plan's module in the cache, and whether it had to be built."""
    root = private_root()
    assert root is not None
    final = root / "native" / f"{plan.target}-{plan.key}"
    if (built := read_manifest(final / MANIFEST)) is not None:
        os.utime(final / MANIFEST)  # the newest is taken where several fit
        return built, False
    with own_workplace(plan) as folder:
        if (built := read_manifest(final / MANIFEST)) is not None:  # by the process that was waited for
            return built, False
        _publish(plan, workplace.run(plan, folder, jobs, progress), final)
    built = read_manifest(final / MANIFEST)
    assert built is not None
    _prune(plan.target)
    return built, True


@contextlib.contextmanager
def own_workplace(plan: Plan) -> Iterator[Path]:
    """The folder where a plan is built, for one process at a time; the others wait."""
    import fcntl

    root = private_root()
    assert root is not None
    folder = root / "native/build" / f"{plan.target}-{plan.workplace_key}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, at the latest when the process ends
        yield folder


def _publish(plan: Plan, module: Path, final: Path) -> None:
    """Copies a module and its manifest into a folder that appears under its name complete, or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
    try:
        shutil.copy2(module, temporary / plan.filename)
        (temporary / MANIFEST).write_text(json.dumps(plan.manifest(), indent=1))
        try:
            temporary.rename(final)
        except OSError:
            if read_manifest(final / MANIFEST) is not None:
                return  # another process was faster, with the same
            shutil.rmtree(final)  # remains of one whose files were deleted
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prune(target: str) -> None:
    """Forgets the oldest; a process that has loaded one keeps it in memory."""
    for built in published(target)[KEPT:]:
        shutil.rmtree(built.path.parent, ignore_errors=True)
