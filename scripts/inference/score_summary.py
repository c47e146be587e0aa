"""What ``score`` leaves at its end: a table of all scans, a picture of the most unusual, how well lesions are found."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import LoadImage, Orientation
from scripts.inference import detection
from scripts.inference.common import Common
from scripts.inference.layouts import ScanLayout
from scripts.inference.lesions import LesionCounts, read_kinds
from scripts.inference.outputs import read_row
from scripts.inference.tables import row_table
from scripts.utils import figures
from scripts.utils.files import write_csv, write_text
from scripts.utils.names import item_files, item_path, printable

logger = logging.getLogger(__name__)

MOST_UNUSUAL = 12  # scans in the picture
NAMED = 3  # in the log


class ScoreSummary:
    """Writes ``scores.csv``, ``most_unusual.png``, and with masks ``lesions.csv``,
    ``lesions_thresholds.csv`` and ``lesions.md``.

    Args:
        common: what all jobs share.
        layout: makes the layout of a result's files, see :py:class:`scripts.inference.layouts.ScanLayout`.
        scans: items of the data set, with ``mask`` where there are masks.
        read: transforms that read a scan and turn it to RAS, for the picture.
        mask_dir: the folder of the masks, see :func:`scripts.inference.lesions.read_kinds`.
        unmasked_healthy: scans without a mask count as healthy; else they are left out of what is said of lesions.
    """

    def __init__(
        self,
        common: Common,
        layout: Callable[..., ScanLayout],
        scans: Sequence[Mapping[str, Any]],
        read: Callable,
        mask_dir: str | os.PathLike | None = None,
        unmasked_healthy: bool = False,
    ) -> None:
        self.output_dir, self.figures, self.columns = common.output_dir, common.figures, common.cohort.columns
        self.items = {item_path(item): item for item in scans}
        self.layout, self.read = layout, read
        self.mask_dir, self.unmasked_healthy = mask_dir, unmasked_healthy

    def __call__(self, scans: Sequence[str]) -> None:
        """Write all, given the paths of the scans, in the order of the tables."""
        layout = self.layout("score", ".json")
        row_table(self.output_dir / "scores.csv", layout, self.columns, scans)
        rows = {scan: read_row(layout.path(scan)) for scan in scans}
        scores = {scan: row["anomaly_score"] for scan, row in rows.items()}
        highest = sorted(scores, key=scores.get, reverse=True)[:MOST_UNUSUAL]
        if rows:
            bits = np.array([row["bits_per_dim"] for row in rows.values()])
            logger.info(
                "%d scan(s): %.3f bits per dim in the mean, %.3f to %.3f. Highest anomaly_score: %s. 'scores.csv' has "
                "all.",
                *(len(bits), bits.mean(), bits.min(), bits.max()),
                ", ".join(f"{printable(layout.relative(scan))} ({scores[scan]:.1f})" for scan in highest[:NAMED]),
            )
        if self.figures:
            self._draw({scan: scores[scan] for scan in highest})
        if any("mask" in item for item in self.items.values()):
            self._find_lesions(scans)

    def _draw(self, scores: Mapping[str, float]) -> None:
        if scores:
            titles = [
                [f"{printable(Path(file).name)}, score {score:.1f}" for file in item_files(self.items[scan])]
                for scan, score in scores.items()
            ]
            figures.anomalies(self.output_dir / "most_unusual.png", self._pictures(scores), titles)

    def _pictures(self, scans: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scans and their maps, one at a time."""
        load, turn = LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)
        for scan in scans:
            image = self.read({"image": self.items[scan]["image"]})["image"]
            yield image.as_tensor(), turn(load(self.layout("anomaly").paths(self.items[scan]))).as_tensor()

    def _find_lesions(self, scans: Sequence[str]) -> None:
        layout = self.layout("lesions", ".npz")
        kinds = read_kinds(self.mask_dir, scans)
        counts = [
            LesionCounts.load(layout.relative(scan), layout.path(scan))._replace(kind=kinds[scan])
            for scan in scans
            if layout.path(scan).exists()
        ]
        unmasked = [scan for scan in counts if scan.mask == "none"]
        if unmasked:
            logger.warning(
                "%d scan(s) have no mask, such as '%s': they %s",
                len(unmasked),
                unmasked[0].name,
                "count as healthy."
                if self.unmasked_healthy
                else "are left out of what is said of lesions. Give healthy ones an empty mask, or set "
                "--unmasked_healthy True if all of them are healthy.",
            )
        if not self.unmasked_healthy:
            counts = [scan for scan in counts if scan.mask != "none"]
        if not counts:
            return
        write_csv(self.output_dir / "lesions.csv", *detection.scan_rows(counts))
        groups = detection.by_kind(counts)
        detected = detection.detect(counts, groups)
        points = detection.operating_points(counts, groups, detection.best(detected))
        write_csv(self.output_dir / "lesions_thresholds.csv", *detection.threshold_rows(points))
        parts = [detection.table(detected), *detection.sentences(detected), detection.threshold_table(points)]
        write_text(self.output_dir / "lesions.md", "\n\n".join(parts))
        for sentence in detection.sentences([d for d in detected if d.group == detected[-1].group]):
            logger.info("Lesions: %s", sentence)
