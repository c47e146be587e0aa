"""The population prior: one Gaussian for all latents of a network together, fitted to a cohort after training.

The decoder draws each latent as ``z = m + s u`` with ``u ~ N(0, I)``, where m and s are the prior's mean and standard
deviation given the latents above. In the same coordinates a scan's posterior is ``u ~ N(t, r^2)`` with
``t = (mean - m) / s`` and ``r = std / s``. Since z and u are in bijection, any density of all u together is a valid
prior of the same network. Over a cohort the shifts t lie near a plane of few dimensions, which N(0, I) hardly ever
draws from; here u is modelled by factor analysis (Rubin & Thayer 1982): ``u = mean + W c + e`` with ``c ~ N(0, I)`` and
``e ~ N(0, D)``, D diagonal.

Where covariates of the scans are known, the mean depends on them: ``u = mean + E f + W c + e``, with f the features
that age, sex or site become (:mod:`scripts.data.covariates`), zeros for what is not known. The prior is then that of a
person of this age and sex, a scan's factors are what the covariates do not say, and the likelihood of covariates given
a scan is a quadratic function of f.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scripts.data.covariates import CovariateCoding
from scripts.layers.gaussian import LatentSampler, Posterior, gaussian_noise, log_ratio, with_rule
from scripts.networks import VDVAE, VDVAEOutput
from torch import Tensor, nn

LEAST_VARIANCE = 1e-3  # of a dimension of e: that of a posterior is seldom less
PARTS = ("mean", "variance", "directions", "effects")  # of each latent
OFFSETS = ("offset", "drawn_offset")
MEASURED = (
    *("coding", "correlation", "sharpness", "dispersion", "region_dispersion"),
    *("deviation_scores", "distances", "bits_per_dim"),
)


def innovation(q: Posterior) -> Tensor:
    """The u of a latent: how many of the prior's standard deviations z lies from its mean, fp32, shaped like z."""
    if q.prior_mean is None or q.prior_std is None:
        return q.z.float()
    return (q.z.float() - q.prior_mean) / q.prior_std


def ratio(q: Posterior) -> Tensor:
    """The r of a latent: the posterior's standard deviation over the prior's, fp32, shaped like z."""
    return q.std if q.prior_std is None else q.std / q.prior_std


class PopulationPrior(nn.Module):
    """Factor analysis of the innovations u of all latents.

    Args:
        mean, variance: of each latent that it concerns, by the latent's index (top first): ``[channels, *grid]``.
        directions: the columns of W, ``[factors, channels, *grid]``, likewise. In latents that are left out u stays
            N(0, I).
        distances: Mahalanobis distances of scans of the cohort that the fit has not seen, see :meth:`typicality`.
        bits_per_dim: of the same scans, under the network's own prior.
        effects: the columns of E, ``[features, channels, *grid]``, by the latent's index; None: no covariates.
        coding: of the covariates.
        sharpness: what the log likelihood of covariates given a scan is multiplied by, so that held-out scans are as
            far off as it says; 1 if the model were true.
        dispersion: what the standard deviation that is expected of a voxel is multiplied by, so that held-out scans
            deviate as far as it says; 1 if the model were true.
        region_dispersion: likewise of the mean of a region; None: as of a voxel.

    Attributes:
        factors: their number.
        features: how many features covariates become.
        offset: what each feature adds to each voxel's mean beside its effect on the latents, ``[features, channels,
            *spatial]``, in the range of the network's output, where a scan's own latents are moved; None: nothing.
        drawn_offset: likewise where latents are drawn; None: the same.
        path: of the file that it was read from.
        familiarity: what scans look like, values of a :class:`scripts.population.familiarity.Familiarity`, or None.
        explained: the share of each factor in the variance of u that W explains, ``[factors]``.
        spread: the standard deviation of each factor over the cohort, ``[factors]``: 1 or more, where the directions
            are shrunk to what predicts others best. Samples vary as the cohort does.
        deviation_scores: of held-out scans, sorted: the 99th percentile of their absolute deviation, ``[n]``.
        correlation: of the covariates over the cohort, see :mod:`scripts.population.joint`; None: not known.
    """

    def __init__(
        self,
        mean: Mapping[int, Tensor],
        variance: Mapping[int, Tensor],
        directions: Mapping[int, Tensor],
        distances: Tensor | None = None,
        bits_per_dim: Tensor | None = None,
        effects: Mapping[int, Tensor] | None = None,
        coding: CovariateCoding | None = None,
        sharpness: float = 1.0,
        dispersion: float = 1.0,
        region_dispersion: float | None = None,
    ) -> None:
        super().__init__()
        self.coding, self.sharpness, self.dispersion = coding, sharpness, dispersion
        self.region_dispersion = dispersion if region_dispersion is None else region_dispersion
        self.path: Path | None = None
        self.familiarity: dict[str, Any] | None = None
        self.correlation: Tensor | None = None
        self.deviation_scores = torch.zeros(0)
        self.latents = tuple(sorted(mean))
        self.factors = len(next(iter(directions.values())))
        effects = effects or {index: mean[index].new_zeros(0, *mean[index].shape) for index in self.latents}
        self.features = len(next(iter(effects.values())))
        for index in self.latents:
            self.register_buffer(f"mean_{index}", mean[index].float())
            self.register_buffer(f"variance_{index}", variance[index].float().clamp_min(LEAST_VARIANCE))
            self.register_buffer(f"directions_{index}", directions[index].float())
            self.register_buffer(f"effects_{index}", effects[index].float())
        for name in OFFSETS:
            self.register_buffer(name, None)
        self.register_buffer("distances", (torch.zeros(0) if distances is None else distances).float().sort().values)
        self.register_buffer("bits_per_dim", torch.zeros(0) if bits_per_dim is None else bits_per_dim.float())
        gram = torch.eye(self.factors, dtype=torch.float64, device=mean[self.latents[0]].device)
        variances = gram.new_zeros(self.factors)
        log_variance = gram.new_zeros(())
        cross, squares = gram.new_zeros(self.factors, self.features), gram.new_zeros(self.features, self.features)
        for _, variance_, directions_, effects_ in self._parts():
            columns, rows = directions_.flatten(1).double(), effects_.flatten(1).double()
            scaled = columns / variance_.flatten().double()
            gram += scaled @ columns.T
            cross += scaled @ rows.T
            squares += (rows / variance_.flatten().double()) @ rows.T
            variances += columns.square().sum(1)
            log_variance += variance_.double().log().sum()
        self.explained = variances / variances.sum().clamp_min(1e-12)
        self.register_buffer("spread", torch.ones(self.factors, device=gram.device))
        inverse = torch.linalg.inv(gram)  # of C = I + W^T D^-1 W
        self.register_buffer("inverse", inverse.float())
        self.register_buffer("explained_effects", (inverse @ cross).float())  # C^-1 W^T D^-1 E
        self.register_buffer("information", (squares - cross.T @ inverse @ cross).float())  # E^T (W W^T + D)^-1 E
        self.register_buffer("log_determinant", (log_variance + torch.logdet(gram)).float())

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Mean, variance, directions and effects of each latent that is concerned."""
        return zip(*(self.of_latents(name).values() for name in PARTS), strict=True)

    def of_latents(self, name: str) -> dict[int, Tensor]:
        """Its ``mean``, ``variance``, ``directions`` or ``effects`` of each latent that it concerns, by index."""
        return {index: getattr(self, f"{name}_{index}") for index in self.latents}

    def take_measured(self, other: PopulationPrior) -> None:
        """Take over what another prior's cohort is, and what was measured of held-out scans under it."""
        for name in MEASURED:
            setattr(self, name, getattr(other, name))

    def _projections(
        self, innovations: Sequence[Tensor], features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of v = u - mean - E f: ``W^T D^-1 v``, ``[batch, factors]``; ``E^T D^-1 v``, ``[batch, features]``;
        ``v^T D^-1 v`` and ``u^T u``, ``[batch]``.
        """
        projected = effect = distance = squares = 0.0
        for index, (mean, variance, directions, effects) in zip(self.latents, self._parts(), strict=True):
            u = innovations[index].float()
            rest = u - shifted(mean, effects, features)
            scaled = rest / variance
            projected = projected + scaled.flatten(1) @ directions.flatten(1).T
            effect = effect + scaled.flatten(1) @ effects.flatten(1).T
            distance = distance + (scaled * rest).flatten(1).sum(1, dtype=torch.float64)
            squares = squares + u.square().flatten(1).sum(1, dtype=torch.float64)
        return projected, effect, distance, squares

    def log_ratio(self, innovations: Sequence[Tensor], features: Tensor | None = None) -> Tensor:
        """log p(u) under this prior less that under N(0, I), in nats: ``[batch]``.

        Added to the ELBO of latents that were drawn it gives an unbiased estimate of the ELBO under this prior.

        Args:
            innovations: of all latents, top first, see :func:`innovation`; ``[batch, channels, *grid]`` each.
            features: what the scans' covariates become, ``[batch, features]``; None: they are not known.
        """
        with torch.autocast(innovations[0].device.type, enabled=False):
            projected, _, distance, squares = self._projections(innovations, features)
            explained = (projected @ self.inverse * projected).sum(1)
            return 0.5 * (squares - distance + explained - self.log_determinant)

    def coordinates(self, innovations: Sequence[Tensor], features: Tensor | None = None) -> Tensor:
        """The factors given a scan's latents, ``E[c | u]``: ``[batch, factors]``. N(0, I) at most, over the cohort."""
        with torch.autocast(innovations[0].device.type, enabled=False):
            return self._projections(innovations, features)[0] @ self.inverse

    def effect_scores(self, innovations: Sequence[Tensor]) -> Tensor:
        """All that a scan says of its covariates: ``E^T (W W^T + D)^-1 (u - mean)``, ``[batch, features]``.

        log p(u | f) is this times f, less half of f times :attr:`information` times f, and a constant.
        """
        with torch.autocast(innovations[0].device.type, enabled=False):
            projected, effect, _, _ = self._projections(innovations, None)
            return effect - projected @ self.explained_effects

    def covariate_likelihoods(self, scores: Tensor, features: Tensor) -> Tensor:
        """log p(scan | covariates), up to a constant, of several values of the covariates, which become ``[values,
        features]``: ``[batch, values]``, by the scans' :meth:`effect_scores`.
        """
        features = features.to(scores)
        with torch.autocast(scores.device.type, enabled=False):
            return self.sharpness * (scores @ features.T - 0.5 * ((features @ self.information) * features).sum(1))

    def typicality(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """How far coordinates lie from the cohort's mean.

        Args:
            coordinates: ``[batch, factors]``.

        Returns:
            the Mahalanobis distance, ``[batch]``, whose square is chi-squared with as many degrees of freedom as there
            are factors, if the model is true; and the share of the cohort that lies at least so far, ``[batch]``, NaN
            where the cohort's distances are not known.
        """
        # under the model coordinates have the covariance I - C^-1, singular where a factor explains nothing
        covariance = torch.eye(self.factors, device=coordinates.device) - self.inverse
        with torch.autocast(coordinates.device.type, enabled=False):
            solved = coordinates @ torch.linalg.pinv(covariance, hermitian=True)
        distance = (coordinates * solved).sum(1).clamp_min(0).sqrt()
        if len(self.distances) == 0:
            return distance, torch.full_like(distance, float("nan"))
        beyond = len(self.distances) - torch.searchsorted(self.distances, distance)
        return distance, (1 + beyond) / (1 + len(self.distances))

    def innovations(
        self,
        coordinates: Tensor,
        temperature: float | Sequence[float] = 1.0,
        features: Tensor | None = None,
        sampler: LatentSampler | None = None,
    ) -> dict[int, Tensor]:
        """A draw of u given the factors, by the latents' indices: ``[batch, channels, *grid]`` each.

        Args:
            coordinates: ``[batch, factors]``.
            temperature: multiplies the standard deviation of e; one number, or one per latent.
            features: what the covariates become, ``[batch, features]``; None: they are not known.
            sampler: whose generators draw e.
        """
        drawn = {}
        with torch.autocast(coordinates.device.type, enabled=False):
            for index, (mean, variance, directions, effects) in zip(self.latents, self._parts(), strict=True):
                u = shifted(mean, effects, features) + (coordinates @ directions.flatten(1)).unflatten(1, mean.shape)
                factor = temperature if isinstance(temperature, int | float) else temperature[index]
                drawn[index] = u + factor * variance.sqrt() * gaussian_noise(u, sampler) if factor else u
        return drawn

    def decode(
        self,
        network: VDVAE,
        coordinates: Tensor,
        temperature: float | list[float] = 1.0,
        features: Tensor | None = None,
        sampler: LatentSampler | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scans given the factors and the covariates: mean and standard deviation of each voxel.

        Args:
            network: to whose latents the prior belongs.
            coordinates: ``[batch, factors]``.
            temperature: of what the factors do not say; one number, or one per level of the network, finest first.
            features: what the covariates become, ``[batch, features]``; None: they are not known.
            sampler: whose generators draw all noise.

        Returns:
            loc and scale, ``[batch, channels, *spatial]``.
        """
        of_latents = temperature
        if isinstance(temperature, list):
            of_latents = [temperature[level] for level in network.latent_levels]
        sampler = given_innovations(self.innovations(coordinates, of_latents, features, sampler), sampler)
        loc, scale = network.decode([], temperature, batch_size=len(coordinates), sampler=sampler)
        added = self.added(features, drawn=True)
        return loc + (added.to(loc) if isinstance(added, Tensor) else added), scale

    def sample(self, network: VDVAE, features: Tensor, sampler: LatentSampler | None = None) -> tuple[Tensor, Tensor]:
        """Scans drawn under covariates, one for each row of ``features``; loc and scale, see :meth:`decode`."""
        coordinates = gaussian_noise(self.inverse.new_empty(len(features), self.factors), sampler)
        return self.decode(network, coordinates, 1.0, features, sampler)

    def added(self, features: Tensor | None, drawn: bool = False) -> Tensor | float:
        """What covariates add to the mean of each voxel beside their effect on the latents, ``[batch, channels,
        *spatial]``.

        Args:
            features: what they become, or by how much that changes, ``[batch, features]``.
            drawn: whether the latents are drawn, and not a scan's own that are moved.
        """
        offset = self.drawn_offset if drawn and self.drawn_offset is not None else self.offset
        if features is None or offset is None:
            return 0.0
        return _weighted(offset, features)

    def expected(self, features: Tensor) -> dict[int, Tensor]:
        """The mean of u under covariates, ``[batch, channels, *grid]`` each, by the latents' indices."""
        return {
            index: shifted(mean, effects, features)
            for index, (mean, _, _, effects) in zip(self.latents, self._parts(), strict=True)
        }

    def moved(self, innovations: Sequence[Tensor], change: Tensor) -> dict[int, Tensor]:
        """Innovations of all latents of the same scans under covariates that become so much more, ``[batch,
        features]``: ``[batch, channels, *grid]`` each, by index.
        """
        moved = dict(enumerate(innovations))
        for index, (_, _, _, effects) in zip(self.latents, self._parts(), strict=True):
            moved[index] = shifted(innovations[index].float(), effects, change)
        return moved


class LatentRecord:
    """What is needed of the latents of one pass: not these, which would take most of the memory.

    Innovations are kept of the latents that the population prior concerns, others are left empty; ``log_ratio`` is
    summed over all latents if asked for, see :func:`scripts.layers.gaussian.log_ratio`, else it is 0.
    """

    def __init__(self, prior: PopulationPrior | None, with_ratios: bool = False) -> None:
        self.concerned = () if prior is None else prior.latents
        self.with_ratios = with_ratios
        self.innovations: list[Tensor] = []
        self.log_ratio: Tensor | float = 0.0

    def infer(
        self, network: VDVAE, scans: Tensor, temperature: float, sampler: LatentSampler | None = None
    ) -> VDVAEOutput:
        """The network's output for scans, recorded."""
        sampler = with_rule(sampler, self._record)
        return network.infer(scans, temperature, keep_posteriors=False, sampler=sampler)[0]

    def _record(self, index: int, q: Posterior) -> Tensor:
        self.innovations.append(innovation(q) if index in self.concerned else q.mean.new_zeros(0))
        if self.with_ratios:
            self.log_ratio = self.log_ratio + log_ratio(q)
        return q.z


def given_innovations(innovations: Mapping[int, Tensor], sampler: LatentSampler | None = None) -> LatentSampler:
    """What lets ``network.decode([], ..., sampler=...)`` take these u, ``[batch, channels, *grid]`` each by the
    latents' indices; those that are left out are drawn as usual, by the generators of ``sampler``.
    """

    def rule(index: int, p: Posterior) -> Tensor:
        u = innovations.get(index)
        return p.z if u is None else p.mean + p.std * u.to(p.mean.device)

    return with_rule(sampler, rule)


def shifted(mean: Tensor, effects: Tensor, features: Tensor | None) -> Tensor:
    """``mean + E f`` of a latent: ``[batch, channels, *grid]``, or the mean as it is where nothing is known."""
    if features is None:
        return mean
    return mean + _weighted(effects, features)


def _weighted(effects: Tensor, features: Tensor) -> Tensor:
    """``E f``, ``[batch, channels, *grid]``."""
    with torch.autocast(effects.device.type, enabled=False):
        return (features.to(effects) @ effects.flatten(1)).unflatten(1, effects.shape[1:])


def fingerprint(network: nn.Module) -> str:
    """What tells the weights of a network from all others: a checksum of its state dict."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return checksum.hexdigest()
