"""The folders of a run: writable, and used by no other run at the same time."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout
from scripts.utils.errors import ExistsError, NotAFolderError, ResourceError

logger = logging.getLogger(__name__)

# seconds in which the remains of a killed run end, such as workers that still hold its lock
LOCK_TIMEOUT = 60.0

_locks: dict[Path, FileLock] = {}  # held by this process


def claim_output_dir(
    output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike, resume: bool | str, timeout: float = LOCK_TIMEOUT
) -> None:
    """Check, before anything is read, that a run can write, overwrites no other run, and is alone in ``ckpt_dir``.

    ``ckpt_dir`` is locked until :py:func:`release_output_dir` or until this process ends, however that happens. A run
    that is refused after this leaves no file of its own, and no folder that is empty.

    Args:
        output_dir, ckpt_dir: created if needed, the latter by its first checkpoint.
        resume: as the config has it; False refuses a ``ckpt_dir`` that holds a checkpoint.
        timeout: seconds to wait for another run in ``ckpt_dir`` to end.

    Raises:
        OSError: a folder is a file or cannot be written to, another run is using ``ckpt_dir``, or it holds the
            checkpoint of a run that this one does not resume.
    """
    output_dir = Path(output_dir)
    if not output_dir.exists():
        atexit.register(_remove_if_empty, output_dir)
    _make_writable("output_dir", output_dir)
    _make_writable("ckpt_dir", Path(ckpt_dir).absolute().parent)  # the first checkpoint makes ckpt_dir itself
    _lock(Path(ckpt_dir).absolute(), timeout)
    if list(Path(ckpt_dir).glob("checkpoint*.pt")) and not resume:
        release_output_dir(ckpt_dir)
        raise ExistsError(
            f"ckpt_dir '{ckpt_dir}' holds the checkpoint of a run: resume it by --resume True (or auto, where a "
            "scheduler or torchrun starts it again), or set --output_dir to another folder."
        )


def _make_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAFolderError(f"{name} '{folder}' is not a folder: set --{name} to one.") from error
    except OSError as error:
        raise ResourceError(
            f"{name} '{folder}' cannot be written to ({error.strerror}): "
            f"set --{name} to a folder that you can write to."
        ) from error


def _lock(ckpt_dir: Path, timeout: float) -> None:
    if ckpt_dir in _locks:
        return
    lock = FileLock(ckpt_dir.with_name(f".{ckpt_dir.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another run is using ckpt_dir '%s': waiting %g s for its end.", ckpt_dir, timeout)
        try:
            lock.acquire(timeout=timeout, poll_interval=0.5)
        except Timeout:
            raise ResourceError(
                f"ckpt_dir '{ckpt_dir}' is in use by another run, which would lose what this one writes: wait for its "
                "end, or set --output_dir to another folder."
            ) from None
    _locks[ckpt_dir] = lock
    atexit.register(release_output_dir, ckpt_dir)


def release_output_dir(ckpt_dir: str | os.PathLike) -> None:
    """Unlock ``ckpt_dir`` for other processes, and remove the lock's file."""
    lock = _locks.pop(Path(ckpt_dir).absolute(), None)
    if lock is not None:
        Path(lock.lock_file).unlink(
            missing_ok=True
        )  # before the release: who waits for it sees that, and makes another
        lock.release()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
