"""What `import fastattn` costs, in a fresh interpreter that has imported torch already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bytecode goes to a folder of the test's own, so that nothing is left beside the sources.
MODULES = """
import json, sys
import torch
already = set(sys.modules)
sys.pycache_prefix = sys.argv[1]
import fastattn
print(json.dumps(sorted(set(sys.modules) - already)))
"""


def import_fastattn(bytecode: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MODULES, str(bytecode)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytecode")


def test_import_adds_only_ours(bytecode: Path):
    """Beside the standard library: no triton, nor anything else that torch has not loaded."""
    added = import_fastattn(bytecode)
    packages = {name.partition(".")[0] for name in added}
    assert "fastattn" in packages
    assert "triton" not in packages
    assert packages - sys.stdlib_module_names <= {"fastattn", "torch"}
    # What builds and finds native modules is loaded when one is asked for, and so are the modules.
    assert {name for name in added if name.startswith(("fastattn.native.", "fastattn.inspection", "fastattn.cli"))} <= {
        "fastattn.native.errors"
    }
    assert not {name for name in added if name.startswith("fastattn._cuda")}


def test_import_adds_few_modules(bytecode: Path):
    """What an import costs grows with the files it reads; the time itself is measured by benchmarks/overhead.py."""
    added = [name for name in import_fastattn(bytecode) if name.startswith("fastattn")]
    assert len(added) <= 80
    assert not {name for name in added if name.startswith(("fastattn.testing", "fastattn.simulated_rounding"))}
