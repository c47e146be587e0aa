"""Where covariates of scans are read: BIDS tables, a CSV file, or the fields of a datalist."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scripts.data.covariates import CovariateCoding, Value, check_kinds
from scripts.data.datalist import common_root
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.names import item_path
from torch import Tensor

__all__ = [
    "CohortCovariates",
    "describe_participants",
    "parse_row",
    "parse_rows",
    "read_cohort",
    "read_participants",
    "read_rows",
    "read_table",
]

logger = logging.getLogger(__name__)

PARTICIPANTS = "participants.tsv"
MISSING = ("n/a", "")
MOST_NAMED = 8  # categories of a covariate, in a message
SUBJECT_COLUMNS = ("participant_id", "subject", "subject_id")
SESSION_COLUMNS = ("session_id", "session")


class CohortCovariates(NamedTuple):
    """The covariates of the two sides of a data set, as numbers.

    Attributes:
        coding: learnt from the training side.
        training, validation: ``[scans, numbers]``, in the scans' order.
    """

    coding: CovariateCoding
    training: Tensor
    validation: Tensor


def read_cohort(
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    dataset_dir: str | os.PathLike,
    covariates: Mapping[str, str] | None,
    covariates_file: str | os.PathLike | None = None,
) -> CohortCovariates | None:
    """Read the covariates of a data set, and learn from its training side how they become numbers.

    Args:
        training, validation: items of a datalist.
        dataset_dir: where they come from.
        covariates: ``continuous`` or ``categorical`` by the covariates' names; None: there are none.
        covariates_file: a table, see :func:`read_rows`.

    Raises:
        ValueError: a covariate is found nowhere, or a value makes no sense; a covariate of a validation scan whose
            category no training scan has counts as not known.
        FileNotFoundError: there is no ``covariates_file``.
    """
    if covariates is None:
        return None
    kinds = check_kinds(covariates)
    sides = [read_rows(items, dataset_dir, covariates_file) for items in (training, validation)]
    known = {name for rows in sides for row in rows for name in row}
    for name in kinds:
        if name not in known:
            raise InputError(
                f"covariates: '{name}' is in no table of dataset_dir '{dataset_dir}'"
                + (f" or '{covariates_file}'" if covariates_file else "")
                + (f"; found are {', '.join(sorted(known))}." if known else ": there is no participants.tsv.")
            )
    coding = CovariateCoding.learn(kinds, sides[0])
    parsed = [parse_rows(coding, training, sides[0]), parse_rows(coding, validation, sides[1], "unknown")]
    for name in kinds:
        both = "; ".join(
            f"{side} {describe([values[name] for values in found])}"
            for side, found in zip(("training", "validation"), parsed, strict=True)
            if found
        )
        logger.info("Covariate %s: %s.", name, both)
    numbers = [torch.stack([coding.numbers(v) for v in found]) if found else torch.zeros(0, 0) for found in parsed]
    return CohortCovariates(coding, *numbers)


def describe(values: Sequence[Any]) -> str:
    """A covariate of some scans in a few words: its range, mean and standard deviation, or how many are of each
    category; and how many lack it.
    """
    known = [value for value in values if value not in (None, *MISSING)]
    missing = len(values) - len(known)
    try:
        numbers = [float(value) for value in known]
    except ValueError:
        numbers = []
    if not known:
        text = "none"
    elif numbers:
        text = f"{min(numbers):g} to {max(numbers):g}, mean {np.mean(numbers):.4g}, sd {np.std(numbers):.3g}"
    else:
        counts = Counter(map(str, known)).most_common(MOST_NAMED + 1)
        named = ", ".join(f"{category} {count}" for category, count in counts[:MOST_NAMED])
        text = named + (" and others" if len(counts) > MOST_NAMED else "")
    return text + (f", {missing} of {len(values)} missing" if missing else "")


def describe_participants(root: str | os.PathLike, subjects: Sequence[str]) -> list[str]:
    """A line about each column of a data set's ``participants.tsv``, as far as it is about these subjects."""
    rows = read_participants(Path(root))
    own = [rows.get(_plain(subject), {}) for subject in sorted(set(subjects))]
    columns = next(iter(rows.values()), {})
    return [f"{name}: {describe([row.get(name, '') for row in own])}" for name in columns]


def parse_row(coding: CovariateCoding, item: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Value]:
    """What is written of a scan, as values of all covariates.

    Raises:
        ValueError: a value makes no sense, or the cohort had no such category; the sentence names the scan.
    """
    try:
        return coding.parse(row)
    except ValueError as error:
        raise InputError(f"'{item_path(item)}': {error}") from error


def parse_rows(
    coding: CovariateCoding,
    items: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    unseen: str = "error",
) -> list[dict[str, Value]]:
    """What is written of several scans, as values of all covariates.

    Args:
        items, rows: of each scan.
        unseen: what a category is that no training scan had: an ``error``, or ``unknown``, with a warning.

    Raises:
        ValueError: as :func:`parse_row`; or ``unseen`` is neither.
    """
    if unseen not in ("error", "unknown"):
        raise InputError(f"unseen_categories is {unseen!r}: set --unseen_categories to error or unknown.")
    parsed, found = [], Counter()
    for item, row in zip(items, rows, strict=True):
        new = coding.unseen(row)
        if new and unseen == "error":
            words = ", ".join(
                f"{name} {word!r}, but {', '.join(coding.variables[name].categories)}" for name, word in new.items()
            )
            raise InputError(
                f"'{item_path(item)}': no training scan has {words}. Write n/a for what is not known, or set "
                "--unseen_categories unknown."
            )
        found.update(f"{name} {word!r}" for name, word in new.items())
        parsed.append(parse_row(coding, item, {name: value for name, value in row.items() if name not in new}))
    if found:
        named = ", ".join(f"{what} ({count} scan(s))" for what, count in found.most_common(MOST_NAMED))
        logger.warning("Categories that no training scan has count as not known: %s.", named)
    return parsed


def read_rows(
    items: Sequence[Mapping[str, Any]], dataset_dir: str | os.PathLike, covariates_file: str | os.PathLike | None = None
) -> list[dict[str, Any]]:
    """What is written of each scan: names and values, as far as there are any.

    The first of these that has a value says it: ``covariates_file``; the fields of a datalist's items; BIDS
    ``sub-X/sub-X_sessions.tsv``; BIDS ``participants.tsv``.

    Args:
        items: with ``image``, and as far as they are known ``subject`` and ``session``.
        dataset_dir: the folder or datalist that they come from.
        covariates_file: CSV, or TSV by its ending, with a column ``image`` (paths relative to the data set) or
            ``participant_id``, and if need be ``session_id``.

    Raises:
        FileNotFoundError: there is no ``covariates_file``.
        ValueError: it has no such column, or two rows for one scan.
    """
    root = Path(common_root(items, dataset_dir))
    given = _Table(covariates_file) if covariates_file is not None else None
    fields = _datalist_fields(Path(dataset_dir))
    participants, sessions = read_participants(root), {}
    rows = []
    for item in items:
        subject, session = (str(item.get(name, "")) for name in ("subject", "session"))
        path = Path(os.path.normpath(Path(item_path(item)).expanduser().absolute()))
        if subject not in sessions:
            sessions[subject] = _read_sessions(root, subject)
        row = dict(participants.get(_plain(subject), {}))
        row |= sessions[subject].get(_plain(session), {})
        row |= fields.get(str(path), {})
        if given is not None:
            image = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
            row |= given.row(image, _plain(subject), _plain(session))
        rows.append(row)
    return rows


def read_participants(root: Path) -> dict[str, dict[str, str]]:
    """The rows of a BIDS ``participants.tsv`` by the subject's name without ``sub-``; empty where there is no file.

    Args:
        root: the folder of a data set, or that of a few scans in it.
    """
    found = [folder / PARTICIPANTS for folder in (root, *root.parents[:3]) if (folder / PARTICIPANTS).is_file()]
    if not found:
        return {}
    columns, rows = read_table(found[0])
    if "participant_id" not in columns:
        logger.warning("'%s' has no column participant_id, and is not read.", found[0])
        return {}
    return {_plain(row.pop("participant_id")): row for row in rows}


def _read_sessions(root: Path, subject: str) -> dict[str, dict[str, str]]:
    """The rows of a BIDS ``sub-X_sessions.tsv`` by the session's name without ``ses-``, empty cells left out."""
    name = f"sub-{_plain(subject)}"
    path = next((p for p in (root / name, root) if (p / f"{name}_sessions.tsv").is_file()), None)
    if path is None:
        return {}
    _, rows = read_table(path / f"{name}_sessions.tsv")
    return {_plain(row.pop("session_id", "")): {k: v for k, v in row.items() if v} for row in rows}


def _datalist_fields(path: Path) -> dict[str, dict[str, Any]]:
    """What a datalist says of its scans beside their paths, by the absolute path of the first file."""
    if path.suffix != ".json" or not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for side in content.values():
        for entry in side if isinstance(side, list) else ():
            if isinstance(entry, dict) and entry.get("image"):
                first = entry["image"] if isinstance(entry["image"], str) else entry["image"][0]
                absolute = os.path.normpath(path.parent.absolute() / Path(first).expanduser())
                values = {k: v for k, v in entry.items() if isinstance(v, str | int | float) and k != "image"}
                found[absolute] = values
    return found


class _Table:
    """The rows of a table of covariates, by image, or by subject and session."""

    def __init__(self, path: str | os.PathLike) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise NotFoundError(f"covariates_file '{path}' does not exist: check the path.")
        columns, rows = read_table(file)
        self.by_image = "image" in columns
        keys = ["image"] if self.by_image else [c for c in SUBJECT_COLUMNS if c in columns][:1]
        if not keys:
            raise InputError(
                f"covariates_file '{path}' has no column image or participant_id to say which scan a row is of."
            )
        keys += [] if self.by_image else [c for c in SESSION_COLUMNS if c in columns][:1]
        self.with_session = len(keys) == 2
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            key = tuple(row.pop(k) if k == "image" else _plain(row.pop(k)) for k in keys)
            if key in self.rows:
                raise InputError(f"covariates_file '{path}' has two rows for {' '.join(key)}: leave one.")
            self.rows[key] = {k: v for k, v in row.items() if v}

    def row(self, image: str, subject: str, session: str) -> dict[str, str]:
        """Of a scan; empty where there is none."""
        key = (image,) if self.by_image else (subject, session) if self.with_session else (subject,)
        return self.rows.get(key, {})


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV or TSV file; cells that say nothing are empty."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = list(reader.fieldnames or ())
        rows = [
            {k: "" if v is None or v.strip() in MISSING else v.strip() for k, v in row.items() if k is not None}
            for row in reader
        ]
    return columns, rows


def _plain(name: str) -> str:
    """The name of a subject or session without ``sub-`` or ``ses-``."""
    return name.removeprefix("sub-").removeprefix("ses-")
