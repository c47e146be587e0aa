"""The job ``deviation`` with a certificate: findings of healthy people, by which those of the scans are judged."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose
from scipy import ndimage
from scripts.data.covariates import CovariateCoding
from scripts.inference.certificate import FAMILIES, Certificate, discovery_level
from scripts.inference.common import Cohort, Common
from scripts.inference.covariates import Deviation, stack_features
from scripts.inference.engine import ScanEvaluator
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import SaveJson, read_rows
from scripts.inference.privacy import one_per_subject
from scripts.inference.records import identity
from scripts.layers.output import foreground
from scripts.networks import VDVAE
from scripts.utils import distributed
from scripts.utils.errors import InputError
from scripts.utils.files import read_json, write_csv, write_text
from scripts.utils.formats import save_nifti
from scripts.utils.names import UNUSABLE, item_path

logger = logging.getLogger(__name__)

FORMING = 2.5  # a cluster's voxels deviate by more standard deviations
MOST_CLUSTERS = 20  # of a scan in the table, the largest ones; all count
FORMAT = 1  # of calibration.json
CALIBRATION = "calibration.json"
TABLES = ("certificate.json", "certificate.csv", "findings.csv")


def find_clusters(z: np.ndarray, inside: np.ndarray, affine: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Clusters of voxels that deviate in one direction, the one of the largest mass first.

    Of z, ``[channels, *spatial]``, where there is brain. Each has ``direction``, ``mass`` (the sum over its voxels of
    how far z exceeds the threshold), ``peak``, ``size_ml`` and where the peak is in mm; beside them the cluster's
    number in each voxel from 1, 0 for none.
    """
    structure = np.zeros((3,) * z.ndim)
    structure[1] = 1  # neighbours by a corner, of one channel
    volume = abs(np.linalg.det(affine[:3, :3])) / 1000
    found, numbers = [], np.zeros(z.shape, np.int32)
    for direction, values in (("brighter", z), ("darker", -z)):
        labels, count = ndimage.label((values > FORMING) & inside, structure)
        numbers[labels > 0] = labels[labels > 0] + len(found)
        places = range(1, count + 1)
        masses, sizes = (ndimage.sum_labels(v, labels, places) for v in (values - FORMING, np.ones_like(z)))
        peaks = ndimage.maximum_position(values, labels, places)
        for mass, size, peak in zip(masses, sizes, peaks, strict=True):
            world = affine @ [*peak[1:], *[0] * (4 - z.ndim), 1]
            where = {f"{axis}_mm": round(float(mm), 1) for axis, mm in zip("xyz", world, strict=False)}
            cluster = {
                "direction": direction,
                "mass": float(mass),
                "peak": float(values[peak]),
                "label": len(found) + 1,
            }
            found.append({**cluster, "size_ml": round(float(size * volume), 3), **where})
    return sorted(found, key=lambda cluster: -cluster["mass"]), numbers


def _add_clusters(network: VDVAE, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Add ``clusters`` and ``cluster_numbers`` of a deviation on the network's grid, see :func:`find_clusters`."""
    z, expected = (torch.as_tensor(data[key]) for key in ("deviation", "expected"))
    # where no brain is expected, the spread is next to nothing, and edges would outweigh all else
    inside = foreground(expected, network).numpy()
    clusters, numbers = find_clusters(z.numpy(), inside, np.asarray(data["image"].affine, float))
    return {**data, "clusters": clusters, "cluster_numbers": numbers}


def _largest_of(data: Mapping[Hashable, Any]) -> dict[str, Any]:
    """What is largest in a person of the calibration, by which findings in others are judged."""
    clusters = data["clusters"]
    largest = {"cluster": max((c["mass"] for c in clusters), default=0.0)}
    largest["peak"] = max((c["peak"] for c in clusters), default=0.0)
    if "regions" in data:
        largest["region"] = float(data["regions"][:, 3].abs().max())
    return {"largest": largest, "covariates": data["covariates"]}


def judge(certificate: Certificate, regions: Sequence[str], data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Add the findings of a scan with their p values, and a map of those clusters that are significant.

    ``judged`` has ``group``, ``smallest_p``, which is the least that it could have, and ``findings``; ``significant``
    is -log10 p in each voxel of a cluster with p at most the error rate, below 0 where it is darker, 0 elsewhere.
    """
    group, weight = certificate.group(data["covariates"]), certificate.weight(data["covariates"])
    p_of = partial(certificate.p, group, weight=weight)
    findings, shown = [], np.zeros(data["cluster_numbers"].shape, np.float32)
    for cluster in data["clusters"]:
        p = p_of("cluster", cluster["mass"])
        if p <= certificate.error_rate:
            sign = 1 if cluster["direction"] == "brighter" else -1
            shown[data["cluster_numbers"] == cluster["label"]] = sign * -math.log10(p)
        if len(findings) < MOST_CLUSTERS or p <= certificate.error_rate:
            row = {"kind": "cluster", "name": "", **{k: v for k, v in cluster.items() if k != "label"}}
            findings.append({**row, "p": p, "p_peak": p_of("peak", cluster["peak"])})
    for name, (*_, z) in zip(regions, torch.as_tensor(data.get("regions", [])).tolist(), strict=True):
        row = {"kind": "region", "name": name, "direction": "brighter" if z > 0 else "darker", "peak": abs(z)}
        findings.append({**row, "p": p_of("region", abs(z))})
    judged = {"group": group, "smallest_p": p_of("cluster", math.inf), "findings": findings}
    return {**data, "judged": judged, "significant": torch.from_numpy(shown)}


def _read_calibration(
    path: str | os.PathLike, settings: Mapping[str, Any], coding: CovariateCoding, atlas: bool
) -> list[dict[str, Any]] | None:
    """The people of a ``calibration.json``, of which these settings must be; None where the path is of scans."""
    if not Path(path).is_file():
        return None
    content = read_json(path, "a datalist or the calibration of another run")
    if "calibration" not in content:
        return None
    try:
        if content["calibration"] != FORMAT:
            raise ValueError
        before, kinds = content["settings"], ("cluster", "peak", *(["region"] if atlas else []))
        changed = [name for name in settings if before.get(name) != settings[name]]
        people = (
            []
            if changed
            else [
                {
                    "largest": {kind: float(person["largest"][kind]) for kind in kinds},
                    "covariates": coding.parse(person["covariates"]),
                }
                for person in content["people"]
            ]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"calibration: '{path}' is damaged, or of another version: name the folder of healthy people instead."
        ) from error
    if changed:
        raise InputError(
            f"calibration: '{path}' was made with another {', '.join(changed)} than these scans are judged with: use "
            "the same, or name the folder of healthy people instead, to calibrate anew."
        )
    return people


def _size(path: str) -> int:
    return Path(path).stat().st_size if Path(path).is_file() else 0  # of a DICOM folder


def _same(path: str, other: str) -> bool:
    """Whether two scans of one size are the same, or copies of each other."""
    import filecmp  # of the standard library: a command that is refused starts without it

    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return Path(path).is_file() and Path(other).is_file() and filecmp.cmp(path, other, shallow=False)


def people_to_calibrate(cohort: Cohort, given: Cohort, seed: int) -> list[dict[str, Any]]:
    """One scan of each person of a calibration, chosen at random: several of one would count as several people.

    Refused is one of the ``given`` scans, which are to be judged, or a copy of it, and one of a person who was trained
    on.
    """
    judged = defaultdict(list)
    for item in given.items:
        judged[_size(item_path(item))].append(item_path(item))
    for item in cohort.items:
        path = item_path(item)
        if any(_same(path, other) for other in judged[_size(path)]):
            raise InputError(f"calibration: '{path}' is one of the scans, too: keep healthy people apart for it.")
        if given.training_run.knows(item) in ("yes", "subject"):
            raise InputError(
                f"calibration: '{path}' is of a person who was trained on, and looks more usual than others do: name "
                "people who were not."
            )
    named = {item.get("subject") for item in given.items} & {item.get("subject") for item in cohort.items} - {None}
    if named:
        logger.warning(
            "%d people of the calibration are called as people of the scans are, such as '%s': should they be the "
            "same, keep them apart.",
            *(len(named), min(named)),
        )
    people = [cohort.items[place] for place in one_per_subject(cohort.items, len(cohort.items), seed)]
    if len(people) < len(cohort.items):
        logger.warning(
            "calibration: %d scans are of %d people, of each of whom one counts.", len(cohort.items), len(people)
        )
    return people


def certify(
    common: Common,
    inferer: Deviation,
    regions: Sequence[str],
    settings: Mapping[str, Any],
    error_rate: float | None = None,
    calibration: str | os.PathLike | None = None,
    **promised: Any,
) -> CertifiedEvaluator | None:
    """What says which deviations are significant; None where neither error rate nor calibration is given.

    Args:
        inferer, regions, settings: of the job ``deviation``.
        error_rate: see :class:`Certificate`.
        calibration: a folder or a datalist of healthy people to whom the prior was not fitted, or the
            ``calibration.json`` of another run.
        promised: ``correction``, ``groups`` and ``weighted``, see :class:`Certificate`.

    Raises:
        InputError: one of the two is missing, or makes no sense.
    """
    if error_rate is None and calibration is None:
        return None
    if error_rate is None or calibration is None:
        raise InputError(
            "A certificate needs --error_rate, such as 0.05, and --calibration, the folder of healthy people to whom "
            "the prior was not fitted."
        )
    certificate = Certificate(common.prior.coding, error_rate, **promised)
    return CertifiedEvaluator(common, inferer, certificate, calibration, regions, settings)


def _certified_layouts(common: Common) -> list[ScanLayout]:
    """Of what a certificate adds to each scan's results: its findings, and the map of the significant clusters."""
    layout = common.layout(common.cohort.root)
    return [layout("findings", ".json"), layout("significant")]


def remove_certified(common: Common, scans: Sequence[str]) -> None:
    """Remove what an earlier run with a certificate left beside results that were made without one."""
    left = (layout.paths({"image": scan}) for layout in _certified_layouts(common) for scan in scans)
    for path in (*itertools.chain(*left), *(common.output_dir / name for name in TABLES)):
        path.unlink(missing_ok=True)


class CertifiedEvaluator:
    """The job ``deviation`` with a certificate: first the calibration's people, then the scans; see :func:`certify`."""

    def __init__(
        self,
        common: Common,
        inferer: Deviation,
        certificate: Certificate,
        calibration: str | os.PathLike,
        regions: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        given, self.certificate, self.regions = common.cohort, certificate, regions
        known = {**common.settings(), **settings, "forming_threshold": FORMING}
        self.settings = {name: identity(value) for name, value in known.items()}
        self.known = _read_calibration(calibration, self.settings, common.prior.coding, bool(regions))
        if self.known is None:
            self._compute_people(common, inferer, calibration, settings)
        else:
            certificate.refuse_few(len(self.known))
        self.layouts = _certified_layouts(common)
        self.findings, self.maps = self.layouts
        self.columns, self.output_dir = given.columns, common.output_dir
        self.scans: ScanEvaluator | None = None
        self.steps = [
            partial(_add_clusters, common.network),
            partial(judge, certificate, regions),
            SaveJson(self.findings, itemgetter("judged")),
        ]

    def _compute_people(
        self, common: Common, inferer: Deviation, calibration: str | os.PathLike, settings: Mapping[str, Any]
    ) -> None:
        given = common.cohort
        cohort = Cohort(calibration, given.pattern, given.training_run, given.covariates_file, given.unseen)
        _ = cohort.items, given.items  # all processes ask, before rank 0 chooses among them
        cohort = cohort.of(distributed.from_rank_zero(people_to_calibrate, cohort, given, common.seed))
        self.certificate.refuse_few(len(cohort.items))
        aside = common.replace(
            cohort=cohort, output_dir=common.output_dir / "calibration", figures=False, describe=None
        )
        self.largest = aside.layout(cohort.root)("largest", ".json")
        self.people = ScanEvaluator(
            aside,
            "calibration",
            Dataset(cohort.with_covariates(common.prior), common.preprocessing),
            inferer,
            [partial(_add_clusters, common.network), SaveJson(self.largest, _largest_of)],
            [self.largest],
            settings,
            arguments=lambda items: stack_features(common.prior, items),
        )

    def of(self, scans: ScanEvaluator) -> CertifiedEvaluator:
        """With the evaluator of the scans, which has :attr:`steps`, :attr:`layouts` and :meth:`summary`."""
        self.scans = scans
        return self

    def run(self) -> None:
        """Compute what is missing of both."""
        self.calibrate()
        self.scans.settings |= self.certificate.settings()
        self.scans.run()

    def calibrate(self) -> None:
        """Have the people of the calibration, and leave them in ``calibration.json``, for other runs."""
        people = self.known
        if people is None:
            self.people.run()
            people = [row for _, row in read_rows(self.largest, map(item_path, self.people.dataset.data))]
            if idist.get_rank() == 0:
                content = {"calibration": FORMAT, "settings": self.settings, "people": people}
                write_text(self.output_dir / CALIBRATION, json.dumps(content) + "\n")
        scans = [item["covariates"] for item in self.scans.dataset.data if UNUSABLE not in item]
        self.certificate.take(people, scans)

    def judge(self, data: Mapping[Hashable, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """A scan that was computed, without files: what is said of its clusters, and the map, see :func:`judge`."""
        found = Compose(self.steps[:2])(data)
        return {**found["judged"], "guarantee": self.certificate.sentence()}, found["significant"]

    def summary(self, tables: Callable[[Sequence[str]], object], scans: Sequence[str]) -> None:
        """Write ``findings.csv``, ``certificate.csv`` and ``certificate.json``, and by ``tables`` those of the
        deviation; decide what is a discovery.
        """
        tables(scans)
        read = dict(read_rows(self.findings, scans))
        found = {scan: content["findings"] for scan, content in read.items()}
        level = dict.fromkeys(FAMILIES, self.certificate.error_rate)
        if self.certificate.correction == "discovery":
            for kind in FAMILIES:
                smallest = [min((f["p"] for f in rows if f["kind"] == kind), default=1.0) for rows in found.values()]
                level[kind] = discovery_level(smallest, self.certificate.error_rate)
            self._keep_discoveries(scans, level["cluster"])
            self._warn_of_lost(level["cluster"])
        for rows in found.values():
            for row in rows:
                row["significant"] = "yes" if row["p"] <= level[row["kind"]] else "no"
        content = self.certificate.content(read) | {"forming_threshold": FORMING, "level": level}
        write_text(self.output_dir / "certificate.json", json.dumps(content, indent=2) + "\n")
        names = ("people", "scans", "smallest_p", "expected", "observed")
        rows = [[group, *(_shown(row[name]) for name in names)] for group, row in content["groups"].items()]
        write_csv(self.output_dir / "certificate.csv", ("group", *names), rows)
        self.columns.write(self.output_dir / "findings.csv", self._rows(read))
        legend = f"{self.certificate.sentence()} {self.scans.report.legend}"
        self.scans.report = self.scans.report._replace(legend=legend)
        logger.info(
            "%d calibration people: of %d scan(s), if all were healthy, at most %.3g would have a significant cluster; "
            "%d have. No p can be below %.3g. 'findings.csv', 'certificate.json'.",
            *(content["people"], len(scans), content["expected"], content["observed"]["cluster"]),
            content["smallest_p"],
        )

    def _rows(self, read: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        texts = ("kind", "name", "direction")
        numbers = ("size_ml", "mass", "peak", "x_mm", "y_mm", "z_mm", "p", "p_peak")
        for scan, content in read.items():
            for row in content["findings"]:
                said = {name: row[name] for name in texts} | {"group": content["group"]}
                said |= {name: f"{row[name]:.5g}" if name in row else "" for name in numbers}
                yield scan, said | {"significant": row["significant"]}

    def _warn_of_lost(self, level: float) -> None:
        """Say so where maps of an earlier run may lack what is a discovery among these scans."""
        path = self.output_dir / "certificate.json"
        before = read_json(path, "a certificate").get("level", {}).get("cluster", level) if path.exists() else level
        if before < level:
            logger.warning(
                "With fewer scans less was a discovery (p up to %.3g, now %.3g): maps of before may lack clusters that "
                "'findings.csv' calls significant. --overwrite True makes them again.",
                *(before, level),
            )

    def _keep_discoveries(self, scans: Sequence[str], level: float) -> None:
        """Take what is no discovery out of the maps."""
        least = -math.log10(level) - 1e-4 if level else math.inf
        for scan in scans:
            for path in self.maps.paths({"image": scan}):
                image = nib.load(path)
                values = np.asarray(image.dataobj, dtype=np.float32)
                if (values != 0).any() and (np.abs(values[values != 0]) < least).any():
                    kept = torch.from_numpy(np.where(np.abs(values) >= least, values, 0)[None])
                    save_nifti(path, kept, torch.from_numpy(image.affine), int(image.header["sform_code"]))


def _shown(number: float) -> str:
    """A number of people or of scans in full, a share or an expectation to four digits."""
    return str(number) if isinstance(number, int) else f"{number:.4g}"
