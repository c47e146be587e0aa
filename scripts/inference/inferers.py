"""What can be asked of a trained network, each as a MONAI inferer that takes a batch (its docstring says of what).

Scans are ``[batch, channels, *spatial]`` in the range of the network's output activation. Every inferer returns a
dictionary of tensors whose first axis is the batch. The argument ``sampler`` of each call
(:class:`scripts.layers.gaussian.LatentSampler`) draws noise, so that the result of a scan need not depend on its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.layers.factories import Pool
from monai.utils import ensure_tuple
from scripts.data.covariates import Value
from scripts.layers.gaussian import LatentSampler, Posterior, draw, gaussian_noise, with_rule
from scripts.layers.levels import find_level, grid_key
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.joint import draw_values
from scripts.population.prior import PopulationPrior, innovation
from scripts.utils.errors import InputError
from torch import Tensor

Temperature = float | Mapping[int | str, float]

MISSING = 0.3  # the share of a latent's place that is missing, from which on the prior says what lies there


def latents_up_to(network: VDVAE, level: int) -> int:
    """How many latents a level and those coarser than it have."""
    return sum(other >= level for other in network.latent_levels)


def level_temperatures(network: VDVAE, setting: str, temperature: Temperature) -> float | list[float]:
    """A temperature as the network takes it; ``setting`` is its name, for the message.

    One number, or numbers by the grids of the levels that they are for (``{4: 0.5}``), of which others get 1.
    """
    if isinstance(temperature, Mapping):
        grids = network.grids()
        named = {find_level(setting, grid, grids): float(value) for grid, value in temperature.items()}
        return [named.get(level, 1.0) for level in range(network.levels)]
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise InputError(
            f"{setting} is {temperature!r}: give a number, or numbers by grid, such as {{4: 0.5, 8: 0.8}}."
        )
    return float(temperature)


class Reconstruction(Inferer):
    """Reconstruct scans: ``recon`` and ``scale`` (mean and standard deviation of each voxel) and ``zscore``.

    Args:
        temperature: of the posterior; 0 takes its mean. See :func:`level_temperatures`.
        levels: the grid of the finest level whose latents come from the posterior, such as 4; finer ones are the
            prior's mean. None: all come from the posterior. ``"each"``: all, and ``recon_to1``, ``recon_to2``, ... for
            each grid with latents too.
    """

    def __init__(self, temperature: Temperature = 0.0, levels: int | str | None = None) -> None:
        self.temperature = temperature
        self.levels = levels

    def images(self, network: VDVAE) -> list[str]:
        """The names of its results."""
        steps = self._steps(network)
        return ["recon", "scale", "zscore", *(steps if self.levels == "each" else ())]

    def _steps(self, network: VDVAE) -> dict[str, int]:
        """The name of each partial reconstruction, and how many latents it is made from."""
        grids = network.grids()
        if self.levels is None:
            return {}
        if self.levels == "each":
            levels = sorted(set(network.latent_levels), reverse=True)
        else:
            levels = [find_level("levels", self.levels, grids)]
        return {f"recon_to{grid_key(grids[level])}": latents_up_to(network, level) for level in levels}

    def __call__(
        self, inputs: Tensor, network: VDVAE, *args: Any, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        temperature = level_temperatures(network, "temperature", self.temperature)
        if self.levels is None:
            loc, scale, _ = network.infer(inputs, temperature, keep_posteriors=False, sampler=sampler)[0]
            return _with_zscore(inputs, loc, scale)
        latents = network.encode(inputs, temperature, sampler)
        recons = {
            name: network.decode(latents[:count], temperature=0.0) for name, count in self._steps(network).items()
        }
        results = _with_zscore(inputs, *list(recons.values())[-1])
        return results | ({name: loc for name, (loc, _) in recons.items()} if self.levels == "each" else {})


def _with_zscore(inputs: Tensor, loc: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"recon": loc, "scale": scale, "zscore": (inputs - loc) / scale}


class Encoding(Inferer):
    """Encode scans: ``z00``, ``mean00`` and ``std00`` of the coarsest latent's posterior, ``z01``, ... of the next.

    With a population prior also ``coordinates``, ``[batch, factors]``: what its factors are for each scan.

    Args:
        temperature: of z; 0 makes it the mean.
        prior: the network's population prior.
        levels: the grid of the finest level whose latents are given, such as 4; None: all are.
    """

    def __init__(
        self, temperature: Temperature = 0.0, prior: PopulationPrior | None = None, levels: int | str | None = None
    ) -> None:
        self.temperature, self.prior, self.levels = temperature, prior, levels

    def count(self, network: VDVAE) -> int:
        """How many latents it gives."""
        finest = 0 if self.levels is None else find_level("levels", self.levels, network.grids())
        return latents_up_to(network, finest)

    def __call__(
        self, inputs: Tensor, network: VDVAE, *args: Any, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        results = {}
        temperature = level_temperatures(network, "temperature", self.temperature)
        posteriors = network.infer(inputs, temperature, sampler=sampler)[1]
        for index, q in enumerate(posteriors[: self.count(network)]):
            results |= {f"z{index:02d}": q.z, f"mean{index:02d}": q.mean, f"std{index:02d}": q.std}
        if self.prior is not None:
            results["coordinates"] = self.prior.coordinates([innovation(q) for q in posteriors])
        return results


class Decoding(Inferer):
    """Decode latents: ``recon`` and ``scale``. Latents that are left out come from the prior.

    Args:
        temperature: of the prior; 0 takes its mean.
    """

    def __init__(self, temperature: Temperature = 0.0) -> None:
        self.temperature = temperature

    def __call__(
        self, inputs: Sequence[Tensor], network: VDVAE, *args: Any, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """``inputs`` are the first latents, each ``[batch, latent_channels, *grid]``, top first."""
        temperature = level_temperatures(network, "temperature", self.temperature)
        loc, scale = network.decode(inputs, temperature, sampler=sampler)
        return {"recon": loc, "scale": scale}


class CoordinateDecoding(Inferer):
    """Decode coordinates in a population prior: ``sample``, the mean of each voxel given what they stand for.

    Args:
        prior: the network's population prior.
        temperature: of what the coordinates do not say; 0 takes its mean.
    """

    def __init__(self, prior: PopulationPrior, temperature: Temperature = 0.0) -> None:
        self.prior, self.temperature = prior, temperature

    def __call__(
        self, inputs: Tensor, network: VDVAE, *args: Any, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """``inputs`` are ``[batch, factors]``."""
        temperature = level_temperatures(network, "temperature", self.temperature)
        return {"sample": self.prior.decode(network, inputs, temperature, sampler=sampler)[0]}


class Sampling(Inferer):
    """Draw scans from the prior: ``sample``, the mean of each voxel given the latents that were drawn.

    Args:
        temperature: multiplies the prior's standard deviations, see :func:`level_temperatures`; those of a population
            prior's factors too, where it is one number. None: 1 with a population prior, 0.7 without.
        voxel_noise: also draw each voxel from its own distribution, as the likelihood says.
        prior: the population prior to draw from; None draws from the network's own.
        covariates: of the scans, such as ``{"age": 70}``, which the prior knows. Those that are not given are drawn for
            each scan as the cohort has them beside the given ones.
    """

    def __init__(
        self,
        temperature: Temperature | None = None,
        voxel_noise: bool = False,
        prior: PopulationPrior | None = None,
        covariates: Mapping[str, Any] | None = None,
    ) -> None:
        if temperature is None:
            temperature = 0.7 if prior is None else 1.0
        self.temperature, self.voxel_noise, self.prior = temperature, voxel_noise, prior
        self.given: dict[str, Value] = {}
        if covariates is not None:
            if prior is None or prior.coding is None:
                raise InputError("covariates: the samples' population prior knows none; leave out --covariates.")
            self.given = prior.coding.given(covariates)

    def __call__(
        self, inputs: int, network: VDVAE, *args: Any, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """``inputs`` is the number of scans."""
        temperature = level_temperatures(network, "sample_temperature", self.temperature)
        if self.prior is None:
            loc, scale = network.decode([], temperature, batch_size=inputs, sampler=sampler)
        else:
            coordinates = gaussian_noise(self.prior.inverse.new_empty(inputs, self.prior.factors), sampler)
            coordinates = self.prior.spread * coordinates
            if not isinstance(temperature, list):
                coordinates = temperature * coordinates
            features = self._features(inputs, sampler)
            loc, scale = self.prior.decode(network, coordinates, temperature, features, sampler)
        return {"sample": _draw_voxels(loc, scale, network, sampler) if self.voxel_noise else loc}

    def _features(self, count: int, sampler: LatentSampler | None) -> Tensor | None:
        """What the covariates of so many scans become, ``[count, features]``; None where the prior knows none."""
        coding = self.prior.coding
        if coding is None:
            return None
        normals = gaussian_noise(self.prior.inverse.new_empty(count, len(coding.variables)), sampler)
        people = draw_values(coding, self.prior.correlation, self.given, normals)
        return torch.stack([coding.numbers(person) for person in people]).to(self.prior.inverse)


def _draw_voxels(loc: Tensor, scale: Tensor, network: VDVAE, sampler: LatentSampler | None = None) -> Tensor:
    """Draw each voxel from its distribution; what scans are scaled to bounds it."""
    low, high = OUTPUT_RANGES[network.output_activation]
    return (loc + scale * gaussian_noise(loc, sampler)).clamp(low, high)


class Interpolation(Inferer):
    """Scans between two: ``step00`` to ``stepNN``, from the first to the second in equal steps of their latents.

    Latents are the posterior's means, so that the steps lie on straight lines between these, and the ends are the
    reconstructions that :class:`Reconstruction` makes at temperature 0.

    Args:
        steps: how many scans, both ends included.
        levels: grids of the levels whose latents go over to the second scan, such as ``[1, 2]``; the others stay those
            of the first. None: all go over.
    """

    def __init__(self, steps: int = 7, levels: Sequence[int | str] | None = None) -> None:
        if steps < 2:
            raise InputError(f"steps is {steps}: both ends are steps, so that it must be 2 or more.")
        self.steps = steps
        self.levels = None if levels is None else ensure_tuple(levels)

    def images(self) -> list[str]:
        """The names of its results."""
        return [f"step{step:02d}" for step in range(self.steps)]

    def __call__(self, inputs: Tensor, network: VDVAE, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``inputs`` is ``[batch, 2, channels, *spatial]``: the two scans."""
        moving = moving_levels(network, self.levels)
        first, second = (network.encode(inputs[:, end], temperature=0.0) for end in (0, 1))
        moves = [level in moving for level in network.latent_levels]
        results = {}
        for step, name in enumerate(self.images()):
            share = step / (self.steps - 1)
            latents = [torch.lerp(a, b, share) if m else a for a, b, m in zip(first, second, moves, strict=True)]
            results[name] = network.decode(latents, temperature=0.0)[0]
        return results


def moving_levels(network: VDVAE, levels: Sequence[int | str] | None) -> set[int]:
    """The numbers of the levels that :class:`Interpolation` moves."""
    if levels is None:
        return set(range(network.levels))
    grids = network.grids()
    return {find_level("levels_between", grid, grids) for grid in ensure_tuple(levels)}


def prior_where_missing(
    network: VDVAE, mask: Tensor, temperature: float, sampler: LatentSampler | None = None
) -> LatentSampler:
    """What draws latents from their posterior where a scan was observed, and from the prior, at a temperature, where
    the mask, ``[batch, 1, *spatial]``, says that it is missing.
    """
    pool = Pool["ADAPTIVEAVG", network.spatial_dims]
    missing = [pool(grid)(mask.float()) > MISSING for _, *grid in network.latent_grids()]

    def rule(index: int, q: Posterior) -> Tensor:
        mean, std = q.prior_mean, q.prior_std
        if mean is None or std is None:
            mean, std = torch.zeros_like(q.mean), torch.ones_like(q.std)
        return torch.where(missing[index], draw(mean, std, temperature, sampler), q.z)

    return with_rule(sampler, rule)


class Imputation(Inferer):
    """Fill in what is missing, by iterated draws: latents given the scan, then the missing voxels given the latents.

    What is missing starts as the prior's mean scan. Each iteration draws the latents, and the missing voxels from their
    distribution given these; what was observed is put back each time. It is the Markov chain of Rezende et al. 2014
    (arXiv:1401.4082, appendix F), but for the latents of places that are missing: a posterior would take what was
    filled in there for observed, and they are drawn from the prior given the latents above. A draw is what the last
    iteration's latents say of the missing voxels: ``imputed_00``, ``imputed_01``, ..., one for each chain.

    Args:
        iterations: of a chain.
        draws: chains, each from the same start with noise of its own.
        voxel_noise: draws have the last iteration's noise of the voxels too, not just the mean of each.
    """

    def __init__(self, iterations: int = 3, draws: int = 4, voxel_noise: bool = False) -> None:
        for name, value, least in (("iterations", iterations, 1), ("draws", draws, 2)):
            if value < least:
                raise InputError(f"{name} is {value}: it must be {least} or more.")
        self.iterations, self.draws, self.voxel_noise = iterations, draws, voxel_noise

    def images(self) -> list[str]:
        """The names of its results."""
        return [f"imputed_{draw:02d}" for draw in range(self.draws)]

    def __call__(
        self,
        inputs: Tensor,
        network: VDVAE,
        mask: Tensor,
        *args: Any,
        sampler: LatentSampler | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """``mask``, ``[batch, 1, *spatial]``, is true where a voxel is missing, and ``inputs`` are not used there."""
        results = {}
        for name in self.images():
            chain = self.chain(inputs, network, mask, sampler)
            results[name] = next(itertools.islice(chain, self.iterations - 1, None))
        return results

    def chain(
        self, inputs: Tensor, network: VDVAE, mask: Tensor, sampler: LatentSampler | None = None
    ) -> Iterator[Tensor]:
        """A chain without end; yields what the scans would be after each iteration."""
        start = network.decode([], temperature=0.0, batch_size=len(inputs))[0]
        filled = torch.where(mask, start, inputs)
        sampler = prior_where_missing(network, mask, 1.0, sampler)
        while True:
            loc, scale, _ = network.infer(filled, 1.0, keep_posteriors=False, sampler=sampler)[0]
            drawn = _draw_voxels(loc, scale, network, sampler)
            filled = torch.where(mask, drawn, inputs)
            yield filled if self.voxel_noise else torch.where(mask, loc, inputs)
