"""Which scans a run reads, whose they are, and on which side of the split each of them is."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.find import find_scans
from scripts.utils.errors import InputError
from scripts.utils.files import absolute, expand, write_text
from scripts.utils.names import item_files, item_path

logger = logging.getLogger(__name__)

# BIDS writes the subject as an entity, in folders and file names alike. UK Biobank writes it as the first of the four
# numbers participant_field_instance_array, where the instance is the visit. A label with - or +, which BIDS does not
# allow, ends there, unless it names a whole folder. SPM and CAT12 put letters before files' names (mwp1sub-01).
SUBJECT = re.compile(
    r"(?:^|/)(sub-[A-Za-z0-9+-]+)(?=/)|(?:^|[/_])(?:[A-Za-z0-9]{1,8}(?=sub-[^/]*$))?(sub-[A-Za-z0-9]+)"
    r"|(?:^|/)(\d+)_\d{5}_\d+_\d+(?=[./_]|$)"
)
SESSION = re.compile(
    r"(?:^|/)(ses-[A-Za-z0-9+-]+)(?=/)|(?:^|[/_])(ses-[A-Za-z0-9]+)|(?:^|/)\d+_\d{5}_(\d+)_\d+(?=[./_]|$)"
)
# Scans that a person's folder may hold, even if there are fewer such folders. One with more scans than there are
# folders is taken for a site, or for the folder of all images.
SESSIONS = 6
MOST_SHOWN = 80  # characters of a datalist's item in a message
NO_COVARIATES = ("image", "label", "mask", "subject", "session", "channel_files")  # of an item
SIDES = ("training", "validation", "testing")


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
        Items have a ``session`` where their names tell it, and the covariates of a datalist; ``image`` is a list for
        several channels.

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
    check_sides(sides, dataset_dir)

    generator = random.Random(seed)
    if validation:
        training, validation = _keep_both(training, validation, max_scans, generator)
    else:
        items = _keep(sorted(training, key=lambda item: _relative_name(item, root)), max_scans, generator)
        names, subjects = [_relative_name(item, root) for item in items], [item["subject"] for item in items]
        split = split_by_subject(names, subjects, train_fraction, seed)
        training, validation = ([items[i] for i in side] for side in split)
    if batch_size is not None:
        check_batch_size(training, batch_size, of=len(training) + len(validation))
    logger.info("%d scan(s); subjects are recognised %s.", len(training) + len(validation), rule)
    datalist = {**sides, "training": training, "validation": validation}
    log_sides(datalist)
    subjects = {item["subject"] for item in [*training, *validation]}
    fifth = len(subjects) - round(0.8 * len(subjects))
    if "validation" not in sides and len({item["subject"] for item in validation}) == 1 < fifth:
        logger.info(
            "One subject alone is held out, of whom numbers say little: --train_fraction 0.8 holds out %d.", fifth
        )
    return datalist


def subject_rule(names: Sequence[str]) -> tuple[list[str], str]:
    """The subject of each scan of a cohort, and by what it is told.

    That is its BIDS entity (``sub-01``) or its UK Biobank participant (``1234567_20253_2_0.nii.gz`` -> ``1234567``).
    Names without either leave room for doubt, and the reading that keeps more scans together is taken: the folder
    nearest to the top that can be a person's (``101/visit1.nii.gz``), since none holds more scans than there are such
    folders, or six; the file name up to its first dot where there is none, or where the same files recur in fewer
    folders than there are files (``T1/101.nii.gz``, ``FLAIR/101.nii.gz``).

    Args:
        names: the scans' relative posix paths.

    Returns:
        the subjects, and the rule in words.
    """
    found = [SUBJECT.search(name) for name in names]
    subjects = [match[match.lastindex] if match else "" for match in found]
    unnamed = [index for index, match in enumerate(found) if match is None]
    if not unnamed:
        return subjects, "by their BIDS or UK Biobank names"
    read, rule = _read_layout([names[index] for index in unnamed])
    for index, subject in zip(unnamed, read, strict=True):
        subjects[index] = subject
    return subjects, rule if len(unnamed) == len(names) else f"by their BIDS or UK Biobank names, {len(unnamed)} {rule}"


def _warn_of_cut_labels(names: Sequence[str]) -> None:
    """Warn of labels that go on with a hyphen or ``+`` where their subject or session ends."""
    found = ((name, match) for name in names for match in (SUBJECT.search(name), SESSION.search(name)) if match)
    cut = [(name, match[match.lastindex]) for name, match in found if name[match.end() : match.end() + 1] in ("-", "+")]
    if cut:
        logger.warning(
            "%d label(s) hold a hyphen or +, which BIDS does not allow, such as that of '%s', which is read as '%s': "
            "rename these files, or give each a 'subject' and a 'session' in a datalist.",
            *(len(cut), *cut[0]),
        )


def _read_layout(names: Sequence[str]) -> tuple[list[str], str]:
    """The subjects of scans whose names do not tell them."""
    paths = [name.rstrip("/").split("/") for name in names]
    stems = [path[-1].split(".", 1)[0] for path in paths]
    folders = [path[:-1] for path in paths]
    shared = len(os.path.commonprefix(folders))  # noqa: RUF071 (of lists, part by part)
    parents = ["/".join(path[shared:]) for path in folders]
    if len(set(parents)) == 1:
        return stems, "by their file names"
    places = Counter(stem for _, stem in set(zip(parents, stems, strict=True)))
    if max(places.values()) > 1 and len(places) > len(set(parents)):
        return stems, "by their file names, which recur in several folders"
    for depth in range(shared + 1, max(map(len, folders)) + 1):
        groups = ["/".join(path[shared:depth]) for path in folders]
        counts = Counter(groups)
        if len(counts) > 1 and max(counts.values()) <= max(len(counts), SESSIONS):
            return groups, f"by their folders, such as '{groups[0]}'"
    if len(set(stems)) > 1:
        return stems, "by their file names"
    return parents, f"by their folders, such as '{parents[0]}'"


def session_name(name: str) -> str | None:
    """The session of a scan: its BIDS entity (``ses-2``) or its UK Biobank instance (``2``), from its path; or None."""
    found = SESSION.search(name)
    return found[found.lastindex] if found else None


def split_by_subject(
    names: Sequence[str], subjects: Sequence[str], train_fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split scans in two so that no subject is on both sides and neither side is empty.

    The split depends on the set of names and on the seed, not on the order of the names.

    Returns:
        Indices into ``names``: of the training scans and of the validation scans, each in order of name.

    Raises:
        ValueError: there are fewer than two subjects.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    all_subjects = sorted(set(subjects))
    if len(all_subjects) < 2:
        raise InputError(
            f"{len(names)} scan(s) of {len(all_subjects)} subject(s) cannot be split into training and validation, "
            "which need a subject each: add scans to dataset_dir, widen scan_pattern, or raise max_scans."
        )
    random.Random(seed).shuffle(all_subjects)
    count = min(max(round(train_fraction * len(all_subjects)), 1), len(all_subjects) - 1)
    training = set(all_subjects[:count])
    return [i for i in order if subjects[i] in training], [i for i in order if subjects[i] not in training]


def spaced(count: int, most: int) -> list[int]:
    """So many places at most among some, evenly: scans often come site by site."""
    return list(range(count)) if count <= most else [place * count // most for place in range(most)]


def log_sides(datalist: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Log how many scans, subjects and sessions each side of a datalist has."""
    for side, items in datalist.items():
        logger.info("%s: %s.", side.capitalize(), cohort_summary(items))


def cohort_summary(items: Sequence[Mapping[str, Any]]) -> str:
    """Numbers of scans, subjects and sessions, such as ``96 scans of 40 subjects in 90 sessions``."""
    text = f"{len(items)} scan{'s' * (len(items) != 1)}"
    subjects = {item["subject"] for item in items if item.get("subject") not in (None, "")}
    if not subjects:
        return text
    sessions = {(item["subject"], item["session"]) for item in items if item.get("session") not in (None, "")}
    text += f" of {len(subjects)} subject{'s' * (len(subjects) != 1)}"
    return text + (f" in {len(sessions)} session{'s' * (len(sessions) != 1)}" if sessions else "")


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
    found = find_scans(root, scan_pattern)  # a path of each scan, or a list of its channels
    items = [{"image": list(map(str, paths)) if isinstance(paths, list) else str(paths)} for paths in found]
    return *_with_entities({"training": items}, root), root


def common_root(scans: Sequence[Mapping[str, Any]], dataset_dir: str | os.PathLike) -> str:
    """The folder that names of results are relative to: ``dataset_dir``, or for a datalist what all its scans share."""
    root = Path(expand(dataset_dir))
    if root.is_dir():
        return str(absolute(root))
    if root.suffix == ".json" and root.is_file():
        scans = [item for side in _read_datalist(root).values() for item in side]
    return os.path.commonpath([absolute(file).parent for scan in scans for file in item_files(scan)])


def check_sides(sides: dict[str, list[dict]], path: str | os.PathLike) -> None:
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
    """Refuse a training side that cannot fill one batch (of each process); both sides hold ``of`` scans."""
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

    Paths are written absolute: relative ones would be read as relative to the JSON's own folder, which is created if
    needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {
        side: [{**item, "image": _each_path(lambda path: str(absolute(path)), item["image"])} for item in items]
        for side, items in datalist.items()
    }
    write_text(path, json.dumps(written, indent=1) + "\n")


def _each_path(change: Callable[[str], str], image: str | list[str]) -> str | list[str]:
    return [change(path) for path in image] if isinstance(image, list) else change(image)


def _with_entities(sides: dict[str, list[dict]], root: Path) -> tuple[dict[str, list[dict]], str]:
    """Add to items their subject and, if there is one, their session, by their names, where they have none.

    Returns:
        the sides, and how subjects are recognised.
    """
    items = [item for side in sides.values() for item in side]
    names = [_relative_name(item, root) for item in items]
    entities = []
    subjects, rule = subject_rule(names)
    _warn_of_cut_labels([name for name, item in zip(names, items, strict=True) if "subject" not in item])
    if all("subject" in item for item in items):
        rule = "by the datalist"
    for name, subject in zip(names, subjects, strict=True):
        session = session_name(name)
        entities.append({"subject": subject, **({"session": session} if session else {})})
    known = iter(entities)
    named = {
        side: [{"image": item["image"], **next(known), **_kept(item)} for item in side_items]
        for side, side_items in sides.items()
    }
    return named, rule


def _kept(item: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a datalist's item beside its paths: the subject, the session, and covariates."""
    return {k: v for k, v in item.items() if k in ("subject", "session") or k in covariate_fields(item)}


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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"dataset_dir '{path}' is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not content.get("training"):
        raise InputError(f"dataset_dir '{path}' holds no 'training' list: a datalist needs one of {{\"image\": path}}.")
    sides = {}
    for side in SIDES:
        entries = content.get(side) or []
        if not isinstance(entries, list):
            raise InputError(f"The '{side}' of dataset_dir '{path}' must be a list of {{\"image\": path}}.")
        for place, entry in enumerate(entries):
            check_item(entry, f"The '{side}' of dataset_dir '{path}', item {place} (from 0)")
        if entries:
            sides[side] = [
                {**e, "image": _each_path(lambda name: os.path.normpath(path.parent / expand(name)), e["image"])}
                for e in entries
            ]
            scan, count = Counter(item_path(item) for item in sides[side]).most_common(1)[0]
            if count > 1:
                raise InputError(f"The '{side}' of dataset_dir '{path}' names '{scan}' {count} times: leave one.")
    return sides


def covariate_fields(item: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The fields of a datalist's item that are covariates of the scan: texts and numbers."""
    return {k: v for k, v in item.items() if isinstance(v, str | int | float) and k not in NO_COVARIATES}


def check_item(item: Any, place: str) -> None:
    """Refuse what is no item of a datalist; subjects and sessions that are numbers become texts.

    Raises:
        InputError: it names no file, or a subject or session that is no text; the sentence begins with ``place``.
    """
    image = item.get("image") if isinstance(item, dict) else None
    paths = image if isinstance(image, list) else [image]
    if not paths or not all(isinstance(path, str) and path and "\0" not in path for path in paths):
        raise InputError(f'{place}, is {_shown(item)}: write {{"image": path}}, or a list of paths, one per channel.')
    for name in ("subject", "session"):
        value = item.get(name, "")
        if type(value) is int:
            item[name] = str(value)
        elif not isinstance(value, str) or (name == "subject" and name in item and not value):
            raise InputError(f"{place}, has the {name} {_shown(value)}: write a text, or leave it out.")


def _shown(value: Any) -> str:
    """A value of a file as a message shows it, not longer than a line."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."
