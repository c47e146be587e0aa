"""What a cohort's scans look like to its network, so that it can be said of another scan whether it is such a one.

Of each scan a few numbers are taken from one pass of the network (:func:`statistics`): how badly each part of it is
predicted, what the latents of each grid cost, how much of the brain is missing, how far its coordinates lie in the
population prior. Over the people of a cohort these are nearly Gaussian, and their Mahalanobis distance says how unusual
a scan is (density of states, Morningstar et al. 2021, arXiv:2006.09273): a likelihood alone does not, since what is
smooth or dark is likely whatever it shows.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from monai.data import DataLoader
from monai.data.utils import affine_to_spacing
from monai.networks.layers.factories import Pool
from monai.networks.utils import eval_mode
from scipy import stats
from scripts.data.datalist import spaced
from scripts.layers.levels import grid_name
from scripts.layers.output import foreground
from scripts.networks import OUTPUT_RANGES, VDVAE, VDVAEOutput
from scripts.population.prior import LatentRecord, PopulationPrior
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.utils.devices import on_device
from scripts.utils.names import one_of_each
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

POPULATION = "population"  # the name of the number that a prior's coordinates give
MISSING = "missing"  # the name of the share of the brain that is black
FALSE_ALARMS = 0.01  # the share of people like those of the cohort who are said to be unlike them
LEAST_ALIKE = 5  # scans that are unlike the cohort's, from which on they may be of a kind of their own: a scanner's
QUANTILES = 33  # of a scan's tissue
MOST_PEOPLE = 256  # of either kind whom what is familiar is taken from
MASKED = 16  # people whose brains are masked otherwise, at least, and at most of those whom the network was trained on
BLACK = 0.005  # of the range that scans are scaled to: darker than CSF or what a stroke leaves
LEAST_MISSING = 0.01  # share of the brain that is added before its logarithm is taken
LEAST_STD = 0.05  # of a voxel over people, where a deviation is divided by it; the range is 2
LEAST_SPREAD = 0.003  # of a statistic: people may be alike by chance
LEAST_BLACK = 0.2  # likewise, of the logarithm of what is missing: what a stroke leaves may be black in places
LEAST_NATS = 1.0  # likewise, of what the latents of a grid cost: those that hold next to nothing differ by thousandths
EDGE = 0.5  # mm, standard deviation over a brain's surface of where another tool sees its edge
EDGE_LENGTH = 15.0  # mm along the surface, on which that changes
PLACE = 30.0  # mm, the edge of the cubes in which it is seen where in a brain a scan is unlikely
LEAST_BRAIN = 1 / 3  # the share of a cube that is brain, from which on it counts
BY_ONE = 0.5  # share of these cubes that are less likely than usual by a standard deviation, where all of a brain is
MOST_IN_FEW = 0.35  # of what is lost there, the share that a tenth of the cubes may have where it is spread evenly


class Look(NamedTuple):
    """How a network sees some scans.

    Attributes:
        bits_per_dim: at the means of the posteriors, ``[batch]``.
        statistics: ``[batch, numbers]``, see :func:`statistics`.
        surprise: how unlikely the voxels of each cube of the brain are, ``[batch, cubes]``, see :func:`surprise`.
    """

    bits_per_dim: Tensor
    statistics: Tensor
    surprise: Tensor


def reference(network: VDVAE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each voxel as the network knows its cohort, ``[1, channels, *spatial]``."""
    known = network.voxel_gaussian()
    loc, scale = network.decode([], 0.0) if known is None else known
    return loc, scale.clamp_min(LEAST_STD)


def parts(network: VDVAE) -> dict[str, Tensor]:
    """Where the cohort's brains, their border and what lies around them are: masks, ``[*spatial]``, by name."""
    mean, std = reference(network)
    low, _ = OUTPUT_RANGES[network.output_activation]
    inside = foreground(mean, network).any(1)[0]
    surely = (mean - 2 * std > low).any(1)[0] & inside
    return {"brain": surely, "border": inside & ~surely, "background": ~inside}


def _or_all(mask: Tensor) -> Tensor:
    """A mask; where it is empty, that of all voxels."""
    return mask if mask.any() else torch.ones_like(mask)


def _statistic_names(network: VDVAE, prior: PopulationPrior | None) -> list[str]:
    """Of the numbers of :func:`statistics`."""
    axes = [f"roughness {axis}" for axis in "xyz"[: network.spatial_dims]]
    population = [] if prior is None else [POPULATION]
    return ["brain", "border", "background", *axes, *_grids(network), MISSING, *population]


def _grids(network: VDVAE) -> list[str]:
    """Names of the grids that have latents, finest first."""
    return [grid_name(network.grids()[level]) for level in sorted(set(network.latent_levels))]


def least_spread(names: Sequence[str], mean: Tensor, grids: Sequence[str]) -> Tensor:
    """By how much statistics of scans that are as usual may differ at least, ``[numbers]``, by their means over people.

    ``grids`` names those that are logarithms of 1 and what the latents of a grid cost, in nats.
    """
    of_cost, of_black = (torch.tensor([name in these for name in names]) for these in (grids, [MISSING]))
    return torch.where(of_cost, LEAST_NATS * (-mean).exp(), torch.where(of_black, LEAST_BLACK, LEAST_SPREAD))


def look(
    network: VDVAE, scans: Tensor, prior: PopulationPrior | None = None, where: Mapping[str, Tensor] | None = None
) -> Look:
    """One pass of the network over scans, ``[batch, channels, *spatial]`` in its range, the latents being the
    posteriors' means; nothing is said to the prior of covariates. ``where`` is what :func:`parts` gave, if it is known.
    """
    where = parts(network) if where is None else where
    record = LatentRecord(prior)
    output = record.infer(network, scans, temperature=0.0)
    bits = bits_per_dim(negative_log_likelihood(output.loc, output.scale, scans) + output.kl.sum(1), scans)
    numbers = statistics(network, scans, output, record.innovations, where, prior)
    return Look(bits, numbers, surprise(network, scans, output, where["brain"]))


def surprise(network: VDVAE, scans: Tensor, output: VDVAEOutput, brain: Tensor) -> Tensor:
    """The mean of the voxels' negative log densities in each cube that has enough brain, nats: ``[batch, cubes]``; of a
    pass whose latents are the posteriors' means. The brain is a mask, ``[*spatial]``, see :func:`parts`.
    """
    rank = network.spatial_dims
    spacing = affine_to_spacing(network.scan_affine, rank).tolist()
    sizes = [min(size, max(1, round(PLACE / mm))) for size, mm in zip(scans.shape[2:], spacing, strict=True)]
    pool = Pool["AVG", rank](sizes, ceil_mode=True)
    brain = _or_all(brain).to(scans)[None, None]
    unlikely = -torch.distributions.Normal(output.loc, output.scale).log_prob(scans).mean(1, keepdim=True)
    share = pool(brain)
    enough = share >= torch.clamp(share.max(), max=LEAST_BRAIN)
    return (pool(unlikely * brain) / share)[:, enough[0]].double()


def statistics(
    network: VDVAE,
    scans: Tensor,
    output: VDVAEOutput,
    innovations: Sequence[Tensor],
    where: Mapping[str, Tensor],
    prior: PopulationPrior | None = None,
) -> Tensor:
    """What is compared of scans, ``[batch, numbers]``: what the prior's file names, or all where it says nothing.

    The bits per dim of the voxels in the brain, its border and the background; the logarithms of neighbours'
    differences along each axis, of what the latents of each grid cost, finest first, of how much of the brain is
    missing, and of the distance from the population's mean, without what is known of covariates. Output and innovations
    are of a pass whose latents are the posteriors' means; those of latents that the prior does not concern may be
    empty. ``where`` is what :func:`parts` gives.
    """
    log_density = torch.distributions.Normal(output.loc, output.scale).log_prob(scans)
    numbers = [-(log_density * part).flatten(1).sum(1) for part in where.values()]
    numbers = [bits_per_dim(number, scans) for number in numbers]
    numbers += [values.log() for values in roughness(scans)]
    levels = torch.tensor(network.latent_levels, device=output.kl.device)
    of_grids = [output.kl[:, levels == level].sum(1) for level in sorted(set(network.latent_levels))]
    numbers += [kl.clamp_min(0).log1p() for kl in of_grids]
    core, (low, high) = where["brain"], OUTPUT_RANGES[network.output_activation]
    black = (scans <= low + BLACK * (high - low)).all(1)[:, _or_all(core)]
    numbers.append((LEAST_MISSING + black.float().mean(1)).log())
    if prior is not None:
        numbers.append(prior.typicality(prior.coordinates(innovations))[0].log1p())
    found, known = torch.stack([number.double() for number in numbers], dim=1), Familiarity.of(prior)
    if known is None:
        return found
    names = _statistic_names(network, prior)
    return found[:, [names.index(name) for name in known.names]]


def roughness(scans: Tensor) -> list[Tensor]:
    """The mean square of neighbouring voxels' differences along each axis, ``[batch]``: what blurring takes away."""
    squares = (scans.diff(dim=axis).square() for axis in range(2, scans.ndim))
    return [values.flatten(1).mean(1).clamp_min(1e-12) for values in squares]


def tissue_quantiles(scan: Tensor, inside: Tensor) -> Tensor:
    """Of each channel's voxels of a mask, or all where it is empty, ``[channels, QUANTILES]``."""
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device=scan.device)
    values = scan.double()[:, _or_all(inside)]
    return torch.stack([torch.quantile(channel[:: 1 + len(channel) // 2**20], at) for channel in values]).float()


def masked_otherwise(network: VDVAE, scans: Tensor, seeds: Iterable[int]) -> Tensor:
    """The same scans, ``[batch, channels, *spatial]``, as another tool might have taken the brain out of its skull:
    tighter in places, looser in others, by a seed for each scan.

    Where the edge lies farther out there is a share of tissue in the voxels around the brain, where it lies farther in
    there is less in the outermost ones.
    """
    low, _ = OUTPUT_RANGES[network.output_activation]
    shape, rank = scans.shape[2:], scans.ndim - 2
    spacing = affine_to_spacing(network.scan_affine, rank).mean().item()
    coarse = [max(2, round(size * spacing / EDGE_LENGTH)) for size in shape]
    mode = {2: "bilinear", 3: "trilinear"}[rank]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    field, everywhere = (
        torch.stack([torch.randn(1, *size, generator=generator) for generator in generators])
        for size in (coarse, [1] * rank)
    )
    field = interpolate(field, shape, mode=mode, align_corners=True)
    field /= field.std(tuple(range(1, rank + 2)), keepdim=True)
    edge = (EDGE / spacing * (field + everywhere) / math.sqrt(2)).to(scans)  # voxels, outwards
    inside = foreground(scans, network).any(1, keepdim=True).to(scans)
    pool = Pool["AVG", rank](3, 1, 1)
    near = pool(inside)
    tissue = pool((scans - low) * inside) / near.clamp_min(1e-6)  # the mean of the brain nearby
    looser = torch.maximum(scans, low + tissue * edge.clamp(0, 1))
    tighter = low + (scans - low) * (1 + edge.clamp(-1, 0))
    at_edge = pool(1 - inside) > 0
    return torch.where((inside == 0) & (near > 0), looser, torch.where((inside > 0) & at_edge, tighter, scans))


class Familiarity(NamedTuple):
    """What the numbers of :func:`statistics` are over a cohort.

    Attributes:
        names: of the numbers.
        mean: of people whom the network was not trained on, ``[numbers]``.
        covariance: of people, as wide as those whom it was not trained on vary, ``[numbers, numbers]``.
        people: how many were held out, and how many the covariance is of.
        bits_per_dim: the usual ones, at the means of the posteriors.
        quantiles: the usual ones in the brain, ``[channels, QUANTILES]``, from 0 (background) to 1.
        surprise: mean and standard deviation of :func:`surprise`, ``[2, cubes]``; None in files of before 0.18.0.
        added: scans of other kinds that were added later, such as another scanner's.
    """

    names: Sequence[str]
    mean: Tensor
    covariance: Tensor
    people: tuple[int, int]
    bits_per_dim: float
    quantiles: Tensor
    surprise: Tensor | None = None
    added: Sequence[tuple[Tensor, Tensor, int]] = ()

    @classmethod
    def of(cls, prior: PopulationPrior | None) -> Familiarity | None:
        """That which a population prior's file holds; None where it holds none."""
        return None if prior is None or prior.familiarity is None else cls(**prior.familiarity)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the covariance, that a distance has."""
        return max(1, self.people[1] - 1 - len(self.names))

    def distance(self, statistics: Tensor) -> Tensor:
        """How far scans are from what is usual, in standard deviations of the cohort: ``[batch]``.

        Of several kinds of scans that are usual the nearest counts.
        """
        kinds = ((self.mean, self.covariance, self.people[0]), *self.added)
        return torch.stack([self._apart(statistics, *kind) for kind in kinds]).amin(0)

    def _apart(self, statistics: Tensor, mean: Tensor, covariance: Tensor, people: int) -> Tensor:
        """The distance of scans from a mean of so many people, in terms of the limit, which is that for the held-out
        ones' mean.
        """
        apart = statistics.cpu().double() - mean.double()
        squares = (apart @ torch.linalg.inv(covariance.double()) * apart).sum(1).clamp_min(0)
        return (squares * (1 + 1 / self.people[0]) / (1 + 1 / people)).sqrt()

    def _numbers(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and covariance of some of the numbers."""
        places = [self.names.index(name) for name in names]
        return self.mean[places], self.covariance[places][:, places]

    @classmethod
    def together(cls, cohorts: Sequence[Familiarity]) -> Familiarity:
        """That of several cohorts, each a kind of its own, but for coordinates: these are of each one's own prior."""
        first, *others = sorted(cohorts, key=lambda cohort: cohort.people, reverse=True)
        shared = set.intersection(*(set(cohort.names) for cohort in cohorts)) - {POPULATION}
        names = [name for name in first.names if name in shared]
        (mean, covariance), *kinds = (cohort._numbers(names) for cohort in (first, *others))
        added = [(*numbers, other.people[0]) for numbers, other in zip(kinds, others, strict=True)]
        weights = torch.tensor([cohort.people[0] for cohort in cohorts], dtype=torch.float64)
        weights /= weights.sum()
        bits = weights @ torch.tensor([cohort.bits_per_dim for cohort in cohorts], dtype=torch.float64)
        quantiles = torch.stack([cohort.quantiles for cohort in cohorts]).double()
        surprise = None
        if all(cohort.surprise is not None for cohort in cohorts):
            means, stds = torch.stack([cohort.surprise for cohort in cohorts]).double().unbind(1)
            middle = weights @ means
            surprise = torch.stack([middle, (weights @ (stds.square() + (means - middle).square())).sqrt()])
        return first._replace(
            names=names,
            mean=mean,
            covariance=covariance,
            bits_per_dim=float(bits),
            quantiles=torch.tensordot(weights, quantiles, 1).float(),
            surprise=surprise,
            added=added,
        )

    def everywhere(self, surprise: Tensor) -> Tensor:
        """Whether scans are less likely than usual all over their brains, see :func:`surprise`, as those of another
        scanner are: ``[batch]``. What a disease does to a brain has its places.
        """
        if self.surprise is None:
            return torch.zeros(len(surprise), dtype=torch.bool)
        mean, std = self.surprise.double()
        lost = surprise.cpu() - mean
        most = lost.topk(math.ceil(lost.shape[1] / 10)).values.sum(1) / lost.clamp_min(0).sum(1)
        return ((lost > std).double().mean(1) > BY_ONE) & (most < MOST_IN_FEW)

    def also(self, statistics: Tensor) -> Familiarity:
        """The same, with scans of another kind that are usual too, ``[scans, numbers]``.

        How these vary is added to how the cohort does, the less of it the fewer they are.
        """
        mean, people = statistics.mean(0), len(statistics)
        apart = statistics - mean
        covariance = self.covariance + apart.T @ apart / (len(self.names) + people - 1)
        return self._replace(added=(*self.added, (mean, covariance, people)))

    def alike(self, statistics: Tensor) -> Tensor:
        """Which scans would be usual if the others of them, two or more, were: ``[scans]``."""
        others = (statistics.sum(0) - statistics) / (len(statistics) - 1)
        return self._apart(statistics, others, self.covariance, len(statistics) - 1) <= self.limit()

    def limit(self, false_alarms: float = FALSE_ALARMS) -> float:
        """The distance beyond which so many people like those of the cohort lie (Hotelling 1931).

        The fewer people there were to tell, the wider it is.
        """
        held_out, people = self.people
        wider = (1 + 1 / held_out) * len(self.names) * max(1, people - 1) / self.freedom
        return math.sqrt(wider * stats.f.isf(false_alarms, len(self.names), self.freedom))

    def unfamiliarity(self, statistics: Tensor) -> Tensor:
        """The distance of scans over the limit, ``[batch]``: above 1 the cohort has no such scans."""
        return self.distance(statistics) / self.limit()


@torch.no_grad()
def fit_familiarity(
    network: VDVAE,
    prior: PopulationPrior,
    held_out: Dataset,
    training: Dataset,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The :class:`Familiarity` of a cohort as plain values, by one scan of each person; with several processes each
    takes its share.

    Of those who are held out comes what is usual, of all how far people are from that; it is widened where the former
    vary more. Whom the network was trained on it knows a little better, and their coordinates are larger: they are
    usual too. So is what another brain mask changes (:func:`masked_otherwise`), of those who are held out or, where
    these are few, of some of the others: its mean squares are added.
    """
    people = [(dataset, one_of_each(dataset)) for dataset in (held_out, training)]
    held_out, training = (
        Subset(dataset, [places[place] for place in spaced(len(places), MOST_PEOPLE)]) for dataset, places in people
    )
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    rows, others = (_looks(network, prior, dataset, device, False, **loading) for dataset in (held_out, training))
    to_mask, unmasked = held_out, rows.statistics
    if len(held_out) < MASKED:
        some = spaced(len(training), MASKED)
        to_mask, unmasked = Subset(training, some), others.statistics[some]
    masked = _looks(network, prior, to_mask, device, True, **loading)
    names, count = _statistic_names(network, prior), len(held_out)
    mean = rows.statistics.mean(0)
    apart = torch.cat([rows.statistics, others.statistics]) - mean
    covariance = apart.T @ apart / max(1, len(apart) - 1) + least_spread(names, mean, _grids(network)).square().diag()
    if count > 1:
        squares = (apart[:count] @ torch.linalg.inv(covariance) * apart[:count]).sum(1).mean()
        covariance *= (squares / len(names) * count / (count - 1)).clamp_min(1.0)
    changed = masked.statistics - unmasked
    covariance += changed.T @ changed / len(changed)
    usual = rows.surprise.mean(0)
    spread = (torch.cat([rows.surprise, others.surprise]) - usual).square().mean(0).sqrt().clamp_min(LEAST_SPREAD)
    people, bits = (count, len(apart)), rows.bits_per_dim.mean().item()
    quantiles, places = rows.quantiles.mean(0), torch.stack([usual, spread])
    return Familiarity(names, mean, covariance, people, bits, quantiles, places)._asdict()


@torch.no_grad()
def also_familiar(
    network: VDVAE,
    prior: PopulationPrior,
    dataset: Dataset,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any] | None:
    """What is familiar to a prior, and scans of another kind beside it, one of each person, plain values; None where it
    does not tell.
    """
    known = Familiarity.of(prior)
    if known is None:
        return None
    dataset = Subset(dataset, one_of_each(dataset))
    seen = _looks(network, prior, dataset, device, False, batch_size=batch_size, num_workers=num_workers)
    return known.also(seen.statistics)._asdict()


class _Looks(NamedTuple):
    """Of scans, in their order, double precision: each value of a :class:`Look`, and quantiles of the brain."""

    bits_per_dim: Tensor
    statistics: Tensor
    surprise: Tensor
    quantiles: Tensor


def _looks(
    network: VDVAE,
    prior: PopulationPrior,
    dataset: Dataset,
    device: torch.device | str,
    otherwise: bool,
    **loading: int,
) -> _Looks:
    """Of a data set, in its order; masked otherwise if so."""
    rank, size = idist.get_rank(), idist.get_world_size()
    places = range(rank, len(dataset), size)
    share, seeds = Subset(dataset, places), iter(places)
    loader = on_device(DataLoader(share, **loading), torch.device(device))
    (low, high), rows = OUTPUT_RANGES[network.output_activation], []
    where = parts(network)
    prior = copy.deepcopy(prior).to(device)
    with eval_mode(network):
        for batch in tqdm(loader, "what is familiar", unit="batch", disable=rank > 0, mininterval=1):
            scans = torch.as_tensor(batch["image"]).as_subclass(Tensor).to(device)
            if otherwise:
                scans = masked_otherwise(network, scans, itertools.islice(seeds, len(scans)))
            quantiles = torch.stack([tissue_quantiles((scan - low) / (high - low), where["brain"]) for scan in scans])
            values = _Looks(*look(network, scans, prior, where), quantiles)
            rows += zip(*(value.cpu().double() for value in values), strict=True)
    of_ranks = idist.all_gather(rows)
    ordered = [of_ranks[place % size][place // size] for place in range(len(dataset))]
    return _Looks(*map(torch.stack, zip(*ordered, strict=True)))
