"""What the jobs about covariates write beside volumes: tables, film strips and curves."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.utils import eval_mode
from scipy import stats
from scripts.data.covariates import CovariateCoding, Value
from scripts.data.scan_grid import ScanGrid
from scripts.data.tables import read_table
from scripts.data.transforms import LoadScand
from scripts.inference.covariates import Deviation, summary
from scripts.inference.engine import scan_generator
from scripts.inference.layouts import ScanLayout
from scripts.inference.measures import value_numbers
from scripts.inference.outputs import file_names, read_rows
from scripts.inference.tables import ScanColumns
from scripts.layers.gaussian import LatentSampler
from scripts.layers.output import foreground_percentile
from scripts.networks import VDVAE
from scripts.population.deviations import DEVIATION_PERCENTILE
from scripts.utils import figures, plots
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import expand
from scripts.utils.names import item_path
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

LEAST_FOR_SLOPE = 10  # scans
STRAIGHT = 0.95  # a slope from which on nothing needs to be corrected


def draw_strip(
    targets: Mapping[str, Mapping[str, Value]],
    path: str,
    data: Mapping[Hashable, Any],
    value_range: tuple[float, float],
) -> None:
    """A scan beside itself under other covariates, by the ends of the results' names."""
    image = data["image"].as_tensor()
    scans = [image, *(image + data[f"change{end}"] for end in targets)]
    own = in_words(data["covariates"])
    labels = [f"scan ({own})" if own else "scan", *map(in_words, targets.values())]
    figures.strip(path, scans, labels, value_range, guide=image, titles=file_names(data["image"]))


def draw_deviation(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan beside what is expected for its covariates, and how far it is from that."""
    own = in_words(data["covariates"])
    titles = [f"{name} ({own})" if own else name for name in file_names(data["image"])]
    figures.anomaly(
        path, data["image"], data["expected"], data["deviation"], titles, value_range, ("expected", "deviation")
    )


def score_deviation(network: VDVAE, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Add ``deviation_score``, the 99th percentile of the absolute ``deviation`` where brain is expected: elsewhere the
    spread is next to nothing, and edges would outweigh all else.

    It belongs before what brings the map to the scan's own grid.
    """
    expected, deviation = (torch.as_tensor(data[key])[None] for key in ("expected", "deviation"))
    (score,) = foreground_percentile(deviation.abs(), expected, network, DEVIATION_PERCENTILE)
    return {**data, "deviation_score": score}


def posteriors_of(coding: CovariateCoding, data: Mapping[Hashable, Any]) -> dict[str, dict[str, Any]]:
    """What a scan says of its covariates, plain values."""
    content = {}
    for covariate, variable in coding.variables.items():
        likely = data[f"posterior_{covariate}"]
        content[covariate] = {
            "values": variable.grid(),
            "probability": [float(f"{share:.6g}") for share in likely.tolist()],
            "own": data["covariates"][covariate],
            "summary": summary(coding, covariate, likely),
        }
    return content


def draw_posteriors(
    coding: CovariateCoding, path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]
) -> None:
    """What a scan says of its covariates, as curves."""
    plots.posteriors(path, posteriors_of(coding, data), ", ".join(file_names(data["image"])))


def covariate_table(
    path: str | os.PathLike, layout: ScanLayout, columns: ScanColumns, coding: CovariateCoding, scans: Sequence[str]
) -> None:
    """Put together what the scans say of their covariates, one row per scan: mean and 90 % interval, or probabilities.

    Columns whose name ends in ``_own`` have what the data set's tables say, ``_gap`` how much more the scan says, and
    ``_gap_corrected`` that less what people of this value have in the mean: without it old people look younger and
    young ones older than they are. The log says how large errors are, beside those of always saying the mean.
    """
    contents = dict(read_rows(layout, scans))
    gaps: dict[str, dict[str, dict[str, str]]] = {}
    for name, variable in coding.variables.items():
        if variable.kind == "continuous":
            gaps[name] = _gaps(name, variable.mean, {scan: content[name] for scan, content in contents.items()})

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for scan, content in contents.items():
            row = {}
            for name, part in content.items():
                row |= part["summary"] | gaps.get(name, {}).get(scan, {})
                row[f"{name}_own"] = "" if part["own"] is None else part["own"]
            yield scan, row

    columns.write(path, rows())
    logger.info("'%s' says what each scan says of its covariates.", path)


def _gaps(name: str, mean: float, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The columns of gaps, of each scan; and what the log says of them."""
    own = {scan: float(part["own"]) for scan, part in parts.items() if part["own"] is not None}
    said = {
        scan: {end: float(part["summary"][f"{name}_{end}"]) for end in ("mean", "low", "high")}
        for scan, part in parts.items()
    }
    found = {scan: {f"{name}_gap": "", f"{name}_gap_corrected": ""} for scan in parts}
    if not own:
        return found
    numbers = value_numbers(name, list(own.values()), [said[scan] for scan in own], mean)
    slope = numbers[f"{name}_slope"] if len(own) >= LEAST_FOR_SLOPE else None
    gaps = {scan: said[scan]["mean"] - value for scan, value in own.items()}
    centre, mean_gap = np.mean(list(own.values())), np.mean(list(gaps.values()))
    for scan, value in own.items():
        found[scan][f"{name}_gap"] = f"{gaps[scan]:.4g}"
        if slope is not None:
            found[scan][f"{name}_gap_corrected"] = f"{gaps[scan] - mean_gap - (slope - 1) * (value - centre):.4g}"
    drawn = f": what is said is drawn to the mean, so compare {name}_gap_corrected, or people of equal {name}"
    drawn = drawn if slope is not None and slope < STRAIGHT else ""
    logger.info(
        "%s: mean absolute error %.3g over %d scan(s), where always saying the training people's mean, %.3g, errs by "
        "%.3g%s.",
        *(name, numbers[f"{name}_mae"], len(own), mean, numbers[f"{name}_mae_mean"]),
        "" if slope is None else f"; slope {slope:.2f}{drawn}",
    )
    return found


def fit_atlas(atlas: str | os.PathLike | None, grid: ScanGrid, shape: Sequence[int], affine: Any) -> Tensor | None:
    """An atlas on the network's grid, a region's number in each voxel; None without one.

    Args:
        atlas: a NIfTI file of whole numbers, 0 for none, in the scans' world.
        grid: how the training scans lay.
        shape, affine: of the network's grid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no region there, or scans do not lie in one box of the world.
    """
    if atlas is None:
        return None
    path = Path(expand(atlas))
    if not path.is_file():
        raise NotFoundError(f"atlas '{atlas}' does not exist: check the path.")
    if grid.box is None:
        raise InputError("atlas: the training scans were not aligned with each other, so that no atlas fits them all.")
    from nibabel.processing import resample_from_to  # only where there is an atlas: commands start without it

    try:
        image = LoadScand("atlas")({"atlas": str(path)})["atlas"]
        problems, values = image.meta["header_problems"], image[0].numpy()
        if len(image) != 1 or values.ndim != len(shape):
            raise InputError(f"atlas '{atlas}' has shape {tuple(image.shape)}: give one volume of region numbers.")
        if not np.array_equal(values, np.rint(values)) or values.min() < 0:
            raise InputError(f"atlas '{atlas}' holds other values than whole numbers from 0 on: give a label map.")
        if problems:
            raise InputError(f"atlas '{atlas}': {problems[0]}: mend its header.")
        fitted = resample_from_to(nib.Nifti1Image(values, image.affine), (tuple(shape), np.asarray(affine)), order=0)
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"atlas '{atlas}' cannot be read: {error}") from error
    labels = torch.from_numpy(np.rint(np.asarray(fitted.dataobj)).astype(np.int64))
    if not labels.any():
        raise InputError(f"atlas '{atlas}' has no region where the scans lie: is it in another space?")
    return labels


def region_names(atlas: str | os.PathLike | None, labels: Tensor | None) -> list[str]:
    """Names of an atlas's regions, those that are on the network's grid, in the order of their numbers.

    They are those of a BIDS ``..._dseg.tsv`` (columns ``index`` and ``name``) beside the atlas, or the numbers. Where
    several have one name, such as those of both sides, their numbers are added to it.
    """
    if labels is None:
        return []
    numbers = [str(number) for number in labels.unique().tolist() if number]
    path = Path(expand(atlas))
    table = path.with_name(path.name.split(".")[0] + ".tsv")
    if not table.is_file():
        return numbers
    names = {row.get("index", ""): row.get("name", "") for row in read_table(table)[1]}
    found = [names.get(number) or number for number in numbers]
    return [f"{name} {number}" if found.count(name) > 1 else name for name, number in zip(found, numbers, strict=True)]


def region_numbers(names: Sequence[str], data: Mapping[Hashable, Any]) -> dict[str, list[float]] | None:
    """A scan's numbers in each region; None without an atlas."""
    if not names:
        return None
    return dict(zip(names, data["regions"].tolist(), strict=True))


def region_table(
    output_dir: str | os.PathLike, layout: ScanLayout, columns: ScanColumns, curves: RegionCurves, scans: Sequence[str]
) -> None:
    """Put the regions of all scans together, in two tables and a picture.

    ``deviation.csv`` has a row per scan and region: the region's mean intensity (in the range of the network's output),
    what is expected for the scan's covariates, the standard deviation of that, the z score, the centile, and ``q``: the
    two-sided p value, corrected for the number of regions of the scan by Benjamini and Hochberg.
    ``deviation_z.csv`` has a row per scan and a column per region, its z score. ``regions.png``: see
    :class:`scripts.inference.covariate_results.RegionCurves`.
    """
    found = dict(read_rows(layout, scans))
    folder = Path(output_dir)
    if not found:
        for name in ("deviation.csv", "deviation_z.csv", "regions.png"):  # of an earlier run with an atlas
            (folder / name).unlink(missing_ok=True)
        return
    names = ("value", "expected", "std", "z")

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for scan, regions in found.items():
            scores = np.array([values[3] for values in regions.values()])
            p = np.nan_to_num(2 * stats.norm.sf(np.abs(scores)), nan=1.0)
            corrected = stats.false_discovery_control(p)
            for (region, values), q in zip(regions.items(), corrected, strict=True):
                numbers = {name: f"{value:.6g}" for name, value in zip(names, values, strict=True)}
                centile = 100 * stats.norm.cdf(values[3])
                yield scan, {"region": region, **numbers, "centile": f"{centile:.4g}", "q": f"{q:.4g}"}

    columns.write(folder / "deviation.csv", rows())
    z = ((scan, {name: f"{values[3]:.6g}" for name, values in regions.items()}) for scan, regions in found.items())
    columns.write(folder / "deviation_z.csv", z)
    curves.draw(folder / "regions.png", {scan: {name: v[3] for name, v in found[scan].items()} for scan in found})
    logger.info(
        "'deviation.csv' has a row per scan and region, 'deviation_z.csv' one per scan. Of %d regions of a healthy "
        "scan %.0f lie beyond a z of 2 by chance: q is corrected for that.",
        *((count := len(next(iter(found.values())))), 0.0455 * count),
    )


def in_words(values: Mapping[str, Value]) -> str:
    """Covariates in words, as far as they are known."""
    known = ((name, value) for name, value in values.items() if value is not None)
    return ", ".join(f"{name} {f'{value:g}' if isinstance(value, float) else value}" for name, value in known)


STEPS = 9  # values of the covariate
SHOWN = 12  # regions


class RegionCurves:
    """Draws ``regions.png``: a panel per region, its centiles over the first continuous covariate, and the scans.

    Of more than 12 regions those are shown in which any scan has the largest z scores.

    The curves are of people whose other covariates are not known. A scan's point lies as far from the middle curve as
    its z score says, so that what its other covariates explain does not count.

    Args:
        deviation: the job's inferer, with an atlas.
        network: whose scans it is about.
        items: of the data set, with ``covariates``.
        seed: of the draws, which are the same people at each value, whatever the batch.
        batch_size: draws at once.
    """

    def __init__(
        self,
        deviation: Deviation,
        network: VDVAE,
        items: Sequence[Mapping[str, Any]],
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.deviation, self.network, self.seed, self.batch_size = deviation, network, seed, batch_size
        self.known = {item_path(item): item["covariates"] for item in items}

    @torch.no_grad()
    def moments(self, name: str, values: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each region over draws, at values of a covariate: ``[values, regions]``."""
        prior, coding = self.deviation.prior, self.deviation.prior.coding
        means, deviations = [], []
        device = self.network.output.weight.device
        count = self.deviation.draws
        bar = tqdm(total=len(values) * count, desc=f"regions over {name}", unit="draw", file=sys.stderr)
        with bar, eval_mode(self.network):
            for value in values:
                features = coding.numbers({name: value})[None].to(device)
                regions = []
                for start in range(0, count, self.batch_size):
                    people = range(start, min(start + self.batch_size, count))
                    generators = [scan_generator(self.seed, f"person {person}", device) for person in people]
                    loc, _ = prior.sample(self.network, features.expand(len(people), -1), LatentSampler(generators))
                    regions.append(self.deviation.region_means(loc).cpu())
                    bar.update(len(people))
                drawn = torch.cat(regions)
                means.append(drawn.mean(0))
                deviations.append(drawn.std(0))
        return torch.stack(means), torch.stack(deviations)

    def draw(self, path: str | os.PathLike, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Draw, by the z score of each region of each scan; nothing where no covariate is continuous."""
        coding = self.deviation.prior.coding
        covariate = next((name for name, variable in coding.variables.items() if variable.kind == "continuous"), None)
        if covariate is None:
            return
        values = coding.variables[covariate].grid(STEPS)
        means, deviations = self.moments(covariate, values)
        names = list(next(iter(scores.values())))
        largest = [max(abs(scan[name]) for scan in scores.values()) for name in names]
        shown = sorted(sorted(range(len(names)), key=largest.__getitem__)[-SHOWN:])
        panels = {names[region]: (means[:, region].numpy(), deviations[:, region].numpy()) for region in shown}
        placed = {scan: self.known[scan][covariate] for scan in scores}
        points = [
            [(place, scores[scan][names[region]]) for scan, place in placed.items() if place is not None]
            for region in shown
        ]
        few = len(shown) < len(names)
        why = f"The {len(shown)} of {len(names)} regions with the largest z score of any scan" if few else "All regions"
        plots.centiles(path, covariate, values, panels, points, why)
        logger.info("'%s' shows regions over %s, with the scans among the centiles.", path, covariate)
