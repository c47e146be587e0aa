"""Why a scan cannot be used: as a sentence, and as a reason in a table that names the scan already."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from scripts.data.geometry import HeaderError
from scripts.utils.formats import content_suffix

__all__ = ["ADVICE", "as_reason", "why_unreadable"]

ADVICE = "replace it or leave it out with --scan_pattern"


def as_reason(sentence: str, paths: Sequence[str | os.PathLike]) -> str:
    """A sentence on a scan as half of one, without its file's path and without advice.

    Args:
        sentence: such as an error's.
        paths: of the scan; of several, its channels, the file's name is kept.
    """
    for path in paths:
        name = Path(path).name
        sentence = sentence.replace(f"'{path}'", "it" if len(paths) == 1 else f"'{name}'").replace(str(path), name)
    return re.sub(rf"(?:[:;]|, or) {re.escape(ADVICE)}\.$", "", sentence).rstrip(".")


def why_unreadable(paths: Sequence[Path], error: Exception) -> str:
    """One sentence on files that no reader could read.

    Args:
        paths: of the scan's files, or of the broken one where that is known.
        error: what a reader said.
    """
    for path in paths:
        if path.is_symlink() and not path.exists():
            return f"'{path}' is a link to '{path.readlink()}', which does not exist: repair the link, or {ADVICE}."
        if not path.exists():
            return f"'{path}' does not exist: it was moved or deleted after the scans were listed."
        if not os.access(path, os.R_OK):
            return f"'{path}' may not be read by this user: change its permissions, or {ADVICE}."
        if path.is_dir():
            return f"'{path}' holds no readable DICOM series itself ({_reason(error)}): {ADVICE}."
        if path.stat().st_size == 0:
            return f"'{path}' is an empty file (0 bytes): {ADVICE}."
        found, suffix = content_suffix(path), "".join(path.suffixes[-2:])
        if found is not None and not suffix.lower().endswith(found.lstrip(".")):  # .mgz is gzip too
            ending = f"{path.suffix}.gz" if found == ".gz" else found
            return f"'{path}' holds {found} data, which its name hides: rename it to end in {ending}, or {ADVICE}."
    names = ", ".join(f"'{path}'" for path in paths)
    if "channel-wise concatenation" in str(error):
        return (
            f"{names} cannot be the channels of one scan, since their grids or affines differ: "
            "resample them to one grid first."
        )
    if isinstance(error, HeaderError):
        return f"{names} {error}: {ADVICE}."
    if "dtype([('R'" in str(error):
        return (
            f"{names} is a colour image (RGB), which has no intensity: convert it to one number per voxel, or {ADVICE}."
        )
    return f"{names} cannot be read as an image ({_reason(error)}): it is truncated or not an image; {ADVICE}."


def _reason(error: BaseException) -> str:
    """The first line of an error's message, short enough for a sentence. Readers such as ITK write paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK begins with the place in its own source and ends with what went wrong.
    line = next((line for line in lines if not line.startswith(("/", "The file couldn't"))), type(error).__name__)
    return (line if len(line) <= 120 else line[:117] + "...").rstrip(".")
