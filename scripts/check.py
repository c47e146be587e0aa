"""Read a whole data set before anyone trains on it, and say which scans cannot or should not be used.

    python -m scripts.check DIR
    python -m scripts.check DIR --scan_pattern "*_FLAIR.nii.gz" --spacing 1 --orientation RAS --strict True
    python -m scripts.check DIR --ckpt models/model.pt

Writes ``report.csv`` (one row per scan) and ``contact_sheet.png``, and prints the worst scans. Each scan is compared
with what is asked for, and with the rest of the cohort; what a scan should look like need not be specified. With
``--ckpt`` a trained network says whether it knows such scans, and why not.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import delayed
from scripts.data.datalist import list_sides
from scripts.data.find import bids_others
from scripts.utils.command_line import check_integer, run
from scripts.utils.errors import InputError, root_cause
from scripts.utils.files import as_folder, expand
from scripts.utils.names import item_files, printable
from scripts.utils.parallel import choose_workers, run_parallel

# What reads scans takes 6 s to import, MONAI most of it: check imports it when its arguments have been understood.
if TYPE_CHECKING:
    from scripts.data.check_report import Report
    from scripts.data.quality import Inspection, Scan
    from scripts.data.transforms import CheckScand
    from scripts.inference.familiar import Examiner

SHOWN = 16  # of the scans that a network does not know


def check(
    dataset_dir: str | os.PathLike,
    scan_pattern: str | Sequence[str] = "*.nii*",
    output_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    spacing: float | Sequence[float] | None = None,
    field_of_view: float | Sequence[float] | None = None,
    orientation: str | None = None,
    channels: int | None = None,
    spatial_dims: int = 3,
    strict: bool = False,
    ckpt: str | os.PathLike | None = None,
    config_file: str | Sequence[str] = (),
    run_dir: str | os.PathLike | None = None,
) -> Report:
    """Read every scan of a data set; write ``report.csv`` and ``contact_sheet.png``.

    Args:
        dataset_dir: the folder that holds the scans, or a datalist. Nothing in it is changed.
        scan_pattern: a glob on the files' names, or a list of them, one per channel; see
            :py:func:`scripts.data.find.find_scans`.
        output_dir: folder for the report, created if needed; ``check`` in the current folder if not given.
        workers: processes to use; as many as there are cores, fewer for few scans, if not given.
        spacing: the voxel size in mm that is expected along each axis (right, anterior, superior), or one for all; what
            most of the cohort has if not given.
        field_of_view: the extent in mm that is expected, likewise.
        orientation: the stored axes that are expected, such as ``RAS``; what most of the cohort has if not given.
        channels: how many channels a scan must have; as many as there are patterns, or files of a datalist's first
            scan, if not given.
        spatial_dims: how many spatial axes a scan must have, 2 or 3.
        strict: whether something suspicious is a failure too.
        ckpt: weights, with the population prior beside them, which are asked about each scan; None: none are.
        config_file: overlays of configs/inference.json, one or a list, where the weights need them.
        run_dir: folder of a run whose weights are asked, with its network and preprocessing.

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist, or nothing in it matches.
        NotADirectoryError: when ``dataset_dir`` or ``output_dir`` is a file.
        ValueError: when an argument makes no sense.
        OSError: when a worker process was killed.
    """
    patterns = 1 if isinstance(scan_pattern, str) else len(scan_pattern)
    _check_arguments(scan_pattern, workers, spacing, field_of_view, orientation, channels or patterns, spatial_dims)
    place = Path(expand(dataset_dir))
    sides, _, root = list_sides(place, scan_pattern)
    items = [item for side in sides.values() for item in side]
    files = [list(map(Path, item_files(item))) for item in items]
    channels = channels or len(files[0])
    output = _output_folder(output_dir, place)
    examiner = None
    if ckpt is not None or run_dir is not None:  # first of all: of a large cohort reading takes long
        from scripts.inference.familiar import Examiner

        examiner = Examiner.of(ckpt, config_file, run_dir)

    from scripts.data.check_report import Report, contact_sheet, find_unmatched, write_rows
    from scripts.data.quality import MIN_COHORT, compare_geometry
    from scripts.data.transforms import CheckScand
    from scripts.utils.report import ShownTable, write_report

    names = [[Path(os.path.relpath(path, root)).as_posix() for path in paths] for paths in files]
    listed = {name for scan in names for name in scan}
    suffixes, passed_over = find_unmatched(root, listed) if place.is_dir() else (Counter(), [])
    workers = workers or choose_workers(len(files))
    checks = CheckScand("image", channels, spatial_dims, spacing, field_of_view, orientation)
    scans = _inspect(files, names, [item["subject"] for item in items], checks, workers)
    usable = [(scan, paths) for scan, paths in zip(scans, files, strict=True) if scan.verdict != "unusable"]
    if len(usable) >= MIN_COHORT:
        compare_geometry([scan for scan, _ in usable], spacing, field_of_view, orientation)
    pictures = [] if examiner is None else _ask_network(examiner, usable, output / "unfamiliar.png")

    rows = [*scans, *passed_over]
    write_rows(output / "report.csv", rows)
    contact_sheet(output / "contact_sheet.png", scans, files, spatial_dims, workers)
    lead = f"{len(scans)} scan(s), {len(usable)} of them usable."
    sheets = [output / "contact_sheet.png", *pictures]
    table = ShownTable(output / "report.csv", ("verdict", "reasons", "familiar", "reason", "gain"))
    write_report(output, "check", lead, [table], sheets, {"dataset_dir": str(dataset_dir)})
    bad = {"unusable", "suspicious"} if strict else {"unusable"}
    covariates = _covariates(items, place)
    passed = not any(row.verdict in bad for row in rows)
    beside = list(root.iterdir()) if place.is_dir() else []
    left_out = sorted(bids_others(*([path.name for path in beside if path.is_dir() == kind] for kind in (True, False))))
    return Report(scans, passed_over, suffixes, output, passed, covariates, left_out, pictures)


def _inspect(
    files: Sequence[list[Path]], names: Sequence[list[str]], subjects: Sequence[str], checks: CheckScand, workers: int
) -> list[Scan]:
    """The rows of all scans, each read once, and how those that are usable look beside each other."""
    from scripts.data.quality import MIN_COHORT, THUMBNAIL, compare_looks, inspect_scan

    shape = (len(files), checks.channels, *(THUMBNAIL,) * checks.spatial_dims)
    thumbnails = np.empty(shape, np.float16)
    jobs = [delayed(inspect_scan)(scan, checks) for scan in files]
    scans = _note(run_parallel(jobs, workers, "reading scans"), names, subjects, thumbnails)
    usable = [i for i, scan in enumerate(scans) if scan.verdict != "unusable"]
    if len(usable) >= MIN_COHORT:
        compare_looks([scans[i] for i in usable], thumbnails, usable)
    return scans


def _ask_network(examiner: Examiner, scans: Sequence[tuple[Scan, list[Path]]], picture: Path) -> list[Path]:
    """Note of each scan whether a network knows such ones, and why not; draw the others."""
    from scripts.utils.plots import unfamiliar
    from tqdm import tqdm

    asked, findings, strangers = [], [], []
    picture.unlink(missing_ok=True)
    for scan, files in tqdm(scans, "asking the network", unit="scan", file=sys.stderr):
        try:
            found = examiner.examine(examiner.load([str(path) for path in files]))
        except Exception as error:  # whatever a scan holds, the others are asked about
            scan.flag("suspicious", f"the network could not be asked about it: {root_cause(error)}")
            continue
        asked.append(scan)
        findings.append(found)
    for scan, found in zip(asked, examiner.compared(findings), strict=True):
        scan.familiar, scan.reason, scan.gain = "yes" if found.familiar else "no", found.reason, found.gain
        if not found.familiar:
            scan.flag("suspicious", found.sentence())
            strangers.append((found.distance / found.limit, f"{scan.path}: {found.reason}", found))
    strangers.sort(key=lambda stranger: -stranger[0])
    shown = [(title, (found.seen, found.undone), found.gains) for _, title, found in strangers[:SHOWN]]
    return [unfamiliar(picture, examiner.mean_scan, shown)] if shown else []


def _covariates(items: Sequence[Mapping[str, Any]], dataset_dir: Path) -> list[str]:
    """What tables such as ``participants.tsv`` say of the scans, a line per covariate, and what is wrong in them."""
    from scripts.data.covariate_tables import Covariates

    try:
        known = Covariates(items, dataset_dir)
    except InputError as error:
        return [str(error)]
    return [*known.describe(), *known.without_rows()]


def _note(
    inspections: Iterable[Inspection], names: Sequence[list[str]], subjects: Sequence[str], thumbnails: np.ndarray
) -> list[Scan]:
    """The rows of scans as they are read, with their names; what has the same voxels as an earlier one is flagged."""
    scans: list[Scan] = []
    seen: dict[bytes, Scan] = {}
    for i, (scan, digest, thumbnail) in enumerate(inspections):
        scan.path, scan.subject = printable(";".join(names[i])), printable(subjects[i])
        if thumbnail is not None:
            thumbnails[i] = thumbnail
            _flag_duplicate(scan, seen.setdefault(digest, scan))
        scans.append(scan)
    return scans


def _flag_duplicate(scan: Scan, first: Scan) -> None:
    if first is not scan:
        scan.duplicate_of = first.path
        other = "" if scan.subject == first.subject else ", which is named as another subject's"
        scan.flag("suspicious", f"it has the same voxels as '{first.path}'{other}")


def _check_arguments(
    scan_pattern: str | Sequence[str],
    workers: Any,
    spacing: Any,
    field_of_view: Any,
    orientation: Any,
    channels: Any,
    spatial_dims: Any,
) -> None:
    if workers is not None:
        check_integer("workers", workers, 1)
    check_integer("channels", channels, 1)
    if spatial_dims not in (2, 3):
        raise InputError(f"spatial_dims is {spatial_dims!r}, but must be 2 or 3.")
    for name, value in (("spacing", spacing), ("field_of_view", field_of_view)):
        sizes = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (
            (isinstance(value, numbers.Real) or len(sizes) == spatial_dims)
            and all(isinstance(s, numbers.Real) and not isinstance(s, bool) and 0 < s < math.inf for s in sizes)
        ):
            raise InputError(f"{name} is {value!r}, but must be a size in mm, or {spatial_dims} of them.")
    if orientation is not None:
        letters = str(orientation)
        pairs = [pair for letter in letters for pair in ("LR", "PA", "IS") if letter in pair]
        if not len(letters) == len(pairs) == len(set(pairs)) == spatial_dims:
            raise InputError(f"orientation is {orientation!r}, but must name {spatial_dims} axes, such as 'RAS'.")
    if not isinstance(scan_pattern, str) and len(scan_pattern) != channels:
        raise InputError(f"scan_pattern gives {len(scan_pattern)} channels, but channels is {channels}: leave it out.")


def _output_folder(output_dir: str | os.PathLike | None, root: Path) -> Path:
    output = as_folder("output_dir", "check" if output_dir is None else output_dir)
    if output_dir is None and output.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"The report would go to '{output}', which lies in dataset_dir '{root}': "
            "set --output_dir to another folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    return output


def main() -> None:
    """Run the command line of this module."""
    try:
        report = run("python -m scripts.check", check)
    except KeyboardInterrupt:
        sys.exit("Stopped; no report was written.")
    from scripts.data.check_report import summary, table

    print(table([*report.scans, *report.passed_over]))
    print(summary(report))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
