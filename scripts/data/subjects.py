"""Who a scan is of, read from its path, so that a subject's scans stay on one side of a split."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.utils.errors import InputError

__all__ = ["cohort_summary", "session_name", "split_by_subject", "subject_names", "subject_rule"]

# BIDS writes the subject as an entity, in folders and file names alike. UK Biobank writes it as the first of the four
# numbers participant_field_instance_array, where the instance is the visit.
SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)|(?:^|/)(\d+)_\d{5}_\d+_\d+(?=[./_]|$)")
SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9]+)|(?:^|/)\d+_\d{5}_(\d+)_\d+(?=[./_]|$)")
# Scans that a person's folder may hold, even if there are fewer such folders. One with more scans than there are
# folders is taken for a site, or for the folder of all images.
SESSIONS = 6


def subject_names(names: Sequence[str]) -> list[str]:
    """The subject of each scan of a cohort, see :func:`subject_rule`."""
    return subject_rule(names)[0]


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
    names: Sequence[str], train_fraction: float = 0.95, seed: int = 0, subjects: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Split scans in two so that no subject is on both sides and neither side is empty.

    The split depends on the set of names and on the seed, not on the order of the names.

    Args:
        names: the scans' relative posix paths.
        train_fraction: the share of subjects to train on, between 0 and 1.
        seed: chooses the split.
        subjects: of each scan, by default what :func:`subject_names` finds.

    Returns:
        Indices into ``names``: of the training scans and of the validation scans, each in order of name.

    Raises:
        ValueError: ``train_fraction`` is not between 0 and 1, or there are fewer than two subjects.
    """
    if not 0 < train_fraction < 1:
        raise InputError(f"train_fraction is {train_fraction}: it must lie between 0 and 1, both excluded.")
    order = sorted(range(len(names)), key=names.__getitem__)
    subjects = subject_names(names) if subjects is None else subjects
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


def cohort_summary(items: Sequence[Mapping[str, Any]]) -> str:
    """Numbers of scans, subjects and sessions, such as ``96 scans of 40 subjects in 90 sessions``."""
    text = f"{len(items)} scan{'s' * (len(items) != 1)}"
    subjects = {item["subject"] for item in items if item.get("subject") not in (None, "")}
    if not subjects:
        return text
    sessions = {(item["subject"], item["session"]) for item in items if item.get("session") not in (None, "")}
    text += f" of {len(subjects)} subject{'s' * (len(subjects) != 1)}"
    return text + (f" in {len(sessions)} session{'s' * (len(sessions) != 1)}" if sessions else "")
