"""What is known of scans: BIDS tables, a file of one's own and the fields of a datalist, read in one way for all."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scripts.data.covariates import CovariateCoding, Value, check_kinds, missing, parse_number, shortened
from scripts.data.datalist import common_root, covariate_fields
from scripts.data.tables import ScanName, ScanTable
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import absolute, expand, read_json
from scripts.utils.names import item_path
from torch import Tensor

logger = logging.getLogger(__name__)

OTHER_TABLE = "; name a table by --covariates_file"

PARTICIPANTS, DESCRIPTION = "participants.tsv", "dataset_description.json"
FAR = 5  # times the distance between its quartiles: how far from these a value still lies among the others
MOST_NAMED = 8  # categories of a covariate, in a message


class Covariates:
    """What tables say of the scans of a data set: the one place where covariates are read, and where all ask.

    The first of these that has a value of a covariate says it: ``covariates_file``; the fields of a datalist's items;
    BIDS ``sub-X/sub-X_sessions.tsv``; BIDS ``participants.tsv``, with a row for each participant, or for each
    participant and session (a column ``session_id``, ``session`` or ``ses``).

    Args:
        items: of a datalist, with ``image`` and, as far as they are known, ``subject`` and ``session``.
        dataset_dir: the folder or datalist that they come from; ``~`` is the user's home.
        covariates_file: CSV, or TSV by its ending, with a column ``image`` (paths relative to the data set) or
            ``participant_id``, and if need be ``session_id``.

    Attributes:
        names: of all that any table says of a scan, in the order of the tables' columns.
        rows: of each scan its values by their names, as they are written, in the items' order; a value that is missing
            in all tables that have its column is an empty text.

    Raises:
        NotFoundError: there is no ``covariates_file``.
        InputError: it has no such column; a table has two different rows for one scan, or is no table.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        dataset_dir: str | os.PathLike,
        covariates_file: str | os.PathLike | None = None,
    ) -> None:
        place = Path(expand(dataset_dir))
        root = Path(common_root(items, place))
        paths = [str(absolute(item_path(item))) for item in items]
        self._scans = [_scan_name(item, path, root) for item, path in zip(items, paths, strict=True)]
        self._places = {item_path(item): index for index, item in enumerate(items)}
        participants = _read_participants(root)
        given = None if covariates_file is None else _read_own_table(covariates_file)
        self._tables = [table for table in (participants, given) if table is not None]
        fields = _datalist_fields(place)
        sessions = {scan.subject: _read_sessions(root, scan.subject) for scan in self._scans}
        by_subject = defaultdict(list)
        for scan in self._scans:
            by_subject[scan.subject].append(scan)
        self._sessions = [(table, by_subject[name]) for name, table in sessions.items() if table is not None]
        self.rows: list[dict[str, Any]] = []
        self._sources: list[dict[str, str]] = []  # the file of each value
        for scan, path in zip(self._scans, paths, strict=True):
            tables = (table for table in (participants, sessions[scan.subject], given) if table is not None)
            found = [(str(table.path), table.find(scan) or {}) for table in tables]
            found.insert(len(found) - (given is not None), (str(place), fields.get(path, {})))
            row: dict[str, Any] = {}
            sources = {}
            for file, values in found:  # the later count more
                for name, value in values.items():
                    if not missing(value):
                        row[name], sources[name] = value, file
                    row.setdefault(name, "")
            self.rows.append(row)
            self._sources.append(sources)
        of_tables = [name for table in self._tables for name in table.names]
        self.names = list(dict.fromkeys([*of_tables, *(name for row in self.rows for name in row)]))

    def of(self, scan: str) -> dict[str, str]:
        """All that is written of one scan, as text, by ``names``: what is used of it, for tables of results.

        Args:
            scan: the path of its first file, as the items have it; of others all is empty.
        """
        place = self._places.get(scan)
        row = {} if place is None else self.rows[place]
        return {name: str(row.get(name, "")) for name in self.names}

    def values(
        self, coding: CovariateCoding, unseen: str = "error", refused: dict[int, str] | None = None
    ) -> list[dict[str, Value]]:
        """The values of all covariates of a coding, of each scan; None for what is not known.

        Args:
            coding: of the covariates.
            unseen: what a category is that no training scan had: an ``error``, or ``unknown``, with a warning.
            refused: takes up why the values of a scan are refused, by its place; such a scan's are all None then.

        Raises:
            InputError: a value makes no sense, or the training scans had no such category: the sentence names the scan
                and the file. Or ``unseen`` is neither.
        """
        if unseen not in ("error", "unknown"):
            raise InputError(f"unseen_categories is {unseen!r}: set --unseen_categories to error or unknown.")
        values, unknown = [], Counter()
        for place, row in enumerate(self.rows):
            new = coding.unseen(row)
            try:
                if new and unseen == "error":
                    raise self._unseen(place, coding, new)
                values.append(self.values_of(place, coding, without=new))
            except InputError as error:
                if refused is None:
                    raise
                refused[place] = str(error)
                values.append(dict.fromkeys(coding.variables))
            else:
                unknown.update(f"{name} {shortened(word)}" for name, word in new.items())
        if unknown:
            named = ", ".join(f"{what} ({count} scan(s))" for what, count in unknown.most_common(MOST_NAMED))
            logger.warning("Categories that no training scan has count as not known: %s.", named)
        return values

    def _unseen(self, place: int, coding: CovariateCoding, new: Mapping[str, Any]) -> InputError:
        """That a scan has categories which no training scan has."""
        words = ", ".join(
            f"{name} {shortened(word)}, but {', '.join(coding.variables[name].categories)}"
            for name, word in new.items()
        )
        return InputError(
            f"'{self._scans[place].image}': no training scan has {words}. Write n/a for what is not known, or set "
            f"--unseen_categories unknown. See '{self._sources[place][next(iter(new))]}'."
        )

    def values_of(self, place: int, coding: CovariateCoding, without: Iterable[str] = ()) -> dict[str, Value]:
        """The values of one scan by its place among the items, as :meth:`values`; those ``without`` are None."""
        left_out = set(without)
        return {
            name: None if name in left_out else self._parsed(place, name, variable.parse)
            for name, variable in coding.variables.items()
        }

    def _parsed(self, place: int, name: str, parse: Callable[[Any], Value]) -> Value:
        try:
            return parse(self.rows[place].get(name))
        except InputError as error:
            raise InputError(f"'{self._scans[place].image}': {error} See '{self._sources[place][name]}'.") from error

    def learn(self, kinds: Mapping[str, str]) -> CovariateCoding:
        """How the covariates of these scans, those to train on, become numbers.

        Args:
            kinds: ``continuous``, ``categorical`` or knots by the covariates' names.

        Raises:
            InputError: no scan has a value of one, or a value makes no sense.
        """
        for name, kind in kinds.items():
            if all(missing(row.get(name)) for row in self.rows):
                why = " ".join(["", *self.without_rows()])
                raise InputError(f"covariates: no training scan has a value for '{name}'.{why}")
            if kind != "categorical":
                parse = partial(parse_number, name)
                self._warn_of_far(name, [self._parsed(place, name, parse) for place in range(len(self.rows))])
        return CovariateCoding.learn(kinds, self.rows)

    def _warn_of_far(self, name: str, values: Sequence[float | None]) -> None:
        """Name values that may stand for what is not known (-9, 999), or are in another unit than the others."""
        known = {place: value for place, value in enumerate(values) if value is not None}
        low, high = np.quantile(list(known.values()), (0.25, 0.75))
        below = {value for value in known.values() if value < 0}
        code = below if len(below) == 1 and low > 0 else set()
        reach = FAR * (high - low) or math.inf
        far = [p for p, value in known.items() if value in code or not low - reach <= value <= high + reach]
        if far:
            others = [value for place, value in known.items() if place not in far]
            logger.warning(
                "%s is %s of %d scan(s), such as '%s', far from the others (%g to %g): write n/a for one that is not "
                "known.",
                *(name, " or ".join(f"{value:g}" for value in sorted({known[p] for p in far})[:MOST_NAMED]), len(far)),
                *(self._scans[far[0]].image, min(others), max(others)),
            )

    def without_rows(self) -> list[str]:
        """A sentence for each table in which scans have no row: how many, and how both spell a name. For every job.

        A ``1`` in a table is not taken for ``sub-0001``, or for ``ses-01``. Of the tables of subjects' sessions the
        first such one has a sentence, which counts the others.
        """
        found = [sentence for table in self._tables if (sentence := table.without_row(self._scans))]
        sessions = [sentence for table, scans in self._sessions if (sentence := table.without_row(scans))]
        more = f" So it is with {len(sessions) - 1} more table(s) of sessions." if len(sessions) > 1 else ""
        return found + [sentence + more for sentence in sessions[:1]]

    def without_column(self, names: Iterable[str]) -> str:
        """Half a sentence on covariates that are no column of a table: what the tables have; empty where all are."""
        missing_names = [name for name in names if name not in self.names]
        if not missing_names:
            return ""
        if not self.names:
            return f": put a {PARTICIPANTS} into dataset_dir, or name a table by --covariates_file"
        return f": no table has a column {' or '.join(missing_names)}; found are {', '.join(self.names)}"

    def outside_range(self, coding: CovariateCoding, values: Sequence[Mapping[str, Value]]) -> tuple[list[bool], str]:
        """Which scans have a continuous covariate outside of the range of the training scans.

        Args:
            coding: of the covariates.
            values: of each scan, see :meth:`values`.

        Returns:
            Of each scan whether it has, and a sentence on them, empty where none has.
        """
        beyond = [[n for n, variable in coding.variables.items() if variable.outside(v[n])] for v in values]
        if not any(beyond):
            return [False] * len(beyond), ""
        place, names = next((place, names) for place, names in enumerate(beyond) if names)
        ranges = ", ".join(
            f"{name} {values[place][name]:g} ({coding.variables[name].low:g} to {coding.variables[name].high:g})"
            for name in names
        )
        return list(map(bool, beyond)), (
            f"{sum(map(bool, beyond))} of {len(beyond)} scan(s) have covariates outside of the range of the training "
            f"scans, such as '{self._scans[place].image}': {ranges}. What is said of them is extrapolated."
        )

    def warn_of_unknown(
        self, coding: CovariateCoding, values: Sequence[Mapping[str, Value]], any_refused: bool = False
    ) -> list[bool]:
        """Warn of what is not known of the scans, of those without a row, and of those outside of the prior's range.

        Args:
            coding: of the prior's covariates, those that are asked for.
            values: of each scan, see :meth:`values`.
            any_refused: whether some are not known because they were refused.

        Returns:
            Of each scan whether it lies outside.
        """
        lacking = {name: sum(known[name] is None for known in values) for name in coding.variables}
        if values and not any_refused and all(count == len(values) for count in lacking.values()):
            logger.warning(
                "Nothing says %s of any scan, so that each is compared with the whole cohort%s.",
                *(" or ".join(lacking), self.without_column(lacking)),
            )
        elif said := " and ".join(f"{name} of {count}" for name, count in lacking.items() if count):
            logger.warning(
                "Not known is the %s of %d scan(s): these are compared with people of any%s.",
                *(said, len(values), self.without_column(lacking)),
            )
        outside, sentence = self.outside_range(coding, values)
        for warning in (*self.without_rows(), *([sentence] if sentence else [])):
            logger.warning("%s", warning)
        return outside

    def describe(self) -> list[str]:
        """A line about each name: range, mean and standard deviation, or how many scans have each category."""
        return [f"{name}: {_summary([row.get(name) for row in self.rows])}" for name in self.names]


class CohortCovariates(NamedTuple):
    """The covariates of the two sides of a data set, as numbers.

    Attributes:
        coding: learnt from the training side.
        training, validation: ``[scans, numbers]``, in the scans' order.
        values: of the scans of the training side and of the validation side, by the covariates' names.
    """

    coding: CovariateCoding
    training: Tensor
    validation: Tensor
    values: tuple[Sequence[Mapping[str, Value]], Sequence[Mapping[str, Value]]]

    @classmethod
    def coded(cls, coding: CovariateCoding, *values: Sequence[Mapping[str, Value]]) -> CohortCovariates:
        """From the values of the two sides."""
        numbers = [torch.stack([coding.numbers(v) for v in side]) if side else torch.zeros(0, 0) for side in values]
        return cls(coding, *numbers, values)


def read_cohort(
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    dataset_dir: str | os.PathLike,
    covariates: Mapping[str, Any] | None,
    covariates_file: str | os.PathLike | None = None,
) -> CohortCovariates | None:
    """Read the covariates of a data set, and learn from its training side how they become numbers.

    A category of a validation scan that no training scan has counts as not known.

    Args:
        training, validation: items of a datalist.
        dataset_dir: where they come from.
        covariates: ``continuous``, ``categorical`` or knots by the covariates' names; None: there are none.
        covariates_file: a table, see :class:`Covariates`.

    Raises:
        InputError: a covariate is found nowhere, or a value makes no sense.
        NotFoundError: there is no ``covariates_file``.
    """
    if covariates is None:
        return None
    kinds = check_kinds(covariates)
    sides = [Covariates(items, dataset_dir, covariates_file) for items in (training, validation)]
    names = sorted({name for side in sides for name in side.names})
    for name in kinds:
        if name not in names:
            raise InputError(
                f"covariates: '{name}' is in no table of dataset_dir '{dataset_dir}'"
                + (f" or '{covariates_file}'" if covariates_file else "")
                + (f"; found are {', '.join(names)}." if names else f": there is no participants.tsv{OTHER_TABLE}.")
            )
    for name, side in zip(("training", "validation"), sides, strict=True):
        for sentence in side.without_rows():
            logger.warning("Of the %s side %s", name, sentence)
    coding = sides[0].learn(kinds)
    parsed = [sides[0].values(coding), sides[1].values(coding, "unknown")]
    for name in kinds:
        ranges = "; ".join(
            f"{side} {_summary([values[name] for values in found])}"
            for side, found in zip(("training", "validation"), parsed, strict=True)
            if found
        )
        logger.info("Covariate %s: %s.", name, ranges)
    return CohortCovariates.coded(coding, *parsed)


def _summary(values: Sequence[Any]) -> str:
    """A covariate of some scans in a few words, and how many lack it."""
    known = [value for value in values if not missing(value)]
    try:
        numbers = [float(value) for value in known]
    except ValueError:
        numbers = []
    if not known:
        text = "none"
    elif numbers:
        text = f"{min(numbers):g} to {max(numbers):g}, mean {np.mean(numbers):.4g}, sd {np.std(numbers):.3g}"
    else:
        counts = Counter(str(value) for value in known).most_common(MOST_NAMED + 1)
        named = ", ".join(f"{shortened(category).strip(chr(39))} {count}" for category, count in counts[:MOST_NAMED])
        text = named + (" and others" if len(counts) > MOST_NAMED else "")
    lacking = len(values) - len(known)
    return text + (f", {lacking} of {len(values)} missing" if lacking else "")


def _scan_name(item: Mapping[str, Any], path: str, root: Path) -> ScanName:
    relative = Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path
    return ScanName(relative, *(str(item.get(name) or "") for name in ("subject", "session")))


def _read_participants(root: Path) -> ScanTable | None:
    """The ``participants.tsv`` of a data set, or of one that the folder of a few scans lies in; None without."""
    folders = [root, *root.parents[:3]]
    top = next((folder for folder in folders if _is_raw_data_set(folder)), None)
    inside = folders if top is None else folders[: folders.index(top) + 1]  # above it are other data sets
    path = next((f / PARTICIPANTS for f in inside if (f / PARTICIPANTS).is_file()), None)
    if path is not None and path.parent != root:
        logger.log(
            logging.INFO if path.parent == top else logging.WARNING,
            "'%s', above the data set, says what is known of its scans.",
            path,
        )
    table = None if path is None else ScanTable(path)
    if table is not None and not table.named:
        logger.warning("'%s' has no column participant_id, and is not read.", path)
        return None
    return table


def _is_raw_data_set(folder: Path) -> bool:
    """Whether it is the folder of a BIDS data set, and not of derivatives, whose people the one above describes."""
    path = folder / DESCRIPTION
    if not path.is_file() or folder.parent.name == "derivatives":
        return False
    with contextlib.suppress(InputError):  # whatever else it holds
        return read_json(path, "the description of a BIDS data set").get("DatasetType") != "derivative"
    return True


def _read_sessions(root: Path, subject: str) -> ScanTable | None:
    """The BIDS ``sub-X_sessions.tsv`` of a subject; None without."""
    name = f"sub-{subject.removeprefix('sub-')}"
    paths = (folder / f"{name}_sessions.tsv" for folder in (root / name, root))
    path = next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113 (names may be too long)
    return None if path is None else ScanTable(path, subject)


def _read_own_table(covariates_file: str | os.PathLike) -> ScanTable:
    path = Path(expand(covariates_file))
    if not path.is_file():
        raise NotFoundError(f"covariates_file '{covariates_file}' does not exist: check the path.")
    table = ScanTable(path)
    if not table.named:
        raise InputError(
            f"covariates_file '{covariates_file}' has no column image or participant_id to say which scan a row is of."
        )
    return table


def _datalist_fields(path: Path) -> dict[str, dict[str, Any]]:
    """What a datalist says of its scans beside their paths, by the absolute path of the first file."""
    if path.suffix != ".json" or not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    found = {}
    for side in content.values():
        for entry in side if isinstance(side, list) else ():
            if isinstance(entry, dict) and entry.get("image"):
                first = entry["image"] if isinstance(entry["image"], str) else entry["image"][0]
                found[str(absolute(path.parent / expand(first)))] = covariate_fields(entry)
    return found
