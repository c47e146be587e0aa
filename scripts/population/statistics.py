"""What a cohort tells a population prior: sums over its scans, in a file that others can add to theirs.

The prior is a factor analysis with covariates: its mean and effects follow from sums of the shifts t times the
covariates, its residual variance from sums of squares, its factors from the leading directions of the shifts. All but
the last are sums, so that those of two cohorts are those of both. The file holds no latents of a scan, and no row for
one; what it does tell of people is said in docs/cohorts.md.

So that sums add up, covariates are in them as columns that no cohort's mean or share is in: whether one is known, its
value, the bends of its spline between knots that all cohorts share, and whether it is each category.
"""

from __future__ import annotations

import logging
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from scripts.data.covariate_tables import CohortCovariates
from scripts.data.covariates import Categorical, Continuous, CovariateCoding, Value
from scripts.networks import VDVAE
from scripts.population.deviations import Deviations
from scripts.population.files import as_bytes, from_bytes
from scripts.population.fit import SHARPNESSES, HeldOut, PopulationFit
from scripts.population.prior import PopulationPrior, fingerprint
from scripts.population.sketch import FactorSketch, split_latents
from scripts.training.checkpoints import CheckpointError, read_archive
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import expand, write_tensors
from scripts.utils.names import people_of
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

FORMAT = 2  # of the file; 1 did not say how many people its scans are of
LEAST_PEOPLE = 10  # in a cohort
LEAST_SEEN = 5  # held-out people of whom it is told what is familiar
MOST_LEVERAGE = 0.75  # of a scan: how much of any combination of the sums may be one person's
MOST_BYTES = 24_000_000  # of a file: fewer directions are kept where more would not fit
BITS_STEP, DISTANCE_STEP = 0.01, 0.1  # bins of histograms: bits per dim, standard deviations
MAKE_IT = "make it by fit_prior --statistics_only True"


def _shared_coding(kinds: Mapping[str, Any], values: Sequence[Mapping[str, Value]]) -> CovariateCoding:
    """A coding whose knots any cohort would choose: 0.2, 0.4, 0.6 and 0.8 of the power of ten above all values.

    Knots that ``kinds`` gives stay.
    """

    def knots(name: str) -> list[float]:
        largest = max((abs(row[name]) for row in values if row[name] is not None), default=1.0)
        return [share * 10.0 ** math.ceil(math.log10(max(largest, 1e-12))) for share in (0.2, 0.4, 0.6, 0.8)]

    known = {name: knots(name) if kind == "continuous" else kind for name, kind in kinds.items()}
    return CovariateCoding.learn(known, values)


def raw_numbers(coding: CovariateCoding, values: Mapping[str, Value]) -> dict[str, float]:
    """The columns of a scan by their names: 1; ``age``: it is known; ``age:0``, ...: its curve; ``sex=F``: it is F."""
    numbers = {"": 1.0}
    for name, variable in coding.variables.items():
        value = values.get(name)
        if isinstance(variable, Categorical):
            numbers |= {f"{name}={category}": float(value == category) for category in variable.categories}
            continue
        raw = replace(variable, mean=0.0, std=1.0, centre=(0.0,) * len(variable.centre)).numbers(value)
        numbers |= {name: float(value is not None)} | {f"{name}:{place}": number for place, number in enumerate(raw)}
    return numbers


def coefficients(coding: CovariateCoding, columns: Sequence[str]) -> Tensor:
    """How the features of a coding, whose knots the columns have, follow from them: ``features = columns @
    coefficients``, fp64. What a column lacks is not known of a scan.
    """
    places = {name: place for place, name in enumerate(columns)}
    found = torch.zeros(len(columns), coding.size, dtype=torch.float64)
    for (name, variable), own in zip(coding.variables.items(), coding.slices().values(), strict=True):
        if isinstance(variable, Categorical):
            for category in variable.categories:
                if f"{name}={category}" in places:
                    found[places[f"{name}={category}"], own] = torch.tensor(variable.numbers(category)).double()
        elif name in places:
            for place, centre in enumerate(variable.centre):
                found[places[f"{name}:{place}"], own.start + place] = 1 / variable.std
                found[places[name], own.start + place] = -centre - (variable.mean / variable.std if place == 0 else 0)
    return found


@dataclass
class CohortStatistics:
    """Sums over the scans of one cohort or of several; those of two cohorts can be added.

    Attributes:
        count, people: how many scans, of how many people.
        variables: of the covariates: ``{name: knots}``, or a text for a categorical one.
        ranges: of continuous covariates, rounded outwards.
        columns: names of the columns that covariates become, see :func:`raw_numbers`.
        gram: their products, ``[columns, columns]``, fp64.
        moments: of the columns with the shifts, ``[columns, dimensions]``.
        squares, ratios: sums of t² and of r², ``[dimensions]``.
        rows: ``rows^T rows`` is the sum of t tᵀ, up to what small directions leave, ``[rows, dimensions]``.
        grids: ``[channels, *grid]`` of each latent that the dimensions are of.
        factors: how many a prior may have at most.
        calibration: sums over held-out scans under the cohort's own prior.
        weights: checksum of the network's.
        about: what else is said of it: software, the network's grid.
    """

    count: int
    people: int
    variables: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    columns: list[str]
    gram: Tensor
    moments: Tensor
    squares: Tensor
    ratios: Tensor
    rows: Tensor
    grids: dict[int, Sequence[int]]
    factors: int
    calibration: dict[str, Any]
    weights: str
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it whole: sums as they are, directions as 8-bit numbers; of columns that follow from others nothing."""
        kept, combination = independent(self.gram)
        # the last of the rows is the mean
        rows = {index: as_bytes(part[:-1]) for index, part in split_latents(self.rows, self.grids).items()}
        content = {name: value for name, value in vars(self).items() if name not in ("rows", "moments")}
        content |= {"statistics": FORMAT, "moments": self.moments[kept].clone(), "combination": combination}
        content["rows"] = {index: small for index, (small, _) in rows.items()}
        content["scales"] = {index: scale for index, (_, scale) in rows.items()}
        write_tensors(path, content)

    @classmethod
    def load(cls, path: str | Path) -> CohortStatistics:
        """Read a file.

        Raises:
            NotFoundError: there is none.
            CheckpointError: it is damaged, or holds something else.
            InputError: it is of fewer people than may be in one.
        """
        path = Path(expand(path))
        if not path.is_file():
            raise NotFoundError(f"'{path}' does not exist: {MAKE_IT}.")
        content = read_archive(path)
        if not isinstance(content, dict) or content.pop("statistics", None) not in (1, FORMAT):
            raise CheckpointError(f"'{path}' holds no statistics of a cohort that this version reads: {MAKE_IT}.")
        try:
            scales, moments = content.pop("scales"), content.pop("moments")
            moments = (content.pop("combination") @ moments.double()).float()
            content.setdefault("people", content["count"])
            rows = [from_bytes(small, scales[index]).flatten(1) for index, small in content.pop("rows").items()]
            mean = moments[:1] / content["count"] ** 0.5
            found = cls(rows=torch.cat([torch.cat(rows, dim=1), mean]), moments=moments, **content)
            dimensions = sum(map(math.prod, found.grids.values()))
            parts = (found.moments, found.squares, found.ratios, found.rows)
            whole = all(part.shape[-1] == dimensions and part.isfinite().all() for part in parts)
            whole = whole and found.gram.shape == (len(found.columns),) * 2 and len(moments) == len(found.columns)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError):
            whole = False
        if not whole:
            raise CheckpointError(f"'{path}' is damaged: take it from where it was made, or {MAKE_IT} again.")
        if found.people < LEAST_PEOPLE:
            raise InputError(f"'{path}' is of {found.people} people: a cohort of fewer than {LEAST_PEOPLE} is refused.")
        return found

    def of_latents(self, latents: Sequence[int]) -> CohortStatistics:
        """Those of some of its latents."""
        inside = torch.cat([torch.full((math.prod(grid),), index in latents) for index, grid in self.grids.items()])
        parts = {name: getattr(self, name)[..., inside] for name in ("moments", "squares", "ratios", "rows")}
        return replace(self, **parts, grids={index: grid for index, grid in self.grids.items() if index in latents})

    def described(self) -> list[str]:
        """What the file holds, a line each, to be read before it is given away."""
        dimensions, known = self.squares.numel(), self.calibration
        held_out = sum(known["bits_per_dim"].values())
        scans = {name: self.gram[i, i].item() for i, name in enumerate(self.columns) if "=" in name}
        return [
            f"{self.count} scans of {self.people} people: sums over {dimensions} numbers of {len(self.grids)} latents",
            f"covariates: {', '.join(self.variables) or 'none'}; "
            + ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in self.ranges.items()),
            "scans in each category: " + (", ".join(f"{name} {n:.0f}" for name, n in scans.items()) or "none"),
            f"columns and their products: {len(self.columns)} x {len(self.columns)}; times the numbers: "
            f"{len(independent(self.gram)[0])} x {dimensions}; squares: 2 x {dimensions}",
            f"leading directions: {len(self.rows) - 1} x {dimensions}, 8 bits",
            f"held-out scans: {held_out}; histograms of bits per dim and of distances; sums {known['sums']}",
            f"what is familiar: mean and covariance of {_numbers(known)} numbers of held-out people, and how likely "
            f"{_cubes(known)} places of their brains are",
            f"held-out gain in nats per factors: { {k: round(v, 1) for k, v in known['gains'].items()} }",
            f"weights {self.weights}; {', '.join(f'{name} {value}' for name, value in self.about.items())}",
        ]


def _numbers(calibration: Mapping[str, Any]) -> int:
    return sum(len(cohort["names"]) for cohort in calibration.get("familiarity", []))


def _cubes(calibration: Mapping[str, Any]) -> int:
    surprises = (cohort.get("surprise") for cohort in calibration.get("familiarity", []))
    return sum(surprise.shape[1] for surprise in surprises if surprise is not None)


def independent(gram: Tensor) -> tuple[list[int], Tensor]:
    """Columns from which all follow, and how: ``columns = combination @ kept``, ``[columns, kept]``, fp64."""
    scale = gram.diag().clamp_min(1e-300).sqrt()
    scaled, kept = gram / scale / scale[:, None], list[int]()
    for place in range(len(gram)):
        others = scaled[kept][:, kept]
        explained = scaled[place, kept] @ torch.linalg.solve(others, scaled[kept, place]) if kept else 0.0
        if gram[place, place] > 0 and 1 - explained > 1e-9:
            kept.append(place)
    combination = torch.linalg.solve(scaled[kept][:, kept], scaled[kept]).T
    return kept, combination * scale[:, None] / scale[kept]


class StatisticsFit(PopulationFit):
    """Fits a prior to a cohort as :class:`PopulationFit` does, and writes the cohort's sums instead.

    Args:
        kinds: of the covariates, by their names; knots may be given. None: there are none.
        network, training, others: see :class:`PopulationFit`; its path is of ``statistics.pt``.
    """

    def __init__(
        self,
        network: VDVAE,
        training: Dataset,
        *others: Any,
        covariates: CohortCovariates | None = None,
        kinds: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if covariates is not None:
            coding = _shared_coding(kinds, covariates.values[0])
            covariates = CohortCovariates.coded(coding, *covariates.values)
        self.raw_coding = CovariateCoding([]) if covariates is None else covariates.coding
        self.values = [{}] * len(training) if covariates is None else covariates.values[0]
        # what has one category alone explains nothing here
        super().__init__(
            network, training, *others, covariates=covariates if self.raw_coding.size else None, **settings
        )
        self.calibration: dict[str, Any] = {}
        self.people = people_of(training)
        if len(self.people) < LEAST_PEOPLE:
            raise InputError(
                f"dataset_dir: statistics of {len(training)} scan(s) of {len(self.people)} people would tell too much "
                f"of each: a cohort needs {LEAST_PEOPLE} people or more."
            )

    def _add_offsets(self, *_: Any) -> None:
        """Add none: it needs scans, and those of all cohorts are nowhere together."""

    def _refitted(self, prior: PopulationPrior, rank: int, shrinkage: float) -> PopulationPrior:
        """As it is: the sums are of all training scans anyway."""
        return prior

    def _likelihoods(self, prior: PopulationPrior, drawn: HeldOut) -> Tensor:
        found = super()._likelihoods(prior, drawn)
        self.calibration["sharpness"] = found.tolist()
        return found

    def _deviations(self, prior: PopulationPrior, dataset: Dataset) -> Deviations:
        found = super()._deviations(prior, dataset)
        self.calibration["sums"] = [round(number, 3) for number in (*found.squares.tolist(), *found.counts.tolist())]
        return found

    def _save(self, prior: PopulationPrior, shrinkage: float, gain: float, scans: int) -> None:
        bins = Counter((prior.bits_per_dim / BITS_STEP).round().int().tolist())
        # roughly standard normal (R. A. Fisher), whatever the number of factors
        normal = (2**0.5 * prior.distances - (2 * prior.factors - 1) ** 0.5) / DISTANCE_STEP
        self.calibration |= {"bits_per_dim": dict(bins), "distances": dict(Counter(normal.round().int().tolist()))}
        self.calibration.setdefault("sharpness", [0.0] * len(SHARPNESSES))
        self.calibration.setdefault("sums", [0.0] * 4)
        self.calibration |= {"gains": self.gains, "shrinkage": shrinkage, "factors": prior.factors}
        familiar = prior.familiarity["people"][0] >= LEAST_SEEN
        self.calibration["familiarity"] = [prior.familiarity] if familiar else []
        self.latents = list(prior.latents)
        statistics = self._sums()
        if idist.get_rank() == 0:
            statistics.save(self.path)
            for line in statistics.described():
                logger.info("%s", line)
            logger.info("'%s', %.1f MB: it holds no scan.", self.path, self.path.stat().st_size / 1e6)

    def _design(self) -> tuple[list[str], Tensor, CovariateCoding]:
        """The columns, their values of all training scans, and the coding of those covariates that may be told.

        Of a covariate that would tell one person's latents nothing is told: it is not known in this cohort.
        """
        coding = self.raw_coding
        while True:
            rows = [raw_numbers(coding, values) for values in self.values]
            design = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
            leverage = most_leverage(design, self.people)
            if leverage <= MOST_LEVERAGE or not coding.variables:
                return list(rows[0]), design, coding
            fewer = {n: CovariateCoding([v for k, v in coding.variables.items() if k != n]) for n in coding.variables}
            columns = list(rows[0])
            without = {
                name: most_leverage(design[:, [c in raw_numbers(less, {}) for c in columns]], self.people)
                for name, less in fewer.items()
            }
            name = min(without, key=without.get)
            logger.warning(
                "covariates: one person would have %.0f %% of what the sums say of %s: it is left out. More people, or "
                "fewer covariates, would keep it.",
                *(100 * leverage, name),
            )
            coding = fewer[name]

    def _sums(self) -> CohortStatistics:
        """One pass over all training scans; with several processes all take part."""
        columns, design, coding = self._design()
        dimensions, scans = sum(map(math.prod, self._grids().values())), len(self.training)
        moments = torch.zeros(len(columns), dimensions, dtype=torch.float64)
        squares, ratios = torch.zeros(2, dimensions, dtype=torch.float64)
        for_sums = dimensions * 4 * (len(independent(design.T @ design)[0]) + 2)
        fitting = int((MOST_BYTES - for_sums) // dimensions)
        sketch = FactorSketch(max(1, min(2 * self.factors, len(self.people) // 2, fitting)))
        own = iter(range(idist.get_rank(), scans, idist.get_world_size()))
        for vectors in self._vectors(self.training, "sums over the scans"):
            t, r = vectors.shifts(), vectors.ratios()
            moments += design[[next(own) for _ in t]].T @ t.double()
            squares += t.double().square().sum(0)
            ratios += r.double().square().sum(0)
            sketch.add(t, r)
        sketch.merge()
        moments, squares, ratios = (idist.all_reduce(total).float() for total in (moments, squares, ratios))
        continuous = {n: v for n, v in coding.variables.items() if isinstance(v, Continuous)}
        return CohortStatistics(
            scans,
            len(self.people),
            {name: list(v.knots) if name in continuous else v.kind for name, v in coding.variables.items()},
            {name: _rounded(v) for name, v in continuous.items()},
            columns,
            design.T @ design,
            moments,
            squares,
            ratios,
            torch.cat([sketch.basis, moments[:1] / scans**0.5]),
            self._grids(),
            self.factors,
            self.calibration,
            fingerprint(self.network),
            {
                "grid": "x".join(map(str, self.network.spatial_shape)),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "monai")},
            },
        )


def most_leverage(design: Tensor, people: Sequence[Sequence[int]]) -> float:
    """The largest share of one person in any combination of the sums over rows, from 0 to 1, by the rows of each."""
    scaled = design / design.square().sum(0).sqrt().clamp_min(1e-300)
    values, vectors = torch.linalg.eigh(scaled.T @ scaled)
    kept = values > 1e-9 * values[-1]
    whitened = scaled @ vectors[:, kept] / values[kept].sqrt()
    return max(float(torch.linalg.matrix_norm(whitened[rows], 2).square()) for rows in people)


def _rounded(variable: Continuous) -> tuple[float, float]:
    """The range of a covariate, outwards to a twelfth of what its knots span: no one's value."""
    step = (variable.knots[-1] - variable.knots[0]) / 12
    return step * math.floor(variable.low / step), step * math.ceil(variable.high / step)
