"""Finding the files of scans in a folder: patterns of names, and what is in place of their wildcards."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from scripts.utils.errors import InputError, NotAFolderError, NotFoundError
from scripts.utils.files import expand
from scripts.utils.formats import NIFTI_SUFFIXES

logger = logging.getLogger(__name__)

# of a BIDS data set: files in its folder, and folders that hold other things than its scans
BIDS_FILES = {"dataset_description.json", "participants.tsv"}
BIDS_OTHERS = {"derivatives", "sourcedata", "code"}
WILDCARD = re.compile(r"(\*|\?|\[[^\]]+\])")
# how the names of this bundle's own results, figures' samples and previews end
PLAIN = "scale|zscore|anomaly|expected|spread|deviation|significant"
CHANGED = "counterfactual|harmonised|difference"  # to several values: with what is changed, as in difference_age-80
RESULT = re.compile(
    rf"_({PLAIN}|recon(_to\w+)?|imputed_\w+|sample|decoded|step\d+|({CHANGED})(_[^/-]+-[^/]+)?)\.nii(\.gz)?$"
    rf"|_desc-({PLAIN}|recon(to\d[0-9x]*)?|imputed(\d+|mean|std)|to[A-Za-z0-9]+step\d+|({CHANGED})[A-Za-z0-9]*)"
    r"_[^_/]+\.nii(\.gz)?$"
    r"|(^|/)(sample_temperature=[^/]*|preview_\d+)\.nii\.gz$"
)


def bids_others(subfolders: Iterable[str], files: Iterable[str]) -> set[str]:
    """Which subfolders of a folder hold no scans, since it is that of a BIDS data set."""
    is_bids = BIDS_FILES.intersection(files) or any(name.startswith("sub-") for name in subfolders)
    return BIDS_OTHERS.intersection(subfolders) if is_bids else set()


def find_scans(
    dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str] = "*.nii*"
) -> list[Path] | list[list[Path]]:
    """List the scans under a folder, at any depth, sorted by their path relative to it.

    Results that a job left among the scans (``x_recon.nii.gz``) are left out, unless the pattern asks for them.
    Hidden files and folders (names that begin with a dot, such as the ``._*`` files of macOS) are skipped; links to
    folders are followed once. Of a BIDS data set ``derivatives``, ``sourcedata`` and ``code`` are skipped, unless a
    part of the pattern names them or they are ``dataset_dir`` itself.

    Args:
        dataset_dir: the folder that holds the scans.
        scan_pattern: a glob on the file name (``*_FLAIR.nii.gz``), or on the last parts of the path
            (``sub-*/anat/*.nii.gz``). One that ends in a slash matches folders, each a DICOM series (``*/FLAIR/``).
            With a list of patterns a scan is several files, its channels: those with the same text in place of the
            wildcards, in folders of the same name above (``["*_T1w.nii.gz", "*_FLAIR.nii.gz"]``). A scan
            that lacks a channel is left out, and the log says so.

    Returns:
        Paths that begin with ``dataset_dir``; with a list of patterns, lists of as many.

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist, or nothing in it matches.
        NotADirectoryError: when ``dataset_dir`` is a file.
        ValueError: when ``scan_pattern`` is empty.
    """
    root = Path(expand(dataset_dir))
    if not root.exists():
        raise NotFoundError(
            f"dataset_dir '{root}' does not exist: set --dataset_dir to the folder that holds the scans."
        )
    if not root.is_dir():
        datalist = "" if root.suffix == ".json" else ", or to a datalist that ends in .json"  # which is taken or not
        raise NotAFolderError(
            f"dataset_dir '{root}' is not a folder: set --dataset_dir to the folder that holds the scans{datalist}."
        )
    if isinstance(scan_pattern, str):
        return [root / name for name in find_by_wildcards(root, scan_pattern).values()]
    channels = [find_by_wildcards(root, pattern) for pattern in scan_pattern]
    if not channels:
        raise InputError("scan_pattern is an empty list: give one pattern for each channel.")
    everywhere = set(channels[0]).intersection(*channels[1:])
    if not everywhere:
        raise NotFoundError(
            f"No scan under dataset_dir '{root}' has all channels: the patterns {list(scan_pattern)} match "
            f"{', '.join(str(len(channel)) for channel in channels)} file(s), but never with the same text in place of "
            f"their wildcards, as '{next(iter(channels[0].values()))}' and '{next(iter(channels[-1].values()))}' show."
        )
    lacking = sorted({names[key] for names in channels for key in names if key not in everywhere})
    if lacking:
        logger.warning(
            "%d file(s) are left out, since the scan that they belong to lacks another channel: %s%s",
            len(lacking),
            ", ".join(lacking[:5]),
            ", ..." if len(lacking) > 5 else "",
        )
    found = sorted([names[key] for names in channels] for key in everywhere)
    return [[root / name for name in names] for names in found]


def find_by_wildcards(
    root: Path, pattern: str, folder_setting: str = "dataset_dir", pattern_setting: str = "scan_pattern"
) -> dict[tuple[str, ...], str]:
    """Find the files that match a pattern, by the text in place of its wildcards, so that files of two can be paired.

    Args:
        root: the folder to search, at any depth.
        pattern: see :py:func:`find_scans`.
        folder_setting, pattern_setting: names of the two settings, for messages.

    Returns:
        ``{(folder above the pattern's parts, text of the first wildcard, ...): relative posix path}``, by path.

    Raises:
        FileNotFoundError: when nothing matches.
        ValueError: when ``pattern`` names no file.
    """
    match = compile_pattern(pattern, pattern_setting)
    # masks often lie in derivatives
    kept = pattern.split("/") if pattern_setting == "scan_pattern" else BIDS_OTHERS
    names = sorted(_walk(root, pattern.endswith("/"), kept))
    found = {key: name for name in names if (key := match(name)) is not None}
    if ".nii" in pattern and pattern.endswith("*"):  # no x.nii.gz.md5, x.nii.gz.part or x.nii.gz~
        found = {key: name for key, name in found.items() if name.lower().endswith(NIFTI_SUFFIXES)}
    capitals = [name for name in names if match(name) is None and match(_small_suffix(name)) is not None]
    if capitals:
        logger.warning(
            "%d file(s) are left out, since their names end in capitals, such as '%s': rename them.",
            *(len(capitals), capitals[0]),
        )
    scans = {key: name for key, name in found.items() if not RESULT.search(name)}
    if len(scans) < len(found) and not RESULT.search(pattern):
        logger.warning(
            "%d file(s) are left out, since they are named as results of this bundle, such as '%s': name them by "
            "--%s if they are scans.",
            *(len(found) - len(scans), next(found[key] for key in found if key not in scans), pattern_setting),
        )
        found = scans
    if not found:
        kind = "folder" if pattern.endswith("/") else "file"
        if not names:
            raise NotFoundError(
                f"{folder_setting} '{root}' has no {kind}s: set --{folder_setting} to the folder of the {kind}s."
            )
        dicom = not pattern.endswith("/") and any(name.lower().endswith(".dcm") for name in names)
        raise NotFoundError(
            f"{pattern_setting} '{pattern}' matches none of the {len(names)} {kind}(s) under {folder_setting} '{root}'"
            f", such as '{names[0]}': set --{pattern_setting} to a pattern the files' names match"
            + (", for DICOM series to one of their folders, which ends in a slash, such as '*/'." if dicom else ".")
        )
    return found


def all_files(root: Path) -> list[str]:
    """The posix path, relative to a folder, of each file under it but results of this bundle, without a warning."""
    return sorted(name for name in _walk(root, False, ()) if not RESULT.search(name))


def _small_suffix(name: str) -> str:
    """A name whose suffix of NIfTI is not in capitals."""
    return re.sub(r"\.nii(\.gz)?$", lambda suffix: suffix[0].lower(), name, flags=re.IGNORECASE)


def _walk(root: Path, folders: bool, kept: Collection[str]) -> Iterator[str]:
    """Yield the posix path, relative to root, of each file (or each folder) under root that is not hidden.

    Of a BIDS data set, what is no scan of it is left out: ``derivatives``, ``sourcedata`` and ``code``, unless they are
    to be ``kept``.
    """

    def refuse(error: OSError):  # os.walk would silently leave out a folder that cannot be read
        raise error

    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        others = bids_others(subfolders, files)
        subfolders[:] = [name for name in subfolders if name not in others or name in kept]
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was listed already
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that of two links to one folder it is always the same one that is followed.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        yield from (prefix + name for name in (subfolders if folders else files) if not name.startswith("."))


def compile_pattern(pattern: str, setting: str) -> Callable[[str], tuple[str, ...] | None]:
    """Make a function that matches relative posix paths, part by part from the right as ``PurePath.match`` does.

    Returns:
        A function that gives None for a path that does not match; else the folders above the pattern's parts, then the
        text in place of each wildcard.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    while parts and parts[0] == "**":  # any depth is searched already
        parts.pop(0)
    if not parts:
        raise InputError(f"{setting} '{pattern}' names no file: set --{setting} to one such as '*.nii.gz'.")
    if "**" in parts:
        raise InputError(
            f"{setting} '{pattern}' has ** after a folder, where it would stand for one folder alone: write a * for "
            "each folder in its place, or begin with what comes after it, since any depth is searched."
        )
    expressions = [_expression(part) for part in parts]
    depth = len(parts)

    def match(name: str) -> tuple[str, ...] | None:
        pieces = name.split("/")
        if len(pieces) < depth:
            return None
        found = [e.fullmatch(piece) for e, piece in zip(expressions, pieces[-depth:], strict=True)]
        texts = [text for m in found if m for text in m.groups()]
        return ("/".join(pieces[:-depth]), *texts) if all(found) else None

    return match


def fill_pattern(pattern: str, texts: Sequence[str]) -> str:
    """The path that a pattern matches with these texts, as :func:`compile_pattern` finds them."""
    folder, *texts = texts
    rest = iter(texts)
    return "/".join(filter(None, [folder, WILDCARD.sub(lambda found: next(rest, found[0]), pattern)]))


def _expression(part: str) -> re.Pattern:
    """A glob on one part of a path, as a regular expression whose groups are its wildcards."""

    def translate(text: str) -> str:
        if text[0] == "[":
            return f"([{'^' if text[1] == '!' else ''}{text[1:-1].removeprefix('!')}])"
        return {"*": "(.*)", "?": "(.)"}[text]

    # every other piece is a wildcard
    pieces = [translate(text) if i % 2 else re.escape(text) for i, text in enumerate(WILDCARD.split(part))]
    return re.compile("".join(pieces), re.DOTALL)
