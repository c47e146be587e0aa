"""The report on a data set: a table, a contact sheet, what is passed over, and what is printed of them."""

from __future__ import annotations

import random
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from joblib import delayed
from scripts.data.find import all_files
from scripts.data.quality import MIN_COHORT, VERDICTS, Scan, scan_picture
from scripts.data.scan_grid import find_alignment
from scripts.utils import figures
from scripts.utils.files import write_csv
from scripts.utils.formats import DETACHED_HEADERS, IMAGE_SUFFIXES, unzipped_content_suffix
from scripts.utils.names import printable
from scripts.utils.parallel import run_parallel

SHEET, SHEET_RANDOM = 96, 24  # scans on the contact sheet, and how many of them are a random sample at least
TABLE = 40  # rows on the terminal

# formats of headers whose voxels are in another file, by the suffix of the whole in one file
SINGLE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
# an .img has no row of its own: it holds the voxels of an .hdr, which has one
LISTED = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".img")
READ = ("participants.tsv", "sessions.tsv", "dataset_description.json")  # which are read
REASON = "passed over, since scan_pattern does not match it"


class Report(NamedTuple):
    """What :py:func:`scripts.check.check` found.

    Attributes:
        scans: a row for each scan that ``scan_pattern`` matches, in order of their paths.
        passed_over: a row for each image that it does not match.
        suffixes: how many files of each suffix it does not match, images and others.
        folder: where ``report.csv`` and ``contact_sheet.png`` are.
        passed: whether nothing is unusable and, if ``strict``, nothing suspicious.
        covariates: a line about each column of ``participants.tsv`` and the like, and what is wrong with it.
        left_out: folders of a BIDS data set that hold no scans of it.
        pictures: beside the contact sheet.
    """

    scans: list[Scan]
    passed_over: list[Scan]
    suffixes: Counter
    folder: Path
    passed: bool
    covariates: list[str]
    left_out: Sequence[str] = ()
    pictures: Sequence[Path] = ()


def write_rows(path: Path, scans: Iterable[Scan]) -> None:
    """Write a CSV file with one row per scan."""
    names = [f.name for f in fields(Scan)]
    write_csv(path, names, ([_cell(name, getattr(scan, name)) for name in names] for scan in scans))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "reasons":
        return "; ".join(value)
    if name == "foreground":
        return " ".join(f"{v:.1f}" for v in value)
    if isinstance(value, list):
        return "x".join(f"{v:.6g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def contact_sheet(path: Path, scans: list[Scan], files: list[list[Path]], spatial_dims: int, workers: int) -> None:
    """Draw the suspicious scans and some good ones; without any, remove the sheet of an earlier report."""
    shown = _choose(scans)
    jobs = [delayed(scan_picture)(files[i], spatial_dims) for i in shown]
    pictures = list(run_parallel(jobs, min(workers, 1 + len(shown) // 8), "drawing scans"))
    if pictures:
        figures.batch(path, pictures, [_caption(scans[i]) for i in shown], (0.0, 1.0))
    else:
        path.unlink(missing_ok=True)


def _choose(scans: list[Scan]) -> list[int]:
    """Which scans the contact sheet shows: the suspicious, most unlike first, then a random sample of the good."""

    def unlikeness(i: int) -> float:
        return scans[i].similarity if scans[i].similarity is not None else 1.0

    suspicious = sorted((i for i, scan in enumerate(scans) if scan.verdict == "suspicious"), key=unlikeness)
    good = [i for i, scan in enumerate(scans) if scan.verdict == "good"]
    suspicious = suspicious[: SHEET - min(SHEET_RANDOM, len(good))]
    sample = random.Random(0).sample(good, min(SHEET - len(suspicious), len(good)))
    return suspicious + sorted(sample)


def _caption(scan: Scan) -> str:
    similarity = "" if scan.similarity is None else f" ({scan.similarity:.2f})"
    name = scan.path.split(";")[0].rstrip("/").rsplit("/", 1)[-1]
    return f"{'' if scan.verdict == 'good' else scan.verdict.upper() + ' '}{name}{similarity}"


def table(scans: Iterable[Scan]) -> str:
    """What is unusable or suspicious, worst first: each path whole, below it the reasons; empty if nothing is."""
    bad = sorted((s for s in scans if s.verdict in VERDICTS[:2]), key=lambda s: VERDICTS.index(s.verdict))
    if not bad:
        return ""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    verdict_width = max(map(len, VERDICTS[:2])) + 2
    lines = []
    for scan in bad[:TABLE]:
        first, *others = scan.path.split(";")
        reasons = textwrap.wrap("; ".join(scan.reasons), width - verdict_width - 2)
        lines.append(f"{scan.verdict:<{verdict_width}}{first}")
        lines += [" " * verdict_width + path for path in others]
        lines += [" " * (verdict_width + 2) + line for line in reasons]
    if len(bad) > TABLE:
        lines.append(f"and {len(bad) - TABLE} more, see report.csv")
    return "\n".join(lines) + "\n"


def _alignment(scans: list[Scan]) -> str:
    """How training would fit scans to the network's grid, and why; and what aligns those that are not."""
    centres = [scan.foreground for scan in scans if scan.foreground is not None]
    aligned, reason = find_alignment(centres, [s.oblique for s in scans], [s.sform_code for s in scans])
    if aligned:
        return f"{reason}: training fits all of them to one box of the world."
    return (
        f"{reason}: training fits each to the box of its own file.\nWhether heads have a skull is not checked: "
        "`python -m scripts.prepare DIR --output_dir READY` removes it, and aligns them."
    )


def summary(report: Report) -> str:
    """How many scans there are of each verdict, and where the report is."""
    counts = Counter(scan.verdict for scan in report.scans)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("unusable", "suspicious", "good"))
    lines = [f"{len(report.scans)} scan(s): {verdicts}."]
    if report.suffixes:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in report.suffixes.most_common())
        images = f" {len(report.passed_over)} of the report's rows are images among them." if report.passed_over else ""
        lines.append(f"Passed over by scan_pattern: {kinds}.{images}")
    if report.left_out:
        lines.append(f"Left out, since they hold no scans of a BIDS data set: {', '.join(report.left_out)}.")
    if len(report.scans) < MIN_COHORT:
        lines.append(f"Fewer than {MIN_COHORT} scans: they were not compared with each other.")
    if counts["unusable"] < len(report.scans):
        lines.append(_alignment([scan for scan in report.scans if scan.verdict != "unusable"]))
    if report.covariates:
        lines.append("Covariates of the scans, by the tables beside them:")
        lines += [f"  {line}" for line in report.covariates]
    if counts["unusable"]:
        lines.append(
            "Training stops at scans that are unusable; with --scan_policy skip it leaves them out, and those with odd "
            "headers."
        )
    pictures = "".join(f" and '{picture.name}'" for picture in report.pictures)
    lines.append(f"Report: '{report.folder / 'report.html'}', with 'report.csv', 'contact_sheet.png'{pictures}.")
    return "\n".join(lines)


def find_unmatched(root: Path, scans: set[str]) -> tuple[Counter, list[Scan]]:
    """Look through the files that are no part of a scan.

    Args:
        root: folder of the data set.
        scans: paths of the scans relative to it.

    Returns:
        How many files there are of each suffix, and a row for each image among them.
    """
    suffixes, rows, dicom = Counter(), [], Counter()
    companions = {str(Path(name).with_suffix("")) for name in scans if name.endswith(DETACHED_HEADERS)}
    for name in all_files(root):
        path = root / name
        folder = name.rpartition("/")[0]
        if name.endswith(READ):
            continue
        if name in scans or folder in scans or str(Path(name).with_suffix("")) in companions:
            continue
        suffix = ".nii.gz" if name.lower().endswith(".nii.gz") else path.suffix.lower()
        suffixes[suffix or "no suffix"] += 1
        try:
            content = unzipped_content_suffix(path)
            empty = path.stat().st_size == 0
        except OSError as error:
            if suffix in LISTED:
                reason = "it leads to no file" if path.is_symlink() else f"it cannot be read ({error.strerror})"
                rows.append(_row(name, "suspicious", reason))
            continue
        named = content in (None, ".gz", SINGLE_FILE.get(suffix)) or name.lower().endswith(content)
        if suffix in (".dcm", ".ima") or (content == ".dcm" and suffix not in LISTED):
            dicom[folder] += 1  # a series has hundreds of files
        elif not named:
            rows.append(_row(name, "suspicious", f"it holds {content} data, which its name hides"))
        elif suffix in LISTED and empty:
            rows.append(_row(name, "suspicious", "it is empty (0 bytes)"))
        elif suffix in LISTED:
            rows.append(_row(name, "passed over", "an image by its name"))
    rows += [_row(f"{folder or '.'}/", "passed over", f"{count} DICOM file(s)") for folder, count in dicom.items()]
    return suffixes, rows


def _row(name: str, verdict: str, reason: str) -> Scan:
    return Scan(printable(name), verdict=verdict, reasons=[f"{REASON}: {reason}"])
