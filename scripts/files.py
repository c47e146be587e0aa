"""Files that are written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike, write: Callable[[str], object]) -> Path:
    """Write a file under a temporary name beside ``path``, flush it to disk, then rename it.

    Args:
        path: where the file belongs; the folder must exist.
        write: is called with the temporary name (same ending as ``path``) and writes the file.
    """
    path = Path(path)
    # the ending stays, since writers such as nibabel and matplotlib choose the format by it
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """:func:`write_whole` of bytes that are there already."""
    return write_whole(path, lambda temporary: Path(temporary).write_bytes(data))


def write_text(path: str | os.PathLike, text: str) -> Path:
    """:func:`write_whole` of a text, as UTF-8."""
    return write_bytes(path, text.encode())


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    """:func:`write_whole` of a table: the columns' names, then the rows, each in their order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return write_text(path, text.getvalue())
