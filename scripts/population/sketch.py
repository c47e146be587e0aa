"""Mean, variance and leading principal directions of long vectors that come in blocks, in one pass; a prior of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ignite.distributed as idist
import torch
from scripts.networks import VDVAE
from scripts.population.prior import PopulationPrior
from scripts.utils.errors import InputError
from torch import Tensor

LEAST_SHARE = 0.01  # of the variance that is explained, for a latent not to be left out
LEAST_SHRUNK = 0.05  # a direction that is shrunk to less is that of no factor


def fit_bytes(factors: int, features: int, batch_size: int, held_out: int) -> int:
    """Bytes of memory that a fit needs for each dimension of the latents that it takes, at its peak.

    The sketch's 2 factors rows are kept, joined with those of a batch, and made anew; a prior of them has as many rows
    as factors at most; effects have a row per feature, as have the sums that they come from; of held-out scans u and t
    are kept.
    """
    rows = 2 * (4 * factors + batch_size + 2) + 2 * factors + 3 * features + 2 * held_out + 3 * batch_size
    return 4 * rows


def latents_within(network: VDVAE, memory: float, per_dimension: int) -> list[int]:
    """The latents of the coarsest grids, as many as fit into so many bytes; the coarsest in any case."""
    dimensions, chosen = 0, list[int]()
    for level in sorted(set(network.latent_levels), reverse=True):
        of_level = [index for index, other in enumerate(network.latent_levels) if other == level]
        dimensions += sum(math.prod(network.latent_grids()[index]) for index in of_level)
        if chosen and dimensions * per_dimension > memory:
            break
        chosen += of_level
    return chosen


class FactorSketch:
    """Of a posterior's shifts t and ratios r over a cohort: what factor analysis needs, without keeping these.

    Each block of vectors is joined with the directions that are kept by a singular value decomposition of both (the
    incremental principal component analysis of Ross et al. 2008), which is exact up to the variance of the directions
    that were dropped.

    Args:
        directions: how many to keep.
    """

    def __init__(self, directions: int) -> None:
        if directions < 1:
            raise InputError(f"directions is {directions}: it must be 1 or more.")
        self.directions, self.count = directions, 0
        self.mean = self.scatter = self.square = self.basis = torch.zeros(0)

    def add(self, shifts: Tensor, ratios: Tensor) -> None:
        """Take in vectors of shifts and ratios, ``[vectors, dimensions]``, fp32."""
        mean = shifts.mean(0)
        rest = shifts - mean
        self._join(len(shifts), mean, rest, rest.square().sum(0), ratios.square().sum(0))

    def _join(self, count: int, mean: Tensor, rows: Tensor, scatter: Tensor, square: Tensor) -> None:
        """Take in ``count`` vectors about their ``mean``, whose scatter matrix is ``rows^T rows``."""
        if self.count == 0:
            empty = torch.zeros_like(mean)
            self.mean, self.scatter, self.square, self.basis = empty, empty, empty, mean.new_zeros(0, len(mean))
        before = self.count
        self.count = before + count
        shift = mean - self.mean
        between = before * count / self.count
        rows = torch.cat([self.basis, rows, between**0.5 * shift[None]])
        self.mean = self.mean + shift * (count / self.count)
        self.scatter = self.scatter + scatter + between * shift.square()
        self.square = self.square + square
        # of the small Gram matrix: the rows are few and long
        values, vectors = torch.linalg.eigh((rows @ rows.T).double())
        kept = vectors[:, -self.directions :][:, values[-self.directions :] > 1e-6 * values[-1]].float()
        self.basis = kept.flip(1).T @ rows

    def merge(self) -> None:
        """Take in the sketches of all other processes; all then hold the same."""
        if idist.get_world_size() == 1:
            return
        names = ("mean", "basis", "scatter", "square")
        mine = {name: getattr(self, name) for name in names}
        counts = idist.all_gather(self.count)
        self.count = 0
        for rank, count in enumerate(counts):
            if count > 0:
                # one process's at a time, since each may take as much memory as the network
                # with GPUs the receivers get theirs there, and the sender its own on the host
                mean, basis, scatter, square = (
                    idist.broadcast(mine[name] if rank == idist.get_rank() else None, src=rank, safe_mode=True).cpu()
                    for name in names
                )
                self._join(count, mean, basis, scatter, square)

    def eigenvalues(self) -> Tensor:
        """Variances along the directions that are kept, largest first."""
        return self.basis.square().sum(1) / max(self.count - 1, 1)

    def factors(self, rank: int, shrinkage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factor analysis of what has been taken in.

        With fewer vectors than dimensions the largest variances of a sample are too large, by about the mean variance
        per vector; ``shrinkage`` says how much of that is taken off.

        Args:
            rank: how many factors.
            shrinkage: 0 takes the sample's variances as they are.

        Returns:
            mean and residual variance, ``[dimensions]``, the directions, ``[rank, dimensions]``, and by how much these
            are shrunk, ``[rank]``, from 0 to 1.
        """
        values = self.eigenvalues()[:rank]
        excess = shrinkage * self.scatter.sum() / max(self.count - 1, 1) / self.count
        share = (1 - excess / values).clamp_min(0)
        directions = self.basis[:rank] * (share / max(self.count - 1, 1) ** 0.5)[:, None]
        variance = self.scatter / max(self.count - 1, 1) - directions.square().sum(0)
        return self.mean, self.square / self.count + variance.clamp_min(0), directions, share


def split_latents(vectors: Tensor, grids: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """The latents that lie one after the other in vectors, ``[rows, dimensions]``, by their indices: ``[rows, channels,
    *grid]`` each.
    """
    parts = vectors.split([math.prod(grid) for grid in grids.values()], dim=1)
    return {index: part.unflatten(1, grid) for part, (index, grid) in zip(parts, grids.items(), strict=True)}


def prior_from_sketch(
    sketch: FactorSketch, rank: int, shrinkage: float, grids: Mapping[int, Sequence[int]], effects: Tensor | None = None
) -> PopulationPrior:
    """The factor analysis of a sketch as a prior of the latents; those that it hardly concerns are left out.

    Args:
        sketch: of what the covariates' effects leave.
        rank, shrinkage: see :meth:`FactorSketch.factors`.
        grids: ``[channels, *grid]`` of each latent of which the sketch is.
        effects: of the covariates, ``[features, dimensions]``.
    """
    mean, variance, directions, share = sketch.factors(rank, shrinkage)
    effects = mean.new_zeros(0, len(mean)) if effects is None else effects
    parts = [split_latents(part, grids) for part in (mean[None], variance[None], directions, effects)]
    explained = {index: latent.square().sum().item() for index, latent in parts[2].items()}
    total = max(sum(explained.values()), 1e-12)
    # all latents where shrinkage leaves nothing to explain
    kept = [i for i, amount in explained.items() if amount >= LEAST_SHARE * total] or list(explained)
    prior = PopulationPrior(
        *({i: part[i][0] for i in kept} for part in parts[:2]),
        {i: parts[2][i] for i in kept},
        effects={i: parts[3][i] for i in kept},
    )
    prior.spread = torch.where(share > LEAST_SHRUNK, 1 / share, 1.0)
    return prior
