"""Tables in files, CSV or TSV: their text, and which of their rows is about which scan."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.data.covariates import missing
from scripts.utils.errors import InputError

logger = logging.getLogger(__name__)

ID_COLUMNS = ("image", "participant_id", "subject", "subject_id")  # what says which scan a row is about
SESSION_COLUMNS = ("session_id", "session", "ses")
FALLBACK = "cp1252"  # what spreadsheets write that do not write UTF-8; Latin-1 is nearly the same
MOST_COMPARED = 1000  # names of a table among which one like a scan's is looked for


class Table(NamedTuple):
    """A table as text.

    Attributes:
        columns: their names.
        rows: of each row the cells by their columns' names, without spaces around them; a cell that says nothing
            (``n/a``, R's ``NA`` and so on, see :func:`scripts.data.covariates.missing`) is empty.
    """

    columns: list[str]
    rows: list[dict[str, str]]


def read_table(path: Path) -> Table:
    """Read a CSV file, or a TSV file by its ending. An empty file is a table without columns.

    Where the first line has none of the separators that the ending promises, it is the one that it has: spreadsheets
    of many languages write semicolons into CSV, and what they call TSV may have commas.

    It may be in UTF-8, with or without a byte order mark, or in UTF-16 with one. What is neither is taken for
    Windows-1252, with a warning.

    Raises:
        InputError: it is no text, its columns do not have names of their own, or its rows more cells than columns.
    """
    import pandas  # takes half a second to import, and most jobs read no table

    text, usual = _decoded(path), "\t" if path.suffix.lower() == ".tsv" else ","
    mark = next((mark for mark in (usual, *"\t;,") if mark in text.partition("\n")[0]), usual)
    try:
        frame = pandas.read_csv(io.StringIO(text), sep=mark, header=None, dtype=str, na_filter=False)
    except pandas.errors.EmptyDataError:
        return Table([], [])
    except pandas.errors.ParserError as error:
        reason = str(error).strip().rpartition("C error: ")[2]
        raise InputError(f"'{path}' cannot be read as a table ({reason}): correct that line.") from error
    frame = frame.map(str.strip)
    frame = frame.loc[:, (frame != "").any()]  # spreadsheets leave columns with neither a name nor a cell
    columns, *rows = frame.values.tolist()
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark)  # pandas fills rows up without a word
    short = [line for line in lines if 0 < len(line) < len(columns)]
    if short:
        logger.warning(
            "'%s': %d row(s) have fewer cells than there are columns, such as that of '%s': the last ones count as "
            "missing.",
            *(path, len(short), short[0][0]),
        )
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise InputError(f"'{path}' has several columns '{twice[0]}': give each a name of its own.")
    return Table(columns, [dict(zip(columns, ("" if missing(c) else c for c in row), strict=True)) for row in rows])


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        try:
            text = data.decode(FALLBACK)
        except UnicodeDecodeError:
            raise InputError(
                f"'{path}' is not in {encoding.removesuffix('-sig').upper()}, as line {line} shows: save it as UTF-8."
            ) from error
        logger.warning(
            "'%s' is not in UTF-8, as line %d shows: it is read as Windows-1252. Save it as UTF-8, so that names are "
            "right for certain.",
            path,
            line,
        )
    if "\0" in text:
        raise InputError(f"'{path}' holds zero bytes: it is no table, or in UTF-16 without its mark. Save it as UTF-8.")
    return text


class ScanName(NamedTuple):
    """By what a table may name a scan; what is not known is empty.

    Attributes:
        image: path relative to the data set.
        subject, session: with ``sub-`` and ``ses-`` or without.
    """

    image: str
    subject: str = ""
    session: str = ""


class ScanTable:
    """A table whose rows are about images, participants, or sessions of participants.

    Names of participants and sessions are the same with ``sub-`` and ``ses-`` or without; ``1`` is not ``0001``.

    Args:
        path: of the file.
        subject: of whom all rows are, as in BIDS ``sub-X_sessions.tsv``, where a scan of no session has no row.

    Attributes:
        path: of the file.
        names: of the columns but those that say which scan a row is about.
        named: whether there are such.

    Raises:
        InputError: there are two different rows for one image, participant or session; or it is no table.
    """

    def __init__(self, path: Path, subject: str | None = None) -> None:
        self.path, self.subject = path, subject
        columns, rows = read_table(path)
        id_column = None if subject is not None else next((c for c in ID_COLUMNS if c in columns), None)
        self._by_image = id_column == "image"
        session_column = None if self._by_image else next((c for c in SESSION_COLUMNS if c in columns), None)
        self.named = (session_column if subject is not None else id_column) is not None
        self.names = [name for name in columns if name not in (id_column, session_column)]
        self._written: dict[str, str] = {}  # by the names without sub-
        self._rows: dict[str, dict[str, dict[str, str]]] = {}  # by image or participant, then by session
        for row in rows if self.named else ():
            written = subject if id_column is None else row.pop(id_column)
            session = "" if session_column is None else row.pop(session_column)
            name = written if self._by_image else _plain(written)
            if not name:
                continue
            self._written.setdefault(name, written)
            if self._rows.setdefault(name, {}).setdefault(_plain(session), row) != row:
                whose = " ".join(filter(None, (written, session)))
                raise InputError(f"'{path}' has two rows for {whose}, which differ: leave one.")

    def find(self, scan: ScanName) -> dict[str, str] | None:
        """The row of a scan, by the columns' names; None where there is none.

        Of a scan whose session is not known it is the participant's only one.

        Raises:
            InputError: the session of the scan is not known, and the participant has several rows.
        """
        rows = self._rows.get(scan.image if self._by_image else _plain(scan.subject), {})
        session = _plain(scan.session)
        if session in rows or "" in rows or session or self.subject is not None:
            return rows.get(session, rows.get(""))
        if len(rows) > 1:
            raise InputError(
                f"'{self.path}' has two rows for {scan.subject}, and the name of '{scan.image}' does not say of which "
                f"session it is ({', '.join(rows)}): write its session into its name, or leave one row."
            )
        return next(iter(rows.values()), None)

    def without_row(self, scans: Sequence[ScanName]) -> str:
        """A sentence on how many of some scans have no row, with a name as both spell it; empty where all have one."""
        if not self.named:
            return f"'{self.path}' has no column that says which scan a row is of, and is not read."
        lacking = [scan for scan in scans if self.find(scan) is None]
        if not lacking:
            return ""
        scan = lacking[0]
        rows = {} if self._by_image else self._rows.get(_plain(scan.subject), {})
        asked = scan.image if self._by_image or not scan.subject else f"{scan.subject} {scan.session if rows else ''}"
        there = f"{scan.subject} {next(iter(rows))}" if rows else self._like(_plain(asked.strip()))
        return (
            f"{len(lacking)} of {len(scans)} scan(s) have no row in '{self.path}', such as '{asked.strip()}' (the "
            f"table has '{there}'): what it says of them is not known."
        )

    def _like(self, name: str) -> str:
        """How the table writes the name that is most like another one."""
        names = list(self._written)[:MOST_COMPARED]
        padded = [other for other in names if other.lstrip("0") == name.lstrip("0")]
        found = padded or difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        return self._written[found[0]] if found else "none"


def _plain(name: str) -> str:
    """The name of a subject or session without ``sub-`` or ``ses-``."""
    return name.removeprefix("sub-").removeprefix("ses-")
