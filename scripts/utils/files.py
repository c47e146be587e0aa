"""Files that are written whole or not at all, and the folders for them."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.utils.errors import InputError, NotAFolderError, ResourceError

MOST_KEPT = 40  # characters of a file's name in that of a temporary one
TEMPORARY = re.compile(r"\.\d+-([0-9a-f]{8}-)?[0-9a-f]{8}\.")  # how its name begins: process, and chance
KEPT_SECONDS = 86400  # no file takes as long to be written
OF_THE_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)  # not of the file in it

_cleared: set[Path] = set()  # folders in which this process has looked for leftovers


def expand(path: str | os.PathLike | None) -> str | None:
    """A path as somebody gives it, with the user's home in place of a ``~`` at its start; None stays None.

    Paths are expanded where they enter: by the commands, by what reads a datalist, and in the ``paths`` of the configs,
    such as ``@paths#dataset_dir``.
    """
    if path is None:
        return None
    return os.path.expanduser(str(path))  # noqa: PTH111 (pathlib's raises where there is no such user)


def absolute(path: str | os.PathLike) -> Path:
    """The absolute path of what somebody gives, without ``~``, ``.`` and ``..``: those of one file are equal."""
    return Path(os.path.abspath(expand(path)))  # noqa: PTH100 (pathlib's keeps the ..)


def write_whole(
    path: str | os.PathLike, write: Callable[[str], object], before: Callable[[], object] | None = None
) -> Path:
    """Write a file under a temporary name beside ``path``, flush it to disk, then rename it.

    Args:
        path: of the file; the folder must exist.
        write: is called with the temporary name (same suffix as ``path``) and writes the file.
        before: is called when the file is whole on disk, before it is renamed.

    Returns:
        ``path``.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; what ``path`` held before is still there.
    """
    path = Path(path)
    if path.parent.absolute() not in _cleared:
        _cleared.add(path.parent.absolute())
        remove_leftovers(path.parent)
    # the suffix stays, since writers such as nibabel and matplotlib choose the format by it
    # processes of several containers that share the folder may have one number
    # and the name may be as long as a file system allows
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{path.name[-MOST_KEPT:]}")
    try:
        temporary.touch()  # where that is not allowed Python says so, and some libraries an error of their own
        write(str(temporary))
        _flush(temporary)
        if before is not None:
            before()
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder, or not open one
            _flush(path.parent)
    except BaseException as error:
        full = _is_full(error, path.parent)
        with contextlib.suppress(OSError):  # where the folder is what cannot be used
            temporary.unlink()
        if isinstance(error, OSError) and not full and error.filename in (str(temporary), os.fsencode(temporary)):
            known = path.parent if error.errno in OF_THE_FOLDER else path
            raise OSError(error.errno, error.strerror, str(known)) from error
        if full:
            raise ResourceError(
                errno.ENOSPC,
                f"'{path}' could not be written because the disk is full: free some space and continue. What was there "
                "before is whole",
            ) from error
        raise
    return path


def write_tensors(path: str | os.PathLike, content: Any, before: Callable[[], object] | None = None) -> Path:
    """:func:`write_whole` of tensors and plain values, by ``torch.save``: equal content gives equal bytes."""
    import torch  # a command that writes none starts without it

    def write(temporary: str) -> None:
        with Path(temporary).open("wb") as file:  # from a name PyTorch would take the name of the archive's folder
            torch.save(content, file)

    return write_whole(path, write, before)


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of files, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether a write failed because of a full disk; PyTorch says no more than that it failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20


def as_folder(name: str, path: str | os.PathLike) -> Path:
    """The path of a folder that exists or can be made.

    Args:
        name: of the argument, for the message.
        path: of the folder.

    Raises:
        NotADirectoryError: it is a file, or lies within one.
    """
    folder = Path(expand(path))
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotAFolderError(f"{name} is '{folder}', but '{place}' is a file: give the name of a folder.")
    return folder


def remove_leftovers(folder: str | os.PathLike, alone: bool = False) -> None:
    """Remove the temporary files of :py:func:`write_whole` that killed processes left in a folder.

    They stay for a day, since a process that lives, here or on another machine, may still write one.

    Args:
        folder: that files are written to; a process does this before it writes its first there.
        alone: no other process writes there, so that none has to stay.
    """
    with contextlib.suppress(OSError):
        for path in Path(folder).glob(".[0-9]*.*"):
            old = alone or time.time() - path.stat().st_mtime > KEPT_SECONDS
            if old and TEMPORARY.match(path.name):
                path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write bytes as a file, whole or not at all."""
    return write_whole(path, lambda temporary: Path(temporary).write_bytes(data))


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """The dictionary in a JSON file.

    Args:
        path: of the file.
        what: it should hold, for the message.

    Raises:
        InputError: it holds no such.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error}), or is not {what}: remove or replace it.") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is not {what}: remove or replace it.")
    return content


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a text as UTF-8, whole or not at all; bytes of files' names that are not UTF-8 become ``\\udcXX``."""
    return write_bytes(path, text.encode(errors="backslashreplace"))


def write_csv(
    path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Iterable[Any]], delimiter: str = ","
) -> Path:
    """Write a table, whole or not at all: the columns' names, then the rows, in their order."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def check_archive(path: str | os.PathLike) -> None:
    """Check a file that PyTorch saved: it carries a checksum of each part, at which ``torch.load`` does not look.

    Raises:
        ValueError: a checksum is wrong.
        zipfile.BadZipFile: the file is no archive, or cut off.
    """
    with zipfile.ZipFile(path) as parts:
        bad = parts.testzip()
    if bad is not None:
        raise InputError(f"the checksum of its part '{bad}' is wrong")
