"""The settings of a run: what the command line may say, and what is kept of it."""

from __future__ import annotations

import ast
import difflib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from monai.bundle import ConfigParser

from scripts.utils.files import write_text

logger = logging.getLogger(__name__)

# what `python -m monai.bundle run` takes itself
MONAI_ARGUMENTS = {
    "run_id",
    "init_id",
    "final_id",
    "meta_file",
    "config_file",
    "logging_file",
    "tracking",
    "args_file",
    "workflow_type",
    "workflow_name",
    "bundle_root",
    "_meta_",
}
# how errors begin that MONAI raises from ours
MONAI_WRAPPINGS = ("Failed to evaluate", "Failed to instantiate", "applying transform")
# seconds in which what a killed run has left, such as workers that still hold its lock, ends
LOCK_TIMEOUT = 60.0

_locks: dict[Path, FileLock] = {}  # of this process


def show_root_cause() -> None:
    """Let the last line of a traceback be the error's own sentence, which MONAI's config parser wraps in others."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nStopped before the end; what was saved before is whole.", file=sys.stderr)
            return
        sys.__excepthook__(kind, error, trace)
        root = error
        while root.__cause__ is not None and str(root).startswith(MONAI_WRAPPINGS):
            root = root.__cause__
        print(f"\nError: {root}", file=sys.stderr)

    sys.excepthook = show


def command_line_config(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The config files of this command merged with what the command line overrides, unresolved.

    Args:
        arguments: of ``python -m monai.bundle run``; default this program's. Without a ``--config_file`` among them
            (a program that loads the bundle by itself) the result is empty.

    Raises:
        ValueError: the command line sets a key that no config file has (MONAI would add it, and nothing would happen),
            or gives a text where there are True and False, such as ``false``, which MONAI takes for true.
    """
    options = _options(sys.argv[1:] if arguments is None else arguments)
    if "config_file" not in options:
        return {}
    config = ConfigParser.load_config_files(_literal(options["config_file"]))
    for key, value in options.items():
        top = key.replace("::", "#").split("#")[0]
        if top in MONAI_ARGUMENTS:
            if top == "bundle_root":
                config[top] = value
            continue
        before = _find(config, key)
        if value in ("true", "false", "null"):
            spelling = {"true": "True", "false": "False", "null": "None"}[value]
            raise ValueError(
                f"--{key} {value}: write {spelling}; on the command line '{value}' is a text, which is true."
            )
        config[key] = _literal(value)
        is_text = isinstance(config[key], str) and not value.startswith(("$", "@"))
        if isinstance(before, bool) and is_text and (key, value) != ("resume", "auto"):
            raise ValueError(f"--{key} {value}: write True or False.")
    return config


def _find(config: dict[str, Any], key: str) -> Any:
    """What the config files have under a key such as ``train#trainer#amp``; None for an argument that has a default."""
    parts = key.replace("::", "#").split("#")
    node: Any = config
    for place, part in enumerate(parts):
        section = "#".join(parts[:place])
        if isinstance(node, list):
            if not (part.isdigit() and int(part) < len(node)):
                raise ValueError(f"--{key}: '{section}' is a list of {len(node)}: name one by its number, from 0.")
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise ValueError(f"--{key}: '{section}' is no section, it is {node!r}.")
        if part not in node:
            may_be_new = section and ("_target_" in node or part.startswith("_"))
            if may_be_new and place == len(parts) - 1:
                return None
            known = [name for name in node if name != "imports"]
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.0)[0]
            where = f"'{section}' has no '{part}'" if section else f"no config file has the key '{part}'"
            raise ValueError(f"--{key}: {where}; the nearest that exists is '{nearest}'.")
        node = node[part]
    return node


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` pairs."""
    options: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        options[key] = value
    return options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def claim_output_dir(
    output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike, resume: bool | str, patience: float = LOCK_TIMEOUT
) -> None:
    """Make sure, before anything is read, that a run can write, overwrites no other, and is alone in ``ckpt_dir``.

    It is alone until this process ends or calls :func:`release_output_dir`, whatever becomes of it.

    Args:
        patience: seconds to wait for another run in ``ckpt_dir`` to end.

    Raises:
        NotADirectoryError, PermissionError: a folder cannot be made or written to.
        FileExistsError: ``ckpt_dir`` holds the checkpoint of a run, and this one does not resume it.
        BlockingIOError: another run is using ``ckpt_dir``.
    """
    _make_writable("output_dir", Path(output_dir))
    _make_writable("ckpt_dir", Path(ckpt_dir).absolute().parent)  # it is made itself by the first checkpoint
    _lock(Path(ckpt_dir).absolute(), patience)
    if list(Path(ckpt_dir).glob("checkpoint*.pt")) and not resume:
        release_output_dir(ckpt_dir)
        raise FileExistsError(
            f"ckpt_dir '{ckpt_dir}' holds the checkpoint of a run: go on with it by --resume True (or auto, for what a "
            "scheduler or torchrun starts again), or set --output_dir to another folder."
        )


def _make_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{name} '{folder}' is not a folder: set --{name} to one.") from error
    except OSError as error:
        raise PermissionError(
            f"{name} '{folder}' cannot be written to ({error.strerror}): "
            f"set --{name} to a folder that you can write to."
        ) from error


def _lock(ckpt_dir: Path, patience: float) -> None:
    if ckpt_dir in _locks:
        return
    lock = FileLock(ckpt_dir.with_name(f".{ckpt_dir.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another run is using ckpt_dir '%s': waiting %g s for its end.", ckpt_dir, patience)
        try:
            lock.acquire(timeout=patience, poll_interval=0.5)
        except Timeout:
            raise BlockingIOError(
                f"ckpt_dir '{ckpt_dir}' is in use by another run, which would lose what this one writes: wait for its "
                "end, or set --output_dir to another folder."
            ) from None
    _locks[ckpt_dir] = lock


def release_output_dir(ckpt_dir: str | os.PathLike) -> None:
    """Let other processes claim ``ckpt_dir``."""
    lock = _locks.pop(Path(ckpt_dir).absolute(), None)
    if lock is not None:
        lock.release()


def save_config(output_dir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Leave the config that repeats a run in its folder, as ``config.json``."""
    write_text(Path(output_dir) / "config.json", json.dumps(config, indent=4) + "\n")
