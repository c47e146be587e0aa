"""The table of a cohort's scans: which there are, what is known of each, and the scores that were computed so far."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.inference.tables import ScanColumns
from scripts.utils.errors import InputError
from scripts.utils.names import item_path, printable

__all__ = ["SCORES", "CohortTable"]

# of scripts.inference.scoring.Scoring: those that the table has
SCORES = (
    "bits_per_dim",
    "bits_per_dim_population",
    "anomaly_score",
    "anomaly_score_dark",
    "unfamiliarity",
    "typicality",
    "typicality_tail",
    "psnr",
    "ssim",
)
LARGEST_PAGE = 200


class CohortTable:
    """A table with a row per scan: the items of a datalist, and what is known of each."""

    def __init__(self, items: Sequence[Mapping[str, Any]], columns: ScanColumns) -> None:
        self.items = list(items)
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        for index, item in enumerate(self.items):
            scan = item_path(item)
            named = columns(scan)
            known = {name: _number(value) for name, value in columns.details(scan).items()} | named
            self._rows.append({"index": index, "error": "", **known, "image": printable(named["image"])})

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> dict[str, Any]:
        """A copy of a scan's row."""
        return dict(self._rows[self.check(index)])

    def check(self, index: Any) -> int:
        """The number of a scan; another one is refused."""
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._rows):
            raise InputError(f"There is no scan {index!r}: they have the numbers 0 to {len(self._rows) - 1}.")
        return index

    def note(self, index: int, **values: Any) -> None:
        """Add scores to a scan's row, or the ``error`` that says why it cannot be read."""
        with self._lock:
            self._rows[index] = self._rows[index] | values

    def columns(self) -> list[str]:
        """The names of the columns, as far as any scan has them."""
        with self._lock:
            scored = {name for row in self._rows for name in SCORES if name in row}
        known = [name for name in self._rows[0] if name not in ("index", "error", *SCORES)] if self._rows else []
        return ["image", *(name for name in SCORES if name in scored), *(name for name in known if name != "image")]

    def page(
        self, offset: int = 0, limit: int = 50, sort: str = "", descending: bool = False, search: str = ""
    ) -> dict[str, Any]:
        """Some rows of the sorted table.

        Args:
            offset, limit: which rows.
            sort: a column; scans without a value come last. Empty: the order of the data set.
            descending: the largest first.
            search: text that a row's path or another of its texts must hold.
        """
        wanted = search.casefold()
        with self._lock:
            rows = [row for row in self._rows if not wanted or _holds(row, wanted)]
        if sort:
            known = [row for row in rows if row.get(sort) not in (None, "")]
            # numbers before texts
            known.sort(key=lambda row: (isinstance(row[sort], str), row[sort]), reverse=descending)
            rows = known + [row for row in rows if row.get(sort) in (None, "")]
        offset, limit = max(0, offset), min(max(1, limit), LARGEST_PAGE)
        return {
            "total": len(rows),
            "scans": len(self),
            "scored": sum("bits_per_dim" in row for row in rows),
            "broken": sum(bool(row["error"]) for row in rows),
            "columns": self.columns(),
            "rows": rows[offset : offset + limit],
        }


def _holds(row: Mapping[str, Any], wanted: str) -> bool:
    return any(wanted in value.casefold() for value in row.values() if isinstance(value, str))


def _number(value: Any) -> Any:
    """A number that a table has as text; other texts as they are."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return number if math.isfinite(number) and not isinstance(value, bool) else value
