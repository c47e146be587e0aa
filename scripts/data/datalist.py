"""Which scans a run reads, and on which side of the split each of them is."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.patterns import compile_pattern
from scripts.data.subjects import cohort_summary, session_name, split_by_subject, subject_rule
from scripts.utils.errors import InputError, NotAFolderError, NotFoundError
from scripts.utils.files import expand, write_text
from scripts.utils.names import item_files, item_path

__all__ = [
    "as_text",
    "check_batch_size",
    "check_channels",
    "common_root",
    "find_by_wildcards",
    "find_scans",
    "log_sides",
    "make_datalist",
    "write_datalist",
]

logger = logging.getLogger(__name__)

# how the names of this bundle's own results, figures' samples and previews end
RESULT = re.compile(
    r"_(recon(_to\w+)?|scale|zscore|anomaly|imputed_\w+|sample|decoded|step\d+)\.nii(\.gz)?$"
    r"|_desc-(recon(to\d[0-9x]*)?|scale|zscore|anomaly|imputed(\d+|mean|std)|to[A-Za-z0-9]+step\d+)_[^_/]+\.nii(\.gz)?$"
    r"|(^|/)(sample_temperature=[^/]*|preview_\d+)\.nii\.gz$"
)
SIDES = ("training", "validation", "testing")


def find_scans(
    dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str] = "*.nii*"
) -> list[Path] | list[list[Path]]:
    """List the scans under a folder, at any depth, sorted by their path relative to it.

    Results that a job left among the scans (``x_recon.nii.gz``) are left out, unless the pattern asks for them.
    Hidden files and folders (names that begin with a dot, such as the ``._*`` files of macOS) are skipped; links to
    folders are followed once.

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
        raise NotAFolderError(
            f"dataset_dir '{root}' is not a folder: set --dataset_dir to the folder that holds the scans, "
            "or to a datalist that ends in .json."
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
    names = sorted(_walk(root, folders=pattern.endswith("/")))
    found = {key: name for name in names if (key := match(name)) is not None}
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


def _walk(root: Path, folders: bool) -> Iterator[str]:
    """Yield the posix path, relative to root, of each file (or each folder) under root that is not hidden."""

    def refuse(error: OSError):  # os.walk would silently leave out a folder that cannot be read
        raise error

    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
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


def make_datalist(
    dataset_dir: str | os.PathLike,
    scan_pattern: str | Sequence[str] = "*.nii*",
    train_fraction: float = 0.95,
    seed: int = 0,
    max_scans: int | None = None,
    batch_size: int | None = None,
) -> dict[str, list[dict]]:
    """List the scans to train on and those to validate on.

    The order and the split depend only on the scans' relative names and on the seed, never on the file system; a
    subject's scans stay on one side.

    Args:
        dataset_dir: the folder that holds the scans, or a datalist in the Medical Decathlon form: a JSON file whose
            ``training`` and, if it has its own split, ``validation`` are lists of ``{"image": path}``, with paths
            relative to the file, or a list of paths, one per channel. An item may name its ``subject``. ``testing`` is
            kept. ``scan_pattern`` does not apply to it, nor does ``train_fraction`` when it has its own split.
        scan_pattern: a glob on the files' names, or a list of them, one per channel; see :py:func:`find_scans`.
        train_fraction: the share of subjects to train on, between 0 and 1.
        seed: chooses the split, and the scans that ``max_scans`` keeps.
        max_scans: keep this many scans, chosen at random. None keeps them all.
        batch_size: if given, a training side that cannot fill one batch is refused.

    Returns:
        ``{"training": [{"image": path, "subject": name}, ...], "validation": [...]}``, and ``testing`` if there is one.
        Items have a ``session`` where their names tell it; ``image`` is a list for several channels.

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist, or nothing in it matches.
        NotADirectoryError: when ``dataset_dir`` is a file that does not end in .json.
        ValueError: when the scans cannot be split, an argument is out of range, or the JSON is not a datalist.
    """
    if not 0 < train_fraction < 1:
        raise InputError(f"train_fraction is {train_fraction}: it must lie between 0 and 1, both excluded.")
    if max_scans is not None and max_scans < 2:
        raise InputError(f"max_scans is {max_scans}: training and validation need a scan each, so at least 2.")
    sides, rule, root = list_sides(dataset_dir, scan_pattern)
    training, validation = sides["training"], sides.get("validation", [])
    _check_sides(sides, dataset_dir)

    generator = random.Random(seed)
    if validation:
        training, validation = _keep_both(training, validation, max_scans, generator)
    else:
        items = _keep(sorted(training, key=lambda item: _relative_name(item, root)), max_scans, generator)
        names, subjects = [_relative_name(item, root) for item in items], [item["subject"] for item in items]
        split = split_by_subject(names, train_fraction, seed, subjects)
        training, validation = ([items[i] for i in side] for side in split)
    if batch_size is not None:
        check_batch_size(training, batch_size, of=len(training) + len(validation))
    logger.info("%d scan(s); subjects are recognised %s.", len(training) + len(validation), rule)
    datalist = {**sides, "training": training, "validation": validation}
    log_sides(datalist)
    subjects = {item["subject"] for item in [*training, *validation]}
    if "validation" not in sides and len({item["subject"] for item in validation}) == 1 < len(subjects) - 1:
        logger.info(
            "One subject alone is held out, of whom numbers say little: --train_fraction 0.8 holds out %d.",
            max(1, len(subjects) - round(0.8 * len(subjects))),
        )
    return datalist


def log_sides(datalist: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Log how many scans, subjects and sessions each side of a datalist has."""
    for side, items in datalist.items():
        logger.info("%s: %s.", side.capitalize(), cohort_summary(items))


def list_sides(
    dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str] = "*.nii*"
) -> tuple[dict[str, list[dict]], str, Path]:
    """The scans of a datalist by its sides, or those of a folder as one, ``training``; see :func:`make_datalist`.

    Returns:
        the sides, of items ``{"image", "subject", "session"}``; how subjects are recognised; the folder that names
        are relative to.
    """
    root = Path(expand(dataset_dir))
    if root.suffix == ".json" and root.is_file():
        folder = Path(os.path.normpath(root.parent))
        return *_with_entities(_read_datalist(root), folder), folder
    items = [{"image": as_text(found)} for found in find_scans(root, scan_pattern)]
    return *_with_entities({"training": items}, root), root


def common_root(scans: Sequence[Mapping[str, Any]], dataset_dir: str | os.PathLike) -> str:
    """The folder that names of results are relative to: ``dataset_dir``, or for a datalist what all its scans share."""
    root = Path(expand(dataset_dir))
    if root.is_dir():
        return str(root.absolute())
    if root.suffix == ".json" and root.is_file():
        scans = [item for side in list_sides(root)[0].values() for item in side]
    return os.path.commonpath([Path(file).absolute().parent for scan in scans for file in item_files(scan)])


def _check_sides(sides: dict[str, list[dict]], path: str | os.PathLike) -> None:
    """Refuse a datalist with a subject on two sides."""
    subjects = {side: {item["subject"] for item in items} for side, items in sides.items()}
    for one, other in itertools.combinations(subjects, 2):
        both = sorted(subjects[one] & subjects[other])
        if both:
            raise InputError(
                f"dataset_dir '{path}' has {len(both)} subject(s) both in '{one}' and in '{other}', such as "
                f"'{both[0]}': move all scans of a subject to one side, or, if these are different people, give each "
                "item a 'subject'."
            )


def check_batch_size(training: list, batch_size: int, of: int | None = None) -> None:
    """Refuse a training side that cannot fill one batch.

    Args:
        training: the training side of a datalist.
        batch_size: scans in a batch; with several processes, in one batch of each.
        of: how many scans both sides hold, for the message.

    Raises:
        ValueError: when ``training`` holds fewer than ``batch_size`` scans.
    """
    if len(training) < batch_size:
        total = f" of the {of} scans" if of is not None else " scan(s)"
        raise InputError(
            f"The training side holds {len(training)}{total}, fewer than batch_size {batch_size}: lower --batch_size "
            "(or the number of processes, whose batches it adds up), add scans, or raise --train_fraction or "
            "--max_scans."
        )


def check_channels(datalist: Mapping[str, Sequence[Mapping[str, Any]]], channels: int) -> None:
    """Refuse, before any scan is read, scans of another number of files than the network has channels.

    One file may hold several channels, which is seen when it is read.

    Raises:
        ValueError: when scans of several files have more or fewer of them than ``channels``.
    """
    for item in itertools.chain(*datalist.values()):
        files = len(item_files(item))
        if isinstance(item["image"], list) and files != channels:
            raise InputError(
                f"scan_pattern (or the datalist) gives scans of {files} channels, such as '{item_path(item)}', but "
                f"network_def has in_channels {channels}: set --network_def#in_channels {files}, or name one pattern "
                "for each channel."
            )


def write_datalist(datalist: dict[str, list[dict]], path: str | os.PathLike) -> None:
    """Write a datalist as JSON, whole or not at all, so that a run can be repeated on the same scans.

    Paths are written absolute: relative ones would be read as relative to the JSON's own folder.

    Args:
        datalist: what :py:func:`make_datalist` returns.
        path: the file to write; its folder is created if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    absolute = {
        side: [{**item, "image": _each_path(_absolute, item["image"])} for item in items]
        for side, items in datalist.items()
    }
    write_text(path, json.dumps(absolute, indent=1) + "\n")


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _each_path(change: Callable[[str], str], image: str | list[str]) -> str | list[str]:
    return [change(path) for path in image] if isinstance(image, list) else change(image)


def as_text(found: Path | list[Path]) -> str | list[str]:
    """What :py:func:`find_scans` finds, as the items of a datalist hold it."""
    return [str(path) for path in found] if isinstance(found, list) else str(found)


def _with_entities(sides: dict[str, list[dict]], root: Path) -> tuple[dict[str, list[dict]], str]:
    """Add to items their subject and, if there is one, their session, by their names, where they have none.

    Returns:
        the sides, and how subjects are recognised.
    """
    items = [item for side in sides.values() for item in side]
    names = [_relative_name(item, root) for item in items]
    entities = []
    subjects, rule = subject_rule(names)
    if all("subject" in item for item in items):
        rule = "by the datalist"
    for name, subject in zip(names, subjects, strict=True):
        session = session_name(name)
        entities.append({"subject": subject, **({"session": session} if session else {})})
    known = iter(entities)
    kept = ("image", "subject", "session")
    named = {
        side: [
            {"image": item["image"], **next(known), **{k: item[k] for k in kept if k in item}} for item in side_items
        ]
        for side, side_items in sides.items()
    }
    return named, rule


def _relative_name(item: dict, root: Path) -> str:
    """The posix path of an item's first (usually only) file, relative to root if it lies under it."""
    # Both come from the same joining of paths, so comparing strings is enough, and resolving 40,000 paths is slow.
    return item_path(item).removeprefix(str(root)).replace(os.sep, "/").lstrip("/")


def _keep(items: list, count: int | None, generator: random.Random) -> list:
    """A random subset of ``count`` items, in their own order."""
    if count is None or count >= len(items):
        return items
    return [items[i] for i in sorted(generator.sample(range(len(items)), count))]


def _keep_both(training: list, validation: list, count: int | None, generator: random.Random) -> tuple[list, list]:
    """A random subset of ``count`` items, the two sides in the same proportion as before and neither empty."""
    total = len(training) + len(validation)
    if count is None or count >= total:
        return training, validation
    validating = min(max(round(count * len(validation) / total), 1), count - 1)
    return _keep(training, count - validating, generator), _keep(validation, validating, generator)


def _read_datalist(path: Path) -> dict[str, list[dict]]:
    """The sides of a Medical Decathlon datalist, with full paths."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"dataset_dir '{path}' is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not content.get("training"):
        raise InputError(f"dataset_dir '{path}' holds no 'training' list: a datalist needs one of {{\"image\": path}}.")
    sides = {}
    for side in SIDES:
        entries = content.get(side) or []
        if not isinstance(entries, list) or not all(isinstance(e, dict) and _is_image(e.get("image")) for e in entries):
            raise InputError(f"The '{side}' of dataset_dir '{path}' must be a list of {{\"image\": path}}.")
        if entries:
            sides[side] = [
                {**e, "image": _each_path(lambda name: os.path.normpath(path.parent / expand(name)), e["image"])}
                for e in entries
            ]
    return sides


def _is_image(image: Any) -> bool:
    """Whether it is a path, or a list of paths."""
    return bool(image) and all(isinstance(path, str) for path in (image if isinstance(image, list) else [image]))
