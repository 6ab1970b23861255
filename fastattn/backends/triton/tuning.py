"""The search for faster tiles of the attention kernels, and the change to `configs.py` that keeps what it finds.

A walk from the tile that is in the table: of its neighbours, which differ in one field, each that is legal is timed,
and the walk goes on from the fastest until none is faster by more than the noise. Two kernels share no tile, so each
is tuned by itself.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fastattn.backends.triton import configs
from fastattn.backends.triton.configs import TileConfig

KERNELS = ("forward", "dq", "dkdv")
FIELDS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "num_warps": (2, 16)}  # doubled and halved between these
STAGES = (1, 5)
WORTH = 0.02  # a tile that is faster by less than this fraction is not moved to

Measure = Callable[[TileConfig], float]  # -> seconds; inf where a tile does not compile or is wrong


@dataclass(frozen=True)
class Step:
    """One tile that was tried."""

    config: TileConfig
    seconds: float


@dataclass(frozen=True)
class Found:
    """The outcome of one walk."""

    kernel: str
    width: int  # the key of the table: the largest padded head dimension that takes this tile
    tried: tuple[Step, ...]  # the first is the tile of the table

    @property
    def before(self) -> Step:
        return self.tried[0]

    @property
    def best(self) -> Step:
        return min(self.tried, key=lambda step: step.seconds)

    @property
    def gain(self) -> float:
        """Of time, as a fraction; 0 where nothing was worth moving to."""
        gain = 1 - self.best.seconds / self.before.seconds
        return gain if gain > WORTH else 0.0


def neighbours(cfg: TileConfig) -> Iterator[TileConfig]:
    """Tiles that differ in one field, and those with the same area in another form."""
    for name, (least, most) in FIELDS.items():
        value = getattr(cfg, name)
        for other in (value * 2, value // 2):
            if least <= other <= most:
                yield replace(cfg, **{name: other})
    for stages in (cfg.num_stages + 1, cfg.num_stages - 1):
        if STAGES[0] <= stages <= STAGES[1]:
            yield replace(cfg, num_stages=stages)
    for m, n in ((cfg.BLOCK_M * 2, cfg.BLOCK_N // 2), (cfg.BLOCK_M // 2, cfg.BLOCK_N * 2)):
        if all(16 <= size <= 256 for size in (m, n)):
            yield replace(cfg, BLOCK_M=m, BLOCK_N=n)


def search(
    kernel: str, width: int, arch: str, measure: Measure, over: Callable[[], bool], element_size: int = 2
) -> Found:
    """Walks until no neighbour is faster by more than WORTH, or `over` says that the time is up."""
    start = configs.table(arch, kernel)[width]
    tried = {start: measure(start)}
    here = start
    while not over():
        for cfg in neighbours(here):
            if cfg in tried or configs.illegal(kernel, cfg, arch, width, width, element_size):
                continue
            if over():
                break
            tried[cfg] = measure(cfg)
        best = min(tried, key=lambda cfg: tried[cfg])
        if tried[best] > (1 - WORTH) * tried[here]:
            break
        here = best
    return Found(kernel, width, tuple(Step(cfg, seconds) for cfg, seconds in tried.items()))


@contextmanager
def tile_in_table(arch: str, kernel: str, width: int, cfg: TileConfig) -> Iterator[None]:
    """The table with another tile, as long as the context lasts."""
    table = configs.table(arch, kernel)
    before = table[width]
    table[width] = cfg
    configs.forget()
    try:
        yield
    finally:
        table[width] = before
        configs.forget()


def updated_source(source: str, arch: str, found: list[Found]) -> str:
    """The source of `configs.py` with the winners in its table."""
    tiles = _table_node(ast.parse(source))
    lines = source.splitlines(keepends=True)
    edits = []
    for result in found:
        if result.gain:
            node = _value(_value(_value(tiles, configs.row_of(arch)), result.kernel), result.width)
            edits.append((node, _written(result.best.config)))
    for node, text in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        assert node.end_lineno == node.lineno
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line[: node.col_offset] + text + line[node.end_col_offset :]
    return "".join(lines)


def diff(arch: str, found: list[Found]) -> str:
    """The winners as a change that `git apply` takes; empty where the table is as good as anything tried."""
    path = Path(inspect.getfile(configs))
    source = path.read_text()
    name = path.relative_to(path.parents[3]).as_posix()
    changed = updated_source(source, arch, found)
    return "".join(
        difflib.unified_diff(
            source.splitlines(keepends=True), changed.splitlines(keepends=True), f"a/{name}", f"b/{name}"
        )
    )


def _written(cfg: TileConfig) -> str:
    return f"TileConfig({cfg.BLOCK_M}, {cfg.BLOCK_N}, {cfg.num_warps}, {cfg.num_stages})"


def _table_node(tree: ast.Module) -> ast.expr:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "_TILES":
            assert node.value is not None
            return node.value
    raise AssertionError("configs.py assigns no _TILES")


def _value(node: ast.expr, key: object) -> ast.expr:
    assert isinstance(node, ast.Dict)
    for k, v in zip(node.keys, node.values, strict=True):
        found = k.value if isinstance(k, ast.Constant) else getattr(configs, k.id) if isinstance(k, ast.Name) else None
        if found == key:
            return v
    raise AssertionError(f"the table has no {key!r}")
