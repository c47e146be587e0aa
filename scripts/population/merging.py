"""The prior of the union of cohorts, from the sums that each gave: see :mod:`scripts.population.statistics`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from scripts.data.covariates import Categorical, Continuous, CovariateCoding, quantiles_of_moments
from scripts.population.effects import Effects, rows_of
from scripts.population.familiarity import Familiarity
from scripts.population.fit import RANKS, SHARPNESSES, SHRINKAGES
from scripts.population.joint import correlation_of
from scripts.population.prior import PopulationPrior
from scripts.population.sketch import FactorSketch, prior_from_sketch
from scripts.population.statistics import BITS_STEP, DISTANCE_STEP, CohortStatistics, coefficients
from scripts.utils.errors import InputError
from torch import Tensor
from tqdm import tqdm

SITE = "site"
ROUNDING = 1e-3  # of sums that were made anew, in another order or on another machine
GROWN = 1.5  # standard errors of a sum of squares, by which a later file of a site may have more of it
SAME = 1e-12  # of a mean square: a variance that is no larger is what rounding leaves of 0, and may be below it
CHUNK = 1 << 16  # dimensions that are multiplied in double precision at a time


class LeftOut(NamedTuple):
    """What the prior of all other cohorts says of one of so many people.

    Attributes:
        gain: nats per scan that the others' prior gains over the network's own, in the mean.
        mean, spread: of its coordinates in the others' prior, in their standard deviations: 0 and 1 if it were like
            them; the root mean square over the coordinates.
    """

    people: int
    gain: float
    mean: float
    spread: float


def total(parts: Sequence[CohortStatistics]) -> CohortStatistics:
    """The sums of some cohorts together, of the latents that all have; refused are those of different weights or knots,
    or without a common latent.
    """
    first = parts[0]
    knots: dict[str, Any] = {}
    for part in parts:
        if part.weights != first.weights:
            raise InputError(
                f"the files are of different weights ({first.weights[:12]} and {part.weights[:12]}): run fit_prior "
                "--statistics_only True with the same --ckpt at each site."
            )
        for name, kind in part.variables.items():
            if kind != knots.setdefault(name, kind):
                raise InputError(
                    f"covariates: {name} has the knots or the kind {kind} in one file and {knots[name]} in another: "
                    f"name the same at each site, such as --covariates \"{{'{name}': {knots[name]}}}\"."
                )
    latents = set.intersection(*(set(part.grids) for part in parts))
    if not latents:
        raise InputError("the files have no latent in common: cohorts of more people tell which ones vary.")
    parts = [part.of_latents(latents) for part in parts]
    columns = sorted({column for part in parts for column in part.columns})
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    moments = torch.zeros(len(columns), parts[0].squares.numel(), dtype=torch.float64)
    for part in parts:
        places = torch.tensor([columns.index(name) for name in part.columns])
        gram[places[:, None], places] += part.gram
        moments[places] += part.moments
    lows, highs = (
        {n: f(p.ranges[n][i] for p in parts if n in p.ranges) for n in knots if not isinstance(knots[n], str)}
        for i, f in enumerate((min, max))
    )
    return replace(
        parts[0],
        count=sum(part.count for part in parts),
        people=sum(part.people for part in parts),
        variables=knots,
        ranges={name: (lows[name], highs[name]) for name in lows},
        columns=columns,
        gram=gram,
        moments=moments.float(),
        squares=torch.stack([part.squares for part in parts]).double().sum(0).float(),
        ratios=torch.stack([part.ratios for part in parts]).double().sum(0).float(),
        rows=torch.cat([part.rows for part in parts]),
        factors=max(part.factors for part in parts),
        calibration=_held_out_sums(parts),
    )


def _held_out_sums(parts: Sequence[CohortStatistics]) -> dict:
    """What was measured of held-out people, of all cohorts."""
    found = [part.calibration for part in parts]
    counted = {name: sum((Counter(c[name]) for c in found), Counter()) for name in ("bits_per_dim", "distances")}
    added = {name: [sum(v) for v in zip(*(c[name] for c in found), strict=True)] for name in ("sharpness", "sums")}
    familiar = [cohort for c in found for cohort in c.get("familiarity", [])]
    return {**found[0], **counted, **added, "familiarity": familiar}


def _pooled_coding(union: CohortStatistics) -> CovariateCoding | None:
    """How covariates become features of mean 0 over the union; None where there are none."""
    value = {(a, b): union.gram[i, j].item() for i, a in enumerate(union.columns) for j, b in enumerate(union.columns)}
    variables: list[Continuous | Categorical] = []
    for name, knots in sorted(union.variables.items()):
        if isinstance(knots, str):
            people = {c.removeprefix(f"{name}="): value[c, c] for c in union.columns if c.startswith(f"{name}=")}
            shares = tuple(n / sum(people.values()) for n in people.values())
            variables.append(Categorical(name, tuple(people), shares))
            continue
        means = [value[name, f"{name}:{place}"] / value[name, name] for place in range(len(knots) - 1)]
        square = value[f"{name}:0", f"{name}:0"] / value[name, name]
        variance = square - means[0] ** 2
        std = variance**0.5 if variance > SAME * square else 1.0
        centre = (0.0, *(mean / std for mean in means[1:]))
        quantiles = quantiles_of_moments(means[0], std, *union.ranges[name])
        variables.append(Continuous(name, means[0], std, *union.ranges[name], tuple(knots), centre, quantiles))
    coding = CovariateCoding(variables)
    return coding if coding.size else None


def _known(statistics: CohortStatistics, coding: CovariateCoding) -> Tensor:
    """Of how many scans each two covariates of a coding are known, ``[covariates, covariates]``."""
    columns = statistics.columns
    tells = [[column == name or column.startswith(f"{name}=") for name in coding.variables] for column in columns]
    told = torch.tensor(tells, dtype=torch.float64)
    return told.T @ statistics.gram @ told


class _Residual(NamedTuple):
    """What a mean and effects leave of the shifts: ``rows^T core rows`` is its scatter, about 0, but for its diagonal.

    Attributes:
        diagonal: of the scatter, ``[dimensions]``, exact.
        rows, core: ``[rows, dimensions]`` and ``[rows, rows]``.
        left: the sum of what is left, ``[dimensions]``.
    """

    diagonal: Tensor
    rows: Tensor
    core: Tensor
    left: Tensor


def _design(statistics: CohortStatistics, coding: CovariateCoding | None) -> Tensor:
    """From the columns to 1 and the features of a coding, ``[columns, 1 + features]``."""
    one = torch.tensor([[float(column == "")] for column in statistics.columns], dtype=torch.float64)
    return one if coding is None else torch.cat([one, coefficients(coding, statistics.columns)], dim=1)


def _residual(statistics: CohortStatistics, design: Tensor, model: Tensor) -> _Residual:
    """Of the shifts t less ``design @ model``, with the model ``[1 + features, dimensions]``."""
    gram, cross = design.T @ statistics.gram @ design, (design.T @ statistics.moments.double()).float()
    fitted = gram.float() @ model
    rows = torch.cat([statistics.rows, model, cross])
    core = torch.eye(len(rows), dtype=torch.float64)
    first, second = len(statistics.rows), len(rows) - len(cross)
    core[first:, first:] = 0
    core[first:second, first:second] = gram
    core[first:second, second:] = core[second:, first:second] = -torch.eye(len(cross), dtype=torch.float64)
    diagonal = (statistics.squares - (model * (2 * cross - fitted)).sum(0)).clamp_min(0)
    return _Residual(diagonal, rows, core, cross[0] - fitted[0])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of long rows, in double precision."""
    parts = zip(left.split(CHUNK, dim=1), right.split(CHUNK, dim=1), strict=True)
    return sum(a.double() @ b.double().T for a, b in parts)


def _leading(residual: _Residual, most: int) -> Tensor:
    """The leading principal directions times the roots of their scatter, ``[directions, dimensions]``."""
    values, vectors = torch.linalg.eigh(_products(residual.rows, residual.rows))
    kept = values > 1e-10 * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()  # the rows are root times orthonormal ones
    scatter, turned = torch.linalg.eigh(root.T @ residual.core @ root)
    scatter, turned = scatter.flip(0)[:most], turned.flip(1)[:, :most]
    scatter, turned = scatter[scatter > 1e-6 * scatter[0]], turned[:, scatter > 1e-6 * scatter[0]]
    return (scatter.sqrt()[:, None] * turned.T @ (vectors[:, kept] / values[kept].sqrt()).T).float() @ residual.rows


class _Fitted(NamedTuple):
    """The factor analysis of a union, of which priors of any number of factors can be made."""

    union: CohortStatistics
    coding: CovariateCoding | None
    effects: Tensor | None
    sketch: FactorSketch

    @classmethod
    def to(cls, parts: Sequence[CohortStatistics]) -> _Fitted:
        """That of some cohorts."""
        union = total(parts)
        coding = _pooled_coding(union)
        design = _design(union, coding)
        gram, moments = design.T @ union.gram @ design, (design.T @ union.moments.double()).float()
        effects = None
        if coding is not None:
            regression = Effects(coding.size, union.squares.shape, list(coding.slices().values()))
            regression.gram, regression.moments, regression.squares = gram, moments, union.squares
            effects = regression.fit()
        model = torch.zeros_like(moments) if effects is None else torch.cat([torch.zeros_like(moments[:1]), effects])
        model[0] = (moments[0] - gram[0].float() @ model) / union.count
        residual = _residual(union, design, model)
        sketch = FactorSketch(2 * union.factors)
        sketch.count, sketch.mean, sketch.scatter, sketch.square = (
            *(union.count, model[0]),
            *(residual.diagonal, union.ratios),
        )
        sketch.basis = _leading(residual, sketch.directions)
        return cls(union, coding, effects, sketch)

    def prior(self, rank: int, shrinkage: float) -> PopulationPrior:
        """With so many factors, see :meth:`FactorSketch.factors`."""
        found = prior_from_sketch(self.sketch, rank, shrinkage, self.union.grids, self.effects)
        found.coding = self.coding
        return found


def expectation(prior: PopulationPrior, statistics: CohortStatistics) -> LeftOut:
    """What a prior says of a cohort that it was not fitted to, from the cohort's sums alone.

    The likelihood's mean over people is a function of second moments. What the cohort's directions leave of these
    counts for uncorrelated, so that the gain is said too low rather than too high. Categories that the prior does not
    know are not known.
    """
    cohort = statistics.of_latents(prior.latents)
    variance, design = rows_of(prior, "variance")[0], _design(cohort, prior.coding)
    residual = _residual(cohort, design, torch.cat([rows_of(prior, "mean"), rows_of(prior, "effects")]))
    scaled, inverse = rows_of(prior, "directions") / variance, prior.inverse.double()
    dropped = (cohort.squares - cohort.rows.square().sum(0)).clamp_min(0)
    along = _products(scaled, residual.rows)
    second = along @ residual.core @ along.T + _products(scaled * (dropped + cohort.ratios), scaled)
    explained = (inverse * second).sum()
    distance = ((residual.diagonal + cohort.ratios).double() / variance).sum()
    gain = 0.5 * ((cohort.squares + cohort.ratios).double().sum() - distance + explained) / cohort.count
    mean = inverse @ _products(scaled, residual.left[None])[:, 0] / cohort.count
    variances = (inverse @ second @ inverse).diag() / cohort.count - mean.square()
    expected = (1 - inverse.diag()).clamp_min(1e-6)
    spread = (variances.clamp_min(0) / expected).mean().sqrt().item()
    gain = gain.item() - 0.5 * prior.log_determinant.item()
    return LeftOut(cohort.people, gain, (mean.square() / expected).mean().sqrt().item(), spread)


def refuse_shared_people(cohorts: Mapping[str, CohortStatistics]) -> None:
    """Refuse a cohort whose people are all in another one that is hardly larger, such as a later file of a site.

    The sum of squares of each dimension is then no larger. Of other people's it is in some of thousands of dimensions,
    as long as the cohorts differ in size by no more than such sums do by chance.
    """
    for one, other in itertools.permutations(sorted(cohorts), 2):
        smaller, larger = cohorts[one], cohorts[other]
        latents = set(smaller.grids) & set(larger.grids)
        most = smaller.count * (1 + GROWN * (2 / smaller.count + 2 / larger.count) ** 0.5)
        if smaller.weights != larger.weights or not latents or not smaller.count <= larger.count <= most:
            continue
        squares = [part.of_latents(latents).squares for part in (smaller, larger)]
        if (squares[0] * (1 - ROUNDING) <= squares[1]).all():
            raise InputError(
                f"all people of '{one}' seem to be in '{other}', too, and would count twice: name one file for each "
                "cohort."
            )


def with_sites(cohorts: Mapping[str, CohortStatistics]) -> dict[str, CohortStatistics]:
    """Cohorts, of several that do not say their scans' site, each with its name as the site."""
    if len(cohorts) == 1:
        return dict(cohorts)
    return {name: part if SITE in part.variables else _with_site(part, name) for name, part in cohorts.items()}


def _with_site(part: CohortStatistics, site: str) -> CohortStatistics:
    """All scans of a cohort are of one site, whose column is that of 1."""
    places = [*range(len(part.columns)), part.columns.index("")]
    return replace(
        part,
        variables={**part.variables, SITE: "categorical"},
        columns=[*part.columns, f"{SITE}={site}"],
        gram=part.gram[places][:, places],
        moments=part.moments[places],
    )


def merge(cohorts: Mapping[str, CohortStatistics]) -> tuple[PopulationPrior, dict[str, LeftOut], dict[str, float]]:
    """The prior of a union of cohorts.

    The number of factors and how much they are shrunk are those with which the others' prior gains most on a cohort
    that is left out, in the mean over people; of one or two cohorts those that the larger one chose itself, since what
    one scanner has in common with one other says little of a third.

    Args:
        cohorts: by their names; their order does not matter.

    Returns:
        the prior; of each cohort, of two or more, what the others' prior says of it; and ``shrinkage`` and ``gain``.

    Raises:
        InputError: the cohorts do not belong together.
    """
    parts = dict(sorted(with_sites(cohorts).items()))
    fitted = _Fitted.to(list(parts.values()))
    most = min(fitted.union.factors, len(fitted.sketch.basis))
    own = max(parts.values(), key=lambda part: part.count).calibration
    rank, shrinkage, left_out = min(own["factors"], most), own["shrinkage"], {}
    gain = max(own["gains"].values())
    if len(parts) > 1:
        others = {
            n: _Fitted.to([p for m, p in parts.items() if m != n]) for n in tqdm(parts, "without each", unit="site")
        }

        def said(rank: int, shrinkage: float) -> dict[str, LeftOut]:
            return {n: expectation(others[n].prior(rank, shrinkage), part) for n, part in parts.items()}

        def mean_gain(found: Mapping[str, LeftOut]) -> float:
            return sum(cohort.gain * parts[name].count for name, cohort in found.items()) / fitted.union.count

        if len(parts) > 2:
            ranks = sorted({r for r in (*RANKS, most) if r <= most})
            tried = {r: mean_gain(said(r, SHRINKAGES[2])) for r in tqdm(ranks, "how many factors", unit="number")}
            rank = max(tried, key=tried.__getitem__)
            found = {s: mean_gain(said(rank, s)) for s in tqdm(SHRINKAGES, "how much they are shrunk", unit="share")}
            shrinkage = max(found, key=found.__getitem__)
        left_out = said(rank, shrinkage)
        gain = mean_gain(left_out)
    prior = fitted.prior(rank, shrinkage)
    _set_from_held_out(prior, fitted.union)
    return prior, left_out, {"shrinkage": shrinkage, "gain": gain}


def _set_from_held_out(prior: PopulationPrior, union: CohortStatistics) -> None:
    """Take over what each cohort measured of its held-out people under its own prior."""
    known = union.calibration
    if known["familiarity"]:
        cohorts = [Familiarity(**cohort) for cohort in known["familiarity"]]
        prior.familiarity = Familiarity.together(cohorts)._asdict()
    prior.bits_per_dim = torch.tensor(sorted(Counter(known["bits_per_dim"]).elements())) * BITS_STEP
    normal = torch.tensor(sorted(Counter(known["distances"]).elements())) * DISTANCE_STEP
    prior.distances = (normal + (2 * prior.factors - 1) ** 0.5).clamp_min(0) / 2**0.5
    if prior.coding is not None:
        prior.sharpness = SHARPNESSES[int(torch.tensor(known["sharpness"]).argmax())]
        squares, counts = torch.tensor(known["sums"]).split(2)
        spread = (squares / counts.clamp_min(1)).sqrt()
        design = _design(union, prior.coding)[:, 1:]
        known = _known(union, prior.coding)
        prior.correlation = correlation_of(prior.coding, design.T @ union.gram @ design, known)
        prior.dispersion, prior.region_dispersion = torch.where(counts > 0, spread, 1.0).clamp_min(1e-3).tolist()
