"""The code is linted and formatted, and the configs are readable anywhere."""

import ast
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


# each of them imports from itself and those before it; the commands, scripts/*.py but networks.py, come last
LAYERS = ("utils", "data", "phantoms", "layers", "networks", "training", "population", "inference", "webpage")


def layer(module: str) -> int:
    name = module.split(".")[1]
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


@pytest.mark.parametrize("file", sorted(ROOT.glob("scripts/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_from_a_higher_layer(file):
    own = layer(".".join(file.relative_to(ROOT).with_suffix("").parts))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {node.module for node in statements if node.module.startswith("scripts.")}
    assert [name for name in imported if layer(name) > own or layer(name) == len(LAYERS)] == []
