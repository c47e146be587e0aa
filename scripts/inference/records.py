"""The record that a job leaves beside its results: with which settings, and of what, they were made."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple
from scripts.utils.errors import ExistsError
from scripts.utils.files import read_json

COVARIATES = "covariates"  # in an item: what is known of the scan
SCANS = "scans"  # in a record: what the results of each scan were made of, by the first of them
STRANGERS = "unfamiliar"  # likewise: scans that the network does not know, with their unfamiliarity
ASKED = "asked"  # likewise: by which --unfamiliar results were made, as those of scans; where it is missing, warn
SAME_NAMES = ({"counterfactual", "harmonise"}, {"reconstruct", "decode"})  # jobs some of whose results are called alike


def identity(value: Any) -> Any:
    """A setting as JSON can hold it; a file is its checksum."""
    if isinstance(value, str | os.PathLike) and Path(value).is_file():
        return f"crc32 {zlib.crc32(Path(value).read_bytes()):08x}"
    return json.loads(json.dumps(value, default=str))


def sources(item: Mapping[str, Any]) -> list[str]:
    """The files that a scan's results are made of: its own, those of the second scan of a pair, and its mask."""
    others = (item.get("second", ()), item.get("mask"))
    return [str(path) for paths in (item["image"], *others) if paths is not None for path in ensure_tuple(paths)]


def made_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a scan from another one whose results would have the same name: its files, and its covariates."""
    files = [os.path.realpath(path) for path in sources(item)]
    return {"files": files} | ({COVARIATES: item[COVARIATES]} if COVARIATES in item else {})


def read_record(folder: Path, job: str, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of earlier results of a job in a folder; empty without, or where they are to be made again.

    Args:
        folder: of the results.
        job: its name.
        settings: of this run, as a record has them.
        overwrite: results in the folder give way.

    Raises:
        ExistsError: there are results of other settings, or of a job that calls its results alike.
    """
    path = folder / f"{job}.json"
    for other in sorted(set().union(*(jobs for jobs in SAME_NAMES if job in jobs)) - {job}):
        if overwrite:
            (folder / f"{other}.json").unlink(missing_ok=True)
        elif (folder / f"{other}.json").exists():
            raise ExistsError(
                f"output_dir '{folder}' holds results of '{other}', some of which are called as those of '{job}': set "
                "--output_dir to another folder, or --overwrite True to write over them."
            )
    before = read_json(path, "the record of a job") if path.exists() and not overwrite else {}
    changed = [name for name in settings if name in before and before[name] != settings[name]]
    if changed:
        raise ExistsError(
            f"output_dir '{folder}' holds results of '{job}' made with another {', '.join(changed)}: set "
            "--output_dir to another folder, or --overwrite True to make them again."
        )
    return before
