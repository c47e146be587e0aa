"""The code is linted and formatted, and the configs are readable anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.json")), ids=lambda path: path.name)
def test_a_config_is_read_in_any_locale(config):
    # MONAI opens it in the locale's own encoding
    assert config.read_bytes().isascii(), f"'{config}' has a character outside ASCII: write it as \\u and its number."
