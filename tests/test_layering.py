"""Who may import whom: the layers of design.md, held on the syntax tree of every module, functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fastattn").rglob("*.py"))
}
BOTTOM = ("fastattn.errors", "fastattn.spec", "fastattn.tracing")
TRITON = "fastattn.backends.triton"

# module or package -> what of ours, and whether triton, it may import, besides, in a package, its own. The longest name
# that fits a module counts. A name with =, on either side, is that module alone, without what lies below it.
ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(BOTTOM, ()),
    "fastattn.native": (),
    "fastattn.inspection": ("fastattn.native",),
    "fastattn.reference": ("fastattn.spec",),
    "=fastattn.backends": (
        "=fastattn.backends.cpu",
        "=fastattn.backends.cuda",
        "=fastattn.backends.eager",
        "=fastattn.backends.reference",
        f"={TRITON}",
        *BOTTOM,
    ),
    "fastattn.backends.reference": ("fastattn.reference", "fastattn.spec", "fastattn.tracing"),
    # The one backend that uses another: torch's fused functions where they are exact, the reference elsewhere.
    "fastattn.backends.eager": (
        "fastattn.backends.reference",
        "fastattn.reference",
        "fastattn.spec",
        "fastattn.tracing",
    ),
    "fastattn.backends.cpu": (
        "=fastattn.native",
        "fastattn.backends.row_layout",
        "fastattn.errors",
        "fastattn.reference.dropout",
        "fastattn.spec",
        "fastattn.tracing",
    ),
    "fastattn.backends.cuda": ("=fastattn.native", "fastattn.backends.row_layout", "fastattn.spec"),
    "fastattn.backends.row_layout": (),  # how rows lie in tensors, for all that launch kernels on them
    TRITON: ("fastattn.backends.row_layout", "fastattn.errors", "fastattn.inspection", "fastattn.spec", "triton"),
    f"{TRITON}.blocks": (f"={TRITON}", "fastattn.spec", "triton"),
    "fastattn.ops": ("=fastattn.backends", *BOTTOM),
    "fastattn.autograd": ("fastattn.ops",),
    "fastattn._arguments": BOTTOM,
    "fastattn.functional": ("fastattn._arguments", "fastattn.ops", "=fastattn.backends", *BOTTOM),
    "fastattn.nn": ("fastattn.functional", "fastattn.errors"),
    "fastattn.cli": (
        "=fastattn",
        "=fastattn.backends",
        *(f"{TRITON}.{name}" for name in ("configs", "inspection", "tuning")),
        "fastattn.errors",
        "fastattn.inspection",
        "fastattn.native",
        "fastattn.verification",
        "triton",
    ),
    "fastattn.verification": ("=fastattn", "fastattn.errors", "fastattn.testing"),
    "fastattn.testing": ("fastattn.simulated_rounding",),
    "fastattn.simulated_rounding": (),
    "=fastattn": ("fastattn.autograd", "fastattn.errors", "fastattn.functional", "fastattn.nn"),
    "fastattn.__main__": ("fastattn.cli",),
}


@dataclass(frozen=True)
class Import:
    module: str  # the module that is loaded: a submodule where `from package import name` names one
    at_import: bool  # runs when the importing module is imported, not when a function of it is called


def imports(module: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """Every import in the source of `module`, wherever it stands; `known` are the modules that exist."""
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield Import(submodule if submodule in known else base, at_import)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from children(node.body, False)
            yield from children(node.orelse, at_import)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from children(node.body, False)
        else:
            yield from children(ast.iter_child_nodes(node), at_import)

    def children(nodes, at_import: bool) -> Iterator[Import]:
        for node in nodes:
            yield from visit(node, at_import)

    return visit(ast.parse(source), True)


def within(module: str, name: str) -> bool:
    """Whether `module` is meant by `name`: it, something below it, or, with =, it alone."""
    return module == name[1:] if name.startswith("=") else module == name or module.startswith(f"{name}.")


def violations(module: str, source: str) -> list[str]:
    """What the imports of one module break; empty when nothing."""
    known = frozenset(MODULES)
    layers = [name for name in ALLOWED if within(module, name)]
    if not layers:
        return [f"{module} has no place among the layers"]
    layer = max(layers, key=lambda name: len(name.lstrip("=")))
    allowed = (*ALLOWED[layer], *([] if layer.startswith("=") else [layer]))
    found = []
    for imported in imports(module, source, known):
        is_triton = within(imported.module, "triton")
        # Kernels are decorated with triton.jit: what imports one imports triton.
        brings_triton = is_triton or (within(imported.module, TRITON) and imported.module != TRITON)
        if (is_triton or within(imported.module, "fastattn")) and not any(within(imported.module, a) for a in allowed):
            found.append(f"{module} imports {imported.module}")
        elif brings_triton and imported.at_import and (module == TRITON or not within(module, TRITON)):
            found.append(f"{module} imports {imported.module} when it is imported itself")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_layers(module: str):
    assert violations(module, MODULES[module].read_text()) == []


PLANTED = [
    ("fastattn.spec", "from fastattn.errors import ArgumentError", "imports fastattn.errors"),
    ("fastattn.errors", "def f():\n    import fastattn.spec", "imports fastattn.spec"),
    ("fastattn.tracing", "import torch, fastattn.spec", "imports fastattn.spec"),
    ("fastattn.reference.attention", "import triton", "imports triton"),
    ("fastattn.reference.attention", "def f():\n    from triton import language", "imports triton"),
    ("fastattn.reference.softmax", "from fastattn import backends", "imports fastattn.backends"),
    ("fastattn.backends", "from fastattn.reference import attention", "imports fastattn.reference.attention"),
    ("fastattn.backends", "from .triton import configs", f"imports {TRITON}.configs"),
    ("fastattn.backends.reference", "from fastattn.backends import eager", "imports fastattn.backends.eager"),
    ("fastattn.backends.reference", "from .eager import NAME", "imports fastattn.backends.eager"),
    ("fastattn.backends.eager", "from fastattn.backends.triton import NAME", f"imports {TRITON}"),
    ("fastattn.backends.eager", "from ..functional import softmax", "imports fastattn.functional"),
    (TRITON, "import triton", "imports triton when"),
    (TRITON, "try:\n    from triton import jit\nexcept ImportError:\n    jit = None", "imports triton when"),
    (TRITON, "from fastattn.backends.triton.attention_fwd import launch", f"imports {TRITON}.attention_fwd when"),
    (TRITON, "class A:\n    from .softmax import launch_forward", f"imports {TRITON}.softmax when"),
    (f"{TRITON}.softmax", "from fastattn.backends import eager", "imports fastattn.backends.eager"),
    (f"{TRITON}.blocks.mask", "from fastattn.backends.triton.configs import padded", f"imports {TRITON}.configs"),
    ("fastattn.ops.attention", "def f():\n    from fastattn.backends.triton import NAME", f"imports {TRITON}"),
    ("fastattn.ops.softmax", "import fastattn.functional", "imports fastattn.functional"),
    ("fastattn._arguments", "from fastattn import backends", "imports fastattn.backends"),
    ("fastattn._arguments", "def f():\n    from fastattn.functional import explain", "imports fastattn.functional"),
    ("fastattn.functional", "if True:\n    import triton", "imports triton"),
    ("fastattn.functional", "async def f():\n    from fastattn.nn import Softmax", "imports fastattn.nn"),
    ("fastattn.functional._attention", "from fastattn.backends.eager import NAME", "imports fastattn.backends.eager"),
    ("fastattn.functional._softmax", "from ..nn import LayerNorm", "imports fastattn.nn"),
    ("fastattn.nn.norm", "from fastattn.ops.norm import layer_norm", "imports fastattn.ops.norm"),
    ("fastattn.cli.inspect", "from fastattn.backends.triton import inspection", f"{TRITON}.inspection when"),
    ("fastattn.cli.inspect", "if TYPE_CHECKING:\n    pass\nelse:\n    import triton", "imports triton"),
    ("fastattn.shiny", "", "has no place among the layers"),
]


@pytest.mark.parametrize(("module", "source", "violation"), PLANTED)
def test_planted_violation_is_found(module: str, source: str, violation: str):
    found = violations(module, source)
    assert len(found) == 1
    assert violation in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (TRITON, "def f():\n    import triton"),
        (TRITON, "def f():\n    from fastattn.backends.triton.softmax import launch_forward"),
        (f"{TRITON}.softmax", "import triton"),
        ("fastattn.backends.eager", "from fastattn.backends import reference"),
        ("fastattn.cli.inspect", "if TYPE_CHECKING:\n    from fastattn.backends.triton.inspection import Report"),
        ("fastattn._arguments", "from fastattn.tracing import is_plain"),
        ("fastattn.functional", "from fastattn import backends\nfrom tritonclient import http"),
        (
            "fastattn.functional._explain",
            "from fastattn.functional._attention import attention\nfrom . import _softmax",
        ),
    ],
)
def test_what_is_allowed_passes(module: str, source: str):
    assert violations(module, source) == []
