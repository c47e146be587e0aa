"""What the tests share: a small cohort of phantoms, and the bundle's commands run as users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.phantoms import make_brains

ROOT = Path(__file__).parent.parent
TINY = ["configs/train.json", "tests/tiny.json"]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Twelve brains at 8 mm."""
    return Path(make_brains(tmp_path_factory.mktemp("data") / "brains", 12, spacing=8.0, workers=1))


def run_bundle(*arguments: object, run_id: str = "training", configs=TINY, cwd: Path = ROOT, timeout: int = 300):
    """``python -m monai.bundle run ...`` with a tiny network, in a process of its own."""
    words = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str([str(c) for c in configs])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*words, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
