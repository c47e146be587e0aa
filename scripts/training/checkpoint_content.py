"""What a checkpoint must hold to be resumed: everything is checked before anything of it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from scripts.networks import VDVAE
from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"
REQUIRED = (
    *("network", "average", "optimizer", "epoch", "scans_into_epoch"),
    *("updates", "skipped", "skipped_in_a_row", "average_updates"),
)


def checkpoint_problem(content: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint that has all it needs, as the end of a sentence; None where nothing is."""
    for part in ("network", "average"):
        problem = state_problem(content[part])
        if problem is not None:
            return f"in its '{part}' {problem}"
    return None


def state_problem(state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with weights, whatever network they are of, likewise."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            return f"'{name}' is not finite"
    grid = state.get("scan_grid")
    if grid is not None and grid.shape != (5, 3):  # see ScanGrid.as_tensor
        return f"'scan_grid' is {list(grid.shape)}, and should be [5, 3]"
    return None


def architecture_problem(network: VDVAE, state: Mapping[str, Tensor]) -> str:
    """In what weights differ from a network that they do not fit, and what to do, as the end of a sentence."""
    overlay = _overlay_of(network, state)
    mend = "use the config that it was trained with (inference takes it from the run by --run_dir)"
    if overlay is not None:
        mend = f"""its network is that of {overlay}: name that too, as in --config_file "[...,'{overlay}']\""""
    return f"is of another architecture than network_def ({_first_difference(state, network.state_dict())}): {mend}"


def _first_difference(saved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """In words, the first tensor of saved weights that does not match the network's."""
    saved = {"scan_grid": state["scan_grid"], **saved}  # weights of earlier versions may lack it
    for name, tensor in state.items():
        if name not in saved:
            return f"it lacks '{name}'"
        if saved[name].shape != tensor.shape:
            return f"'{name}' is {list(saved[name].shape)} there and {list(tensor.shape)} here"
    extra = next(name for name in saved if name not in state)
    return f"it has '{extra}' besides"


def _overlay_of(network: VDVAE, state: Mapping[str, Tensor]) -> str | None:
    """The overlay in ``configs/`` that makes a network the one whose weights these are; None where none does."""
    for path in sorted(CONFIGS.glob("*_[0-9]*.json")):
        overlay = json.loads(path.read_text(encoding="utf-8"))
        changes = {key.split("#")[-1]: value for key, value in overlay.items() if key.startswith("network_def#")}
        try:
            with torch.device("meta"):
                other = VDVAE(**network.arguments | changes | {"spatial_shape": overlay["spatial_shape"]})
        except ValueError:  # for scans of 3D, say
            continue
        wanted = other.state_dict()
        if wanted.keys() == state.keys() and all(wanted[name].shape == state[name].shape for name in wanted):
            return f"configs/{path.name}"
    return None


def optimizer_problem(optimizer: Any) -> str | None:
    """What is wrong with the state that an optimizer has loaded, likewise."""
    for group in optimizer.param_groups:
        if not all(_is_number(group[name]) for name in ("lr", "initial_lr") if name in group):
            return "its learning rate is no number"
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    return f"'{name}' of its state is not finite"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and math.isfinite(value)
