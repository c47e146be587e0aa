"""Prepare raw heads for training: bias-corrected, aligned to ICBM152, skull-stripped, on one grid.

    python -m scripts.prepare raw --output_dir prepared

See docs/preparing.md for how to read what it writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from joblib import cpu_count, delayed
from scripts.data.find import find_scans
from scripts.utils.command_line import check_integer, check_number, run
from scripts.utils.errors import InputError, NotAFolderError
from scripts.utils.files import expand, write_csv, write_text, write_whole
from scripts.utils.formats import IMAGE_SUFFIXES, without_image_suffix
from scripts.utils.parallel import run_parallel
from scripts.utils.report import write_report

# What reads scans takes 7 s to import, MONAI most of it: prepare imports it when its arguments have been understood.
if TYPE_CHECKING:
    from scripts.data.preparation import Job

logger = logging.getLogger(__name__)

SHOWN = 48  # scans on the contact sheet


class Prepared(NamedTuple):
    """What :py:func:`prepare` did.

    Attributes:
        rows: one per scan, the lines of ``alignment.csv``, those that look wrong first.
        failures: the reason for each scan that could not be prepared, by its path relative to ``dataset_dir``.
    """

    rows: list[dict[str, Any]]
    failures: dict[str, str]


def prepare(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    scan_pattern: str = "*.nii*",
    spacing: float = 1.0,
    mask_dir: str | os.PathLike | None = None,
    keep_skull: bool = False,
    bias_correction: bool = True,
    workers: int | None = None,
    like: str | os.PathLike | None = None,
    config_file: str | Sequence[str] = (),
) -> Prepared:
    """Align every scan under a folder to ICBM152, correct its bias field, strip its skull, resample it once.

    Safe to call again: results of the same file with the same settings are kept, but for those of ``like``, which are
    made again.

    Args:
        dataset_dir: the folder that holds the scans.
        output_dir: the folder for the results, which keep the scans' relative paths; outside of ``dataset_dir``.
        scan_pattern: which files are scans, as for training; one that ends in a slash matches DICOM folders.
        spacing: edge of a voxel of the results in mm, 0.5 to 8. The grid covers 196 x 232 x 188 mm.
        mask_dir: a folder of brain masks of your own, each with the relative path of its scan; the suffix may differ.
            A mask may have another grid, not another world.
        keep_skull: keep what is outside of the brain.
        bias_correction: correct the bias field (N4).
        workers: processes to use, each with one thread; as many as there are cores if not given.
        like: weights, with the population prior beside them. Scans are then only mended until their network knows
            them, in place of all of the above: turned and moved by their headers, and what is no brain taken away.
        config_file: overlays of configs/inference.json, one or a list, where these weights need them.

    Raises:
        ValueError: an argument is outside the limits above, or two scans would get the same name.
        OSError: a folder does not exist or holds no scan, or a worker process was killed; finished results are kept.
    """
    check_number("spacing (mm)", spacing, 0.5, 8)
    if workers is not None:
        check_integer("workers", workers, 1)
    if not isinstance(scan_pattern, str):
        raise InputError(f"scan_pattern is {scan_pattern!r}: name one pattern, since each head is prepared by itself.")
    scans = find_scans(dataset_dir, scan_pattern)
    root, folder = Path(expand(dataset_dir)), Path(expand(output_dir))
    inner, outer = folder.resolve(), root.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise InputError(f"output_dir '{folder}' and dataset_dir '{root}' lie within each other: give another folder.")

    names = [scan.relative_to(root).as_posix() for scan in scans]
    stems = _stems(names)
    if like is not None:
        if mask_dir is not None or keep_skull or spacing != 1.0 or not bias_correction or workers is not None:
            raise InputError(
                "like mends scans on their own grid, one by one: leave mask_dir, keep_skull, spacing, bias_correction "
                "and workers out."
            )
        return _mend(dict(zip(names, scans, strict=True)), [folder / stem for stem in stems], folder, like, config_file)

    from scripts.data.preparation import METHOD, Job, flag_alignments, read_record

    settings = {
        "method": METHOD,
        "spacing": float(spacing),
        "keep_skull": keep_skull,
        "bias_correction": bias_correction,
    }
    masks = _masks(names, mask_dir) if mask_dir is not None else [None] * len(names)
    jobs, failures = [], {}
    for name, scan, stem, mask in zip(names, scans, stems, masks, strict=True):
        if mask_dir is not None and mask is None:
            sought = without_image_suffix(name)
            failures[name] = f"mask_dir '{mask_dir}' has no mask for it, or several: '{sought}' with an image's suffix"
        else:
            jobs.append(Job(name, scan, mask, folder / stem, settings))
    folder.mkdir(parents=True, exist_ok=True)
    failures |= _run([job for job in jobs if read_record(job) is None], workers, len(jobs))
    records = {job.name: read_record(job) for job in jobs if job.name not in failures}
    changed = [name for name, record in records.items() if record is None]
    failures |= dict.fromkeys(changed, "it changed while it was prepared: run this again")
    rows = flag_alignments([record["row"] for record in records.values() if record is not None])
    _report(folder, rows, failures, {job.name: job for job in jobs}, {"dataset_dir": str(dataset_dir), **settings})
    return Prepared(rows, failures)


def _mend(
    scans: Mapping[str, Path], stems: Sequence[Path], folder: Path, ckpt: str | os.PathLike, config_file: Any
) -> Prepared:
    """See ``like``."""
    from scripts.inference.familiar import mend_scans

    folder.mkdir(parents=True, exist_ok=True)
    results = dict(zip(scans, (stem.with_name(f"{stem.name}.nii.gz") for stem in stems), strict=True))
    mended, failed = mend_scans({path: results[name] for name, path in scans.items()}, ckpt, config_file)
    failures = {name: failed[path] for name, path in scans.items() if path in failed}
    rows = [{"scan": name, **mended[path]} for name, path in scans.items() if path in mended]
    rows.sort(key=lambda row: -row["after"])
    _report_failures(folder, failures, set(results.values()))
    _report_rows(folder, "mended.csv", rows, results)
    return Prepared(rows, failures)


def _run(jobs: Sequence[Job], workers: int | None, total: int) -> dict[str, str]:
    """Prepare scans in parallel; returns the reasons of failures by name."""
    from scripts.data.preparation import prepare_scan

    if not jobs:
        logger.info("All %d scans are prepared already.", total)
        return {}
    logger.info("Preparing %d of %d scans.", len(jobs), total)
    done = run_parallel(
        [delayed(prepare_scan)(job) for job in jobs], workers or cpu_count(), "preparing", in_order=False
    )
    return {name: reason for name, reason in done if reason is not None}


def _report(
    folder: Path,
    rows: list[dict[str, Any]],
    failures: dict[str, str],
    jobs: dict[str, Job],
    settings: Mapping[str, Any],
) -> None:
    """Write the tables and figures of the whole cohort, and log what people should look at."""
    results = {name: job.result(".nii.gz") for name, job in jobs.items()}
    _report_failures(folder, failures, set(results.values()))
    if not rows:
        for name in ("alignment.csv", "contact_sheet.png", "datalist.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
        return
    suspects = _report_rows(folder, "alignment.csv", rows, results)
    _contact_sheet(folder / "contact_sheet.png", rows[:SHOWN], jobs)
    lead = f"{len(rows)} scan(s) are prepared, {suspects} of them to check."
    write_report(folder, "prepare", lead, [folder / "alignment.csv"], [folder / "contact_sheet.png"], settings)


def _report_failures(folder: Path, failures: dict[str, str], expected: set[Path]) -> None:
    """Write and log what failed, and name files that come from none of the scans."""
    if failures:
        write_csv(folder / "failed.csv", ("scan", "reason"), sorted(failures.items()))
        logger.error("%d scan(s) failed, see %s:", len(failures), folder / "failed.csv")
        for name in sorted(failures):
            logger.error("  %s: %s", name, failures[name])
    else:
        (folder / "failed.csv").unlink(missing_ok=True)
    unexpected_files = sorted(p for p in folder.rglob("*.nii.gz") if p not in expected and not p.name.startswith("."))
    if unexpected_files:
        logger.warning(
            "%d file(s) in %s come from none of the scans, such as %s: remove them if they are left over.",
            len(unexpected_files),
            folder,
            unexpected_files[0],
        )


def _report_rows(folder: Path, table: str, rows: Sequence[dict[str, Any]], results: Mapping[str, Path]) -> int:
    """Write a table and the list of good scans, log the others; returns how many these are."""
    columns = list(rows[0]) if rows else ["scan"]
    cells = ([row.get(name, "") for name in columns] for row in rows)
    rounded = ([round(v, 4) if isinstance(v, float) else v for v in row] for row in cells)
    write_csv(folder / table, columns, rounded)
    suspects = [row for row in rows if row["verdict"] != "ok"]
    for row in suspects:
        logger.warning("Check %s: %s.", row["scan"], row["reasons"])
    good = sorted(results[row["scan"]] for row in rows if row["verdict"] == "ok")
    listed = {"training": [{"image": path.relative_to(folder).as_posix()} for path in good]}
    write_text(folder / "datalist.json", json.dumps(listed, indent=1) + "\n")
    logger.info("%d scan(s) are in %s, %d of them to check, see %s.", len(rows), folder, len(suspects), table)
    return len(suspects)


def _contact_sheet(path: Path, rows: Sequence[dict[str, Any]], jobs: dict[str, Job]) -> None:
    """Draw the pictures of these scans, three per line."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    across = min(3, len(rows))
    down = math.ceil(len(rows) / across)
    figure = Figure((6.3 * across, 2.75 * down), dpi=100, facecolor="black", layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, row in zip(grid, rows, strict=False):
        axes.imshow(imread(jobs[row["scan"]].result(".png")))
        name = row["scan"] if len(row["scan"]) <= 60 else "…" + row["scan"][-59:]
        ok = row["verdict"] == "ok"
        axes.set_title(
            name if ok else f"CHECK {name}", fontsize=9, color="0.9" if ok else "tab:orange", parse_math=False
        )
    write_whole(path, lambda temporary: figure.savefig(temporary))


def _stems(names: Sequence[str]) -> list[str]:
    """Paths of the results, without suffixes; where names differ only in the suffix, it becomes part of the name."""
    often = Counter(map(without_image_suffix, names))
    stems = []
    for name in names:
        stem = without_image_suffix(name)
        stems.append(stem if often[stem] == 1 else stem + "_" + name[len(stem) :].replace(".", ""))
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(
            f"two scans would both be written as '{twice[0]}.nii.gz': rename one, or narrow --scan_pattern."
        )
    return stems


def _masks(names: Sequence[str], mask_dir: str | os.PathLike) -> list[Path | None]:
    """The mask of each scan: the same relative path, whatever the suffix; None where there is none or several."""
    root = Path(expand(mask_dir))
    if not root.is_dir():
        raise NotAFolderError(f"mask_dir '{root}' is not a folder: set --mask_dir to the folder of the masks.")
    found = []
    for name in names:
        exact = root / name
        if exact.is_file():
            found.append(exact)
            continue
        candidates = [root / (without_image_suffix(name) + suffix) for suffix in IMAGE_SUFFIXES]
        candidates = [path for path in candidates if path.is_file()]
        found.append(candidates[0] if len(candidates) == 1 else None)
    return found


def main() -> None:
    """Run the command line of this module."""
    if run("python -m scripts.prepare", prepare).failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
