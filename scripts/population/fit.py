"""Fitting the population prior of a trained network to its cohort: see :mod:`scripts.population.prior`."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.networks.utils import eval_mode
from scripts.data.covariate_tables import CohortCovariates
from scripts.layers.gaussian import Posterior
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.effects import Effects
from scripts.population.prior import PopulationPrior, fingerprint, given_innovations, innovation, ratio
from scripts.population.sketch import FactorSketch
from scripts.training.checkpoints import unwrap
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.utils.devices import on_device
from scripts.utils.errors import InputError
from scripts.utils.files import write_whole
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

logger = logging.getLogger(__name__)

LEAST_HELD_OUT = 16  # validation scans; with fewer some of the training scans choose too
MOST_HELD_OUT = 128  # scans that choose: their latents are kept in memory
RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
DISPERSION_SCANS, DISPERSION_DRAWS = 32, 16  # held-out scans whose deviations are looked at, of each process
OFFSET_SCANS = 32  # that are decoded for the mean differences, of each process
SHARPNESSES = tuple(2.0 ** (k / 2) for k in range(-12, 9))
LEAST_SHARE = 0.01  # of the variance that is explained, for a latent not to be left out


def split_latents(vectors: Tensor, network: VDVAE) -> list[Tensor]:
    """The latents that lie one after the other in vectors, ``[rows, dimensions]``: ``[rows, channels, *grid]`` each."""
    grids = network.latent_grids()
    parts = vectors.split([math.prod(grid) for grid in grids], dim=1)
    return [part.unflatten(1, grid) for part, grid in zip(parts, grids, strict=True)]


def shifts_and_ratios(posteriors: Sequence[Posterior]) -> tuple[Tensor, Tensor]:
    """The shifts t and the ratios r of scans, ``[batch, dimensions]`` each, the latents one after the other."""
    shifts = [innovation(q._replace(z=q.mean)).flatten(1) for q in posteriors]
    return torch.cat(shifts, dim=1), torch.cat([ratio(q).flatten(1) for q in posteriors], dim=1)


def prior_from_sketch(
    sketch: FactorSketch, rank: int, shrinkage: float, network: VDVAE, effects: Tensor | None = None
) -> PopulationPrior:
    """The factor analysis of a sketch as a prior of the latents; those that it hardly concerns are left out.

    Args:
        sketch: of what the covariates' effects leave.
        rank, shrinkage: see :meth:`FactorSketch.factors`.
        network: whose latents they are.
        effects: of the covariates, ``[features, dimensions]``.
    """
    mean, variance, directions = sketch.factors(rank, shrinkage)
    effects = mean.new_zeros(0, len(mean)) if effects is None else effects
    parts = [split_latents(part, network) for part in (mean[None], variance[None], directions, effects)]
    explained = torch.stack([latent.square().sum() for latent in parts[2]])
    shares = (explained / explained.sum().clamp_min(1e-12)).tolist()
    # all latents where shrinkage leaves nothing to explain
    kept = [i for i, share in enumerate(shares) if share >= LEAST_SHARE] or list(range(len(shares)))
    return PopulationPrior(
        *({i: part[i][0] for i in kept} for part in parts[:2]),
        {i: parts[2][i] for i in kept},
        effects={i: parts[3][i] for i in kept},
    )


def _gather(batches: Sequence[Tensor]) -> list[float]:
    """One number per scan, ``[batch]`` each, of all processes."""
    here = [number for batch in batches for number in batch.tolist()]
    return list(itertools.chain(*idist.all_gather(here)))


class ScanVectors(NamedTuple):
    """Of some scans: innovations, shifts and ratios, ``[batch, dimensions]``, bits per dim, covariates, scans."""

    u: Tensor
    t: Tensor
    r: Tensor
    bits_per_dim: Tensor
    features: Tensor
    scans: Tensor


class _Scans(Dataset):
    """Scans with the features that their covariates become."""

    def __init__(self, dataset: Dataset, features: Tensor | None) -> None:
        self.dataset = dataset
        self.features = torch.zeros(len(dataset), 0) if features is None else features

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.as_tensor(self.dataset[index]["image"]).as_subclass(Tensor)
        return {"image": image, "features": self.features[index]}


class PopulationFit:
    """Fits a population prior to the scans that a network was trained on, and saves it beside the weights.

    Every process takes its share of the scans, of which no latents are kept. The number of factors and how much their
    variance is shrunk are those with the highest likelihood of scans that the fit has not seen: the validation scans,
    or where these are few a fifth of the training scans, which are taken in afterwards.

    Args:
        network: trained.
        training, validation: data sets of plain scans, as the network gets them.
        path: of the file that is written.
        factors: how many at most; 0 fits nothing.
        batch_size, num_workers: of the data loader.
        device: of the network.
        seed: of the latents' noise.
        covariates: of the scans; None: there are none.
        extras: what else the file holds, plain values.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        training: Dataset,
        validation: Dataset,
        path: str | os.PathLike,
        factors: int = 64,
        batch_size: int = 8,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
        covariates: CohortCovariates | None = None,
        extras: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(factors, bool) or not isinstance(factors, int) or factors < 0:
            raise InputError(f"prior_factors is {factors!r}: set it to a whole number, 0 for no population prior.")
        self.network, self.path, self.factors = unwrap(network), Path(path), factors
        self.coding = covariates and covariates.coding
        self.training = _Scans(training, covariates and covariates.training)
        self.validation = _Scans(validation, covariates and covariates.validation)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.device, self.seed, self.extras = torch.device(device), seed, extras or {}

    def attach(self, engine: Engine) -> None:
        """Fit after the last epoch; not where a signal ends training before."""
        if self.factors:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)

    def _after_epoch(self, engine: Engine) -> None:
        if engine.state.epoch == engine.state.max_epochs:
            self.run()

    @torch.no_grad()
    def run(self) -> PopulationPrior | None:
        """Fit, choose, save; with several processes all take part. None where there are too few scans."""
        indices = list(range(len(self.training)))
        held_out: Dataset = self.validation
        late: list[int] = []
        if len(self.validation) < LEAST_HELD_OUT:
            late = indices[::5]
            held_out = Subset(self.training, late)
        indices = [index for index in indices if index not in set(late)]
        if len(indices) < 4 or len(held_out) < 1:
            logger.warning("%d scans are too few for a population prior, which needs 5.", len(self.training))
            return None
        if idist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # before the fit: an error comes at once
        first = Subset(self.training, indices)
        effects, means = self._effects(first)
        sketch = self._sketch(first, effects)
        chosen = Subset(held_out, range(min(len(held_out), MOST_HELD_OUT)))
        drawn = list(self._vectors(chosen, "choosing the number of factors"))
        rank, shrinkage, gain = self._choose(sketch, effects, drawn)
        sharpness = self._sharpness(prior_from_sketch(sketch, rank, shrinkage, self.network, effects), drawn)
        if late:
            effects, means = self._effects(self.training)
            sketch = self._sketch(self.training, effects)
        prior = prior_from_sketch(sketch, rank, shrinkage, self.network, effects)
        prior.coding, prior.sharpness = self.coding, sharpness
        prior.offset = self._offset(prior, means, first)
        prior.dispersion = self._dispersion(prior, chosen)
        prior.distances = self._distances(prior, chosen)
        prior.bits_per_dim = torch.tensor(_gather([vectors.bits_per_dim for vectors in drawn]))
        self._save(prior, shrinkage, gain, len(self.training))
        return prior

    def _vectors(self, dataset: Dataset, what: str, temperature: float = 1.0) -> Iterator[ScanVectors]:
        """Of this process's share of the scans, by batches, on the CPU."""
        share = Subset(dataset, range(idist.get_rank(), len(dataset), idist.get_world_size()))
        loader = on_device(DataLoader(share, batch_size=self.batch_size, num_workers=self.num_workers), self.device)
        hidden = idist.get_rank() > 0 or not sys.stderr.isatty()
        devices = [self.device] if self.device.type == "cuda" else []
        with eval_mode(self.network), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed + idist.get_rank())
            for batch in tqdm(loader, f"population prior, {what}", unit="batch", disable=hidden):
                scans = batch["image"].to(self.device)
                output, posteriors = self.network.infer(scans, temperature)
                nats = negative_log_likelihood(output.loc, output.scale, scans) + output.kl.sum(1)
                u = torch.cat([innovation(q).flatten(1) for q in posteriors], dim=1)
                parts = (u, *shifts_and_ratios(posteriors), bits_per_dim(nats, scans))
                yield ScanVectors(*(part.cpu() for part in parts), batch["features"], batch["image"])

    def _effects(self, dataset: Dataset) -> tuple[Tensor | None, Tensor | None]:
        """The regressions of the shifts, and of the scans themselves, on the covariates.

        Returns:
            ``[features, dimensions]`` and ``[features, channels, *spatial]``; None without covariates.
        """
        if self.coding is None:
            return None, None
        covariates = list(self.coding.slices().values())
        latents, images = (Effects(self.coding.size, covariates) for _ in range(2))
        for vectors in self._vectors(dataset, "regression on the covariates"):
            latents.add(vectors.features, vectors.t)
            images.add(vectors.features, vectors.scans)
        return latents.fit(), images.fit()

    def _offset(self, prior: PopulationPrior, means: Tensor | None, dataset: Dataset) -> Tensor | None:
        """What the effects on the latents lack of the scans' own mean differences, ``[features, channels, *spatial]``.

        The network is not linear, so that effects on its latents are not quite what they are in scans. So that the mean
        of counterfactuals is right, what some scans gain when they are decoded under half a unit more of a feature is
        compared with the regression of the scans themselves.
        """
        if means is None:
            return None
        gained = [torch.zeros_like(mean) for mean in means]
        scans = 0
        some = Subset(dataset, range(min(len(dataset), OFFSET_SCANS)))
        for vectors in self._vectors(some, "mean differences", temperature=0.0):
            innovations = split_latents(vectors.u, self.network)
            scans += len(vectors.u)
            decoded = []
            for sign in (-0.25, 0.25):
                for feature in range(self.coding.size):
                    change = torch.zeros(len(vectors.u), self.coding.size)
                    change[:, feature] = sign
                    draws = given_innovations(prior.moved(innovations, change))
                    decoded.append(self.network.decode([], 0.0, batch_size=len(change), draws=draws)[0].cpu())
            below, above = decoded[: self.coding.size], decoded[self.coding.size :]
            for feature, (less, more) in enumerate(zip(below, above, strict=True)):
                gained[feature] += 2 * (more - less).sum(0)
        total = idist.all_reduce(torch.stack(gained)) / idist.all_reduce(scans)
        return means - total

    def _sketch(self, dataset: Dataset, effects: Tensor | None) -> FactorSketch:
        sketch = FactorSketch(2 * self.factors)
        for vectors in self._vectors(dataset, "reading the training scans"):
            sketch.add(vectors.t if effects is None else vectors.t - vectors.features @ effects, vectors.r)
        sketch.merge()
        return sketch

    def _choose(
        self, sketch: FactorSketch, effects: Tensor | None, drawn: Sequence[ScanVectors]
    ) -> tuple[int, float, float]:
        """The rank and the shrinkage with the highest likelihood of held-out scans, and its gain in nats per scan."""
        latents = split_latents(torch.cat([vectors.u for vectors in drawn]), self.network)
        features = torch.cat([vectors.features for vectors in drawn])
        count = idist.all_reduce(len(features))
        most = min(self.factors, len(sketch.basis))

        def gain(rank: int, shrinkage: float) -> float:
            prior = prior_from_sketch(sketch, rank, shrinkage, self.network, effects)
            return idist.all_reduce(prior.log_ratio(latents, features).sum().item()) / count

        gains = {rank: gain(rank, SHRINKAGES[2]) for rank in sorted({r for r in (*RANKS, most) if r <= most})}
        rank = max(gains, key=gains.__getitem__)
        gains = {shrinkage: gain(rank, shrinkage) for shrinkage in SHRINKAGES}
        shrinkage = max(gains, key=gains.__getitem__)
        return rank, shrinkage, gains[shrinkage]

    def _sharpness(self, prior: PopulationPrior, drawn: Sequence[ScanVectors]) -> float:
        """How sharp the likelihood of covariates may be, by those of held-out scans: the best of some factors.

        Each covariate in turn is inferred, as if all values of its grid were as likely and no other one were known.
        """
        if self.coding is None:
            return 1.0
        scores = torch.cat([prior.effect_scores(split_latents(vectors.t, self.network)) for vectors in drawn])
        features = torch.cat([vectors.features for vectors in drawn])
        total = torch.zeros(len(SHARPNESSES))
        for name, variable in self.coding.variables.items():
            values = torch.stack([self.coding.numbers({name: value}) for value in variable.grid()])
            columns = self.coding.slices()[name]
            has_value = features[:, columns].abs().sum(1) > 0
            nearest = torch.cdist(features[:, columns], values[:, columns]).argmin(1)
            likelihoods = prior.covariate_likelihoods(scores, values)
            for place, sharpness in enumerate(SHARPNESSES):
                posterior = (sharpness * likelihoods).log_softmax(1)
                total[place] += posterior.gather(1, nearest[:, None])[has_value].sum()
        return SHARPNESSES[int(idist.all_reduce(total).argmax())]

    def _dispersion(self, prior: PopulationPrior, dataset: Dataset) -> float:
        """How much further from their expectation held-out scans are than the prior's draws for their covariates.

        Of the voxels that are brain in most draws, by the square root of the mean square.
        """
        if self.coding is None:
            return 1.0
        low, high = OUTPUT_RANGES[self.network.output_activation]
        squares = voxels = 0.0
        some = Subset(dataset, range(min(len(dataset), DISPERSION_SCANS)))
        for vectors in self._vectors(some, "how far scans deviate", temperature=0.0):
            means, variances = [], []
            for _ in range(DISPERSION_DRAWS):
                loc, scale = prior.usual(self.network, vectors.features)
                means.append(loc.cpu())
                variances.append(scale.cpu().square())
            means = torch.stack(means)
            spread = means.var(0) + torch.stack(variances).mean(0)
            # the mean of few draws is itself off by its variance over their number
            z2 = ((vectors.scans - means.mean(0)).square() - means.var(0) / DISPERSION_DRAWS) / spread
            # elsewhere next to nothing is expected to vary
            inside = (means > low + 0.05 * (high - low)).float().mean(0) > 0.5
            # the inverse of a variance over few draws is too large in the mean
            squares += z2[inside].sum().item() * (DISPERSION_DRAWS - 3) / (DISPERSION_DRAWS - 1)
            voxels += inside.sum().item()
        squares, voxels = (idist.all_reduce(total) for total in (squares, voxels))
        return max(squares / max(voxels, 1.0), 1e-6) ** 0.5

    def _distances(self, prior: PopulationPrior, dataset: Dataset) -> Tensor:
        """Sorted Mahalanobis distances of scans, from the means of their posteriors as jobs take them."""
        distances = [
            prior.typicality(prior.coordinates(split_latents(vectors.u, self.network), vectors.features))[0]
            for vectors in self._vectors(dataset, "measuring distances", temperature=0.0)
        ]
        return torch.tensor(sorted(_gather(distances)))

    def _save(self, prior: PopulationPrior, shrinkage: float, gain: float, scans: int) -> None:
        if idist.get_rank() > 0:
            return
        extras = {"scans": scans, "shrinkage": shrinkage, "gain": gain, **self.extras}
        extras["weights"] = fingerprint(self.network)

        def write(path: str) -> None:
            with Path(path).open("wb") as file:
                prior.save(file, extras)

        write_whole(self.path, write)
        logger.info(
            "Population prior of %d factors, fitted to %d scans: held-out scans gain %.0f nats each. '%s', %.1f MB.",
            *(prior.factors, scans, gain, self.path, self.path.stat().st_size / 1e6),
        )
