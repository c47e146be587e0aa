"""Processes that know each other, as torchrun starts them, but forked from one that has imported MONAI already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, bundle_words
from in_process import run_module

# what takes seconds to import
multiprocessing.set_forkserver_preload(["monai.bundle", "torch.utils.tensorboard", "scripts.training.trainer"])


start_processes = partial(mp.start_processes, start_method="forkserver")


def run_group(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of several processes, which share this one's environment."""
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, dict(os.environ), function, arguments)
        start_processes(_keep_result, given, nprocs=processes)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(processes)]


def _keep_result(rank: int, folder: str, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, *arguments)))


def run_bundle_group(
    *arguments: object, processes: int = 2, patches: Mapping[str, object] | None = None, **settings
) -> list[subprocess.CompletedProcess]:
    """``torchrun -m monai.bundle run ...`` on one node, without torchrun; what came of each process.

    Args:
        patches: what the processes have in place of something else, by the name of that.
    """
    words = bundle_words(*arguments, **settings)
    return run_group(_run_bundle, words, free_port(), processes, patches or {}, processes=processes)


def _run_bundle(
    rank: int, words: list[str], port: int, processes: int, patches: Mapping[str, object]
) -> subprocess.CompletedProcess:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(name, value)
        environment = address | {key: str(value) for key, value in ranks.items()}
        return run_module("monai.bundle", *words, cwd=ROOT, **environment)


def free_port() -> int:
    """A port on this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
