"""Which deviations are significant: conformal p values from healthy people who were kept apart, and a certificate.

A p value is the share of calibration people, the scan itself counted among them, whose largest finding is at least as
large (Vovk et al. 2005). If a healthy scan is exchangeable with the people of its group, whatever the model, the chance
that any of its findings has p at most ``error_rate`` is at most that (Mondrian conformal prediction, of the maximum
over the scan: family-wise). Over scans the false discovery rate is bounded likewise (Bates et al. 2023).
"""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Transform
from scipy import ndimage
from scripts.data.covariates import Categorical, CovariateCoding, Value
from scripts.inference.common import Cohort, Common
from scripts.inference.covariates import Deviation, stack_features
from scripts.inference.engine import ScanEvaluator
from scripts.inference.layouts import ScanLayout
from scripts.layers.output import foreground
from scripts.networks import VDVAE
from scripts.utils.command_line import check_number
from scripts.utils.errors import InputError
from scripts.utils.files import write_csv, write_text
from scripts.utils.formats import save_nifti
from scripts.utils.names import image_path, item_path

logger = logging.getLogger(__name__)

FORMING = 2.5  # a cluster's voxels deviate by more standard deviations
MOST_CLUSTERS = 20  # of a scan in the table, the largest ones; all count
CORRECTIONS = ("family", "discovery")
SITE = "site"
FAMILIES = ("cluster", "region")


def find_clusters(z: np.ndarray, inside: np.ndarray, affine: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Clusters of voxels that deviate in one direction, the one of the largest mass first.

    Args:
        z: ``[channels, *spatial]``.
        inside: where there is brain, likewise.
        affine: of the grid.

    Returns:
        of each cluster ``direction``, ``mass`` (the sum over its voxels of how far z exceeds the threshold), ``peak``,
        ``size_ml`` and where the peak is in mm; and the cluster's number in each voxel from 1, 0 for none.
    """
    structure = np.zeros((3,) * z.ndim)
    structure[1] = 1  # neighbours by a corner, of one channel
    volume = abs(np.linalg.det(affine[:3, :3])) / 1000
    found, numbers = [], np.zeros(z.shape, np.int32)
    for direction, values in (("brighter", z), ("darker", -z)):
        labels, count = ndimage.label((values > FORMING) & inside, structure)
        places = range(1, count + 1)
        masses, sizes = (ndimage.sum_labels(v, labels, places) for v in (values - FORMING, np.ones_like(z)))
        peaks = ndimage.maximum_position(values, labels, places)
        for place, mass, size, peak in zip(places, masses, sizes, peaks, strict=True):
            numbers[labels == place] = len(found) + 1
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


class FindClusters(Transform):
    """Add ``clusters`` and ``cluster_numbers``, see :func:`find_clusters`, to a scan's deviation on the network's grid.

    Args:
        network: says what scans are scaled to.
    """

    def __init__(self, network: VDVAE) -> None:
        self.network = network

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        z, scan, expected = (torch.as_tensor(data[k]) for k in ("deviation", "image", "expected"))
        inside = (foreground(scan, self.network) | foreground(expected, self.network)).numpy()
        clusters, numbers = find_clusters(z.numpy(), inside, np.asarray(data["image"].affine, float))
        return {**data, "clusters": clusters, "cluster_numbers": numbers}


class SaveLargest(Transform):
    """Write what is largest in a person of the calibration, by which findings in others are judged."""

    def __init__(self, layout: ScanLayout) -> None:
        self.layout = layout

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        clusters = data["clusters"]
        largest = {"cluster": max((c["mass"] for c in clusters), default=0.0)}
        largest["peak"] = max((c["peak"] for c in clusters), default=0.0)
        if "regions" in data:
            largest["region"] = float(torch.as_tensor(data["regions"])[:, 3].abs().max())
        content = {"largest": largest, "covariates": data["covariates"]}
        write_text(self.layout.filename(image_path(data["image"])), json.dumps(content) + "\n")
        return data


class Certificate:
    """P values by calibration people, and what is guaranteed of them.

    Args:
        coding: of the prior's covariates.
        error_rate: above 0 and below 1.
        correction: ``"family"``: of at most that share of healthy scans anything is significant. ``"discovery"``: at
            most that share of the scans with anything significant are healthy, in the mean.
        groups: names of the covariates by which people are compared with their like; None: the site and the first
            continuous one, as far as the prior has them. A continuous one has three bands, between the inner knots of
            its spline.

    Attributes:
        people: what is largest in each person of the calibration, by the names of the groups that it belongs to.
    """

    def __init__(
        self, coding: CovariateCoding, error_rate: float, correction: str = "family", groups: Any = None
    ) -> None:
        check_number("error_rate", error_rate, 1e-6, 0.5)
        if correction not in CORRECTIONS:
            raise InputError(f"correction is {correction!r}: set --correction to {' or '.join(CORRECTIONS)}.")
        if groups is None:
            continuous = [name for name, variable in coding.variables.items() if not isinstance(variable, Categorical)]
            groups = [*([SITE] if SITE in coding.variables else []), *continuous[:1]]
        unknown = [name for name in groups if name not in coding.variables]
        if isinstance(groups, str) or unknown:
            raise InputError(f"groups is {groups!r}: give a list of some of the prior's {list(coding.variables)}.")
        self.coding, self.error_rate, self.correction, self.names = coding, error_rate, correction, list(groups)
        self.least = math.ceil(1 / error_rate - 1e-9) - 1  # people without whom nothing can be significant
        self.people: dict[str, list[Mapping[str, float]]] = {}

    def read(self, files: Sequence[Path]) -> None:
        """Take in the people of the calibration.

        Raises:
            InputError: they are too few for anything to be significant.
        """
        found = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]
        self.refuse_few(len(found))
        people = defaultdict(list)
        for person in found:
            for name in self.groups_of(person["covariates"]):
                people[name].append(person["largest"])
        self.people = dict(people)

    def refuse_few(self, people: int) -> None:
        if people < self.least:
            raise InputError(
                f"calibration: of {people} people the smallest p is {1 / (people + 1):.3g}; for an error_rate of "
                f"{self.error_rate:g} there must be {self.least} or more."
            )

    def groups_of(self, values: Mapping[str, Value]) -> list[str]:
        """The groups that a person belongs to, the narrowest first."""
        words = {name: self._word(name, values.get(name)) for name in self.names}
        categorical = [w for n, w in words.items() if isinstance(self.coding.variables[n], Categorical)]
        return list(dict.fromkeys([", ".join(words.values()) or "all", ", ".join(categorical) or "all", "all"]))

    def _word(self, name: str, value: Value) -> str:
        variable = self.coding.variables[name]
        if value is None or isinstance(variable, Categorical):
            return f"{name} {'n/a' if value is None else value}"
        low, high = (variable.knots[1], variable.knots[-2]) if variable.knots else (variable.mean,) * 2
        if value < low:
            return f"{name} below {low:.4g}"
        return f"{name} {low:.4g} to {high:.4g}" if value < high else f"{name} from {high:.4g}"

    def group(self, values: Mapping[str, Value]) -> str:
        """The narrowest group of a scan in which there are enough people of the calibration."""
        return next((g for g in self.groups_of(values) if len(self.people.get(g, ())) >= self.least), "all")

    def p(self, group: str, kind: str, size: float) -> float:
        """The share of a group's people, the scan among them, whose largest finding is as large."""
        people = self.people[group]
        return (1 + sum(person[kind] >= size for person in people)) / (1 + len(people))

    def digest(self) -> str:
        """What tells this calibration from others."""
        return f"{zlib.crc32(json.dumps(self.people, sort_keys=True).encode()):08x}"

    def content(self, scans: Mapping[str, Sequence[Mapping[str, Any]]], groups: Mapping[str, str]) -> dict[str, Any]:
        """What the certificate says.

        Args:
            scans: the findings of each scan.
            groups: of each scan.
        """
        used = Counter(groups.values())
        rows = {}
        for group, count in sorted(used.items()):
            people = len(self.people[group])
            share = math.floor(self.error_rate * (people + 1) + 1e-9) / (people + 1)
            rows[group] = {"people": people, "scans": count, "smallest_p": 1 / (people + 1), "expected": share * count}
            rows[group]["observed"] = sum(
                any(f["significant"] == "yes" for f in scans[scan]) for scan, name in groups.items() if name == group
            )
        families = {
            kind: sum(any(f["kind"] == kind and f["significant"] == "yes" for f in found) for found in scans.values())
            for kind in FAMILIES
        }
        return {
            "people": len(self.people["all"]),
            "groups": rows,
            "scans": len(scans),
            "expected": sum(row["expected"] for row in rows.values()),
            "observed": families,
            "smallest_p": min((row["smallest_p"] for row in rows.values()), default=1 / (1 + len(self.people["all"]))),
            "error_rate": self.error_rate,
            "correction": self.correction,
            "forming_threshold": FORMING,
            "calibration": self.digest(),
        }


class SaveFindings(Transform):
    """Write what was found in a scan with its p values, and add ``significant``: -log10 p of each cluster with p at
    most the error rate, below 0 where it is darker.

    Args:
        layout: of the JSON.
        certificate: with the calibration's people.
        regions: names of the atlas's regions.
    """

    def __init__(self, layout: ScanLayout, certificate: Certificate, regions: Sequence[str]) -> None:
        self.layout, self.certificate, self.regions = layout, certificate, regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        certificate, group = self.certificate, self.certificate.group(data["covariates"])
        findings, shown = [], np.zeros(data["cluster_numbers"].shape, np.float32)
        for cluster in data["clusters"]:
            p = certificate.p(group, "cluster", cluster["mass"])
            if p <= certificate.error_rate:
                sign = 1 if cluster["direction"] == "brighter" else -1
                shown[data["cluster_numbers"] == cluster["label"]] = sign * -math.log10(p)
            if len(findings) < MOST_CLUSTERS or p <= certificate.error_rate:
                row = {"kind": "cluster", "name": "", **{k: v for k, v in cluster.items() if k != "label"}}
                findings.append({**row, "p": p, "p_peak": certificate.p(group, "peak", cluster["peak"])})
        for name, (*_, z) in zip(self.regions, torch.as_tensor(data.get("regions", [])).tolist(), strict=True):
            row = {"kind": "region", "name": name, "direction": "brighter" if z > 0 else "darker", "peak": abs(z)}
            findings.append({**row, "p": certificate.p(group, "region", abs(z))})
        content = {"group": group, "findings": findings}
        write_text(self.layout.filename(image_path(data["image"])), json.dumps(content) + "\n")
        return {**data, "significant": torch.from_numpy(shown)}


def discovery_level(p: Sequence[float], rate: float) -> float:
    """Up to which p scans are discoveries, by Benjamini and Hochberg, given the smallest p of each scan."""
    ordered = np.sort(p)
    passed = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    return rate * (passed[-1] + 1) / len(p) if len(passed) else 0.0


def certify(
    common: Common,
    inferer: Deviation,
    regions: Sequence[str],
    settings: Mapping[str, Any],
    error_rate: float | None = None,
    calibration: str | os.PathLike | None = None,
    correction: str = "family",
    groups: Sequence[str] | None = None,
) -> CertifiedEvaluator | None:
    """What says which deviations are significant; None where neither error rate nor calibration is given.

    Args:
        common: what all jobs share; its prior has covariates.
        inferer, regions, settings: of the job ``deviation``.
        error_rate, correction, groups: see :class:`Certificate`.
        calibration: a folder or a datalist of healthy people to whom the prior was not fitted.

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
    certificate = Certificate(common.prior.coding, error_rate, correction, groups)
    return CertifiedEvaluator(common, inferer, certificate, calibration, regions, settings)


class CertifiedEvaluator:
    """The job ``deviation`` with a certificate: first the calibration's people, then the scans.

    Args:
        common: what all jobs share.
        inferer: of the deviation.
        certificate: without people as yet.
        calibration: a folder or a datalist of healthy people.
        regions: names of the atlas's regions.
        settings: on which the results depend.
    """

    def __init__(
        self,
        common: Common,
        inferer: Deviation,
        certificate: Certificate,
        calibration: str | os.PathLike,
        regions: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        given, self.certificate = common.cohort, certificate
        cohort = Cohort(calibration, given.pattern, covariates_file=given.covariates_file, unseen=given.unseen)
        twice = {os.path.realpath(item_path(i)) for i in cohort.items} & {
            os.path.realpath(item_path(i)) for i in given.items
        }
        if twice:
            raise InputError(f"calibration: '{min(twice)}' is one of the scans, too: keep healthy people apart for it.")
        certificate.refuse_few(len(cohort.items))
        aside = common.replace(
            cohort=cohort, output_dir=common.output_dir / "calibration", figures=False, describe=None
        )
        self.largest = aside.layout(cohort.root)("largest", ".json")
        self.people = ScanEvaluator(
            aside,
            "calibration",
            Dataset(cohort.with_covariates(common.prior), common.preprocessing),
            inferer,
            [FindClusters(common.network), SaveLargest(self.largest)],
            [self.largest],
            settings,
            arguments=lambda items: stack_features(common.prior, items),
        )
        layout = common.layout(given.root)
        self.findings, self.maps, self.columns = layout("findings", ".json"), layout("significant"), given.columns
        self.output_dir, self.layouts = common.output_dir, [self.findings, self.maps]
        self.scans: ScanEvaluator | None = None
        self.steps = [FindClusters(common.network), SaveFindings(self.findings, certificate, regions)]

    def of(self, scans: ScanEvaluator) -> CertifiedEvaluator:
        """With the evaluator of the scans, which has :attr:`steps`, :attr:`layouts` and :meth:`summary`."""
        self.scans = scans
        return self

    def run(self) -> None:
        """Compute what is missing of both."""
        self.people.run()
        self.certificate.read([self.largest.path(item_path(item)) for item in self.people.dataset.data])
        self.scans.settings |= {"calibration_people": self.certificate.digest()}
        self.scans.run()

    def summary(self, tables: Callable[[Sequence[str]], object], scans: Sequence[str]) -> None:
        """Write ``findings.csv``, ``certificate.csv`` and ``certificate.json``; decide what is a discovery.

        Args:
            tables: writes those of the deviation.
            scans: paths of the scans that have results.
        """
        tables(scans)
        read = {scan: json.loads(self.findings.path(scan).read_text(encoding="utf-8")) for scan in scans}
        found = {scan: content["findings"] for scan, content in read.items()}
        level = dict.fromkeys(FAMILIES, self.certificate.error_rate)
        if self.certificate.correction == "discovery":
            for kind in FAMILIES:
                smallest = [min((f["p"] for f in rows if f["kind"] == kind), default=1.0) for rows in found.values()]
                level[kind] = discovery_level(smallest, self.certificate.error_rate)
            self._keep_discoveries(scans, level["cluster"])
        for rows in found.values():
            for row in rows:
                row["significant"] = "yes" if row["p"] <= level[row["kind"]] else "no"
        content = self.certificate.content(found, {scan: read[scan]["group"] for scan in scans})
        write_text(self.output_dir / "certificate.json", json.dumps(content, indent=2) + "\n")
        names = ("people", "scans", "smallest_p", "expected", "observed")
        rows = [[group, *(f"{row[name]:.4g}" for name in names)] for group, row in content["groups"].items()]
        write_csv(self.output_dir / "certificate.csv", ("group", *names), rows)
        self.columns.write(self.output_dir / "findings.csv", self._rows(read))
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
