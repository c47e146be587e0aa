"""The files of a data set that ``scan_pattern`` does not match: which of them are images, and how many there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from scripts.data.datalist import find_scans
from scripts.data.inspection import Scan
from scripts.utils.formats import DETACHED_HEADERS, IMAGE_SUFFIXES, unzipped_content_suffix
from scripts.utils.names import printable

__all__ = ["find_unmatched"]

# formats of headers whose voxels are in another file, by the suffix of the whole in one file
SINGLE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
# an .img has no row of its own: it holds the voxels of an .hdr, which has one
LISTED = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".img")
REASON = "passed over, since scan_pattern does not match it"


def find_unmatched(root: Path, scans: set[str]) -> tuple[Counter, list[Scan]]:
    """Look through the files that are no part of a scan.

    Args:
        root: folder of the data set.
        scans: paths of the scans relative to it.

    Returns:
        How many files there are of each suffix, and a row for each image among them.
    """
    suffixes, rows, dicom = Counter(), [], Counter()
    companions = {str(Path(name).with_suffix("")) for name in scans if name.endswith(DETACHED_HEADERS)}
    try:
        everything = find_scans(root, "*")
    except FileNotFoundError:  # only folders
        everything = []
    for path in everything:
        name = path.relative_to(root).as_posix()
        folder = name.rpartition("/")[0]
        if name in scans or folder in scans or str(Path(name).with_suffix("")) in companions:
            continue
        suffix = ".nii.gz" if name.lower().endswith(".nii.gz") else path.suffix.lower()
        suffixes[suffix or "no suffix"] += 1
        try:
            content = unzipped_content_suffix(path)
            empty = path.stat().st_size == 0
        except OSError as error:
            if suffix in LISTED:
                reason = "it leads to no file" if path.is_symlink() else f"it cannot be read ({error.strerror})"
                rows.append(_row(name, "suspicious", reason))
            continue
        named = content in (None, ".gz", SINGLE_FILE.get(suffix)) or name.lower().endswith(content)
        if suffix in (".dcm", ".ima") or (content == ".dcm" and suffix not in LISTED):
            dicom[folder] += 1  # a series has hundreds of files
        elif not named:
            rows.append(_row(name, "suspicious", f"it holds {content} data, which its name hides"))
        elif suffix in LISTED and empty:
            rows.append(_row(name, "suspicious", "it is empty (0 bytes)"))
        elif suffix in LISTED:
            rows.append(_row(name, "passed over", "an image by its name"))
    rows += [_row(f"{folder or '.'}/", "passed over", f"{count} DICOM file(s)") for folder, count in dicom.items()]
    return suffixes, rows


def _row(name: str, verdict: str, reason: str) -> Scan:
    return Scan(printable(name), verdict=verdict, reasons=[f"{REASON}: {reason}"])
