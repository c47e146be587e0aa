"""Fitting the population prior of a trained network to its cohort: see :mod:`scripts.population.prior`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.networks.utils import eval_mode
from scripts.data.covariate_tables import CohortCovariates
from scripts.data.datalist import spaced
from scripts.layers.gaussian import LatentSampler, Posterior, seeded_sampler
from scripts.layers.levels import grid_name
from scripts.population.deviations import Deviations, deviations
from scripts.population.effects import Effects
from scripts.population.familiarity import fit_familiarity
from scripts.population.files import save_prior
from scripts.population.joint import correlation_of
from scripts.population.prior import PopulationPrior, fingerprint, given_innovations, innovation, ratio
from scripts.population.sketch import FactorSketch, fit_bytes, latents_within, prior_from_sketch, split_latents
from scripts.training.checkpoints import CheckpointError, read_archive, unwrap
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.training.trainer import TrainingEvents, VDVAETrainer
from scripts.utils.command_line import check_integer
from scripts.utils.devices import free_memory, on_device
from scripts.utils.distributed import from_rank_zero
from scripts.utils.errors import InputError
from scripts.utils.names import people_of
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

logger = logging.getLogger(__name__)

LEAST_HELD_OUT = 16  # validation scans; with fewer some of the training scans choose too
MOST_HELD_OUT = 128  # scans that choose: their latents are kept in memory
RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
DISPERSION_SCANS = 32  # held-out scans whose deviations are looked at, of each process
OFFSET_SCANS = 32  # that are decoded for the mean differences, of each process
DRAWN_SCANS = 64  # that are drawn for them, in all
SHARPNESSES = tuple(2.0 ** (k / 2) for k in range(-12, 9))


def _memory_to_use() -> float:
    """Bytes that a fit may take of this machine's memory: half of what is free, shared with processes beside this."""
    free = free_memory()
    return (8 * 2**30 if free is None else free) / 2 / idist.get_nproc_per_node()


def _gather(batches: Sequence[Tensor]) -> list[float]:
    """One number per scan, ``[batch]`` each, of all processes."""
    here = [number for batch in batches for number in batch.tolist()]
    return list(itertools.chain(*idist.all_gather(here)))


class ScanVectors(NamedTuple):
    """Of some scans, on the host: the posteriors of latents by their indices, bits per dim, covariates, scans."""

    posteriors: dict[int, Posterior]
    bits_per_dim: Tensor
    features: Tensor
    scans: Tensor

    def innovations(self) -> Tensor:
        """The u of the latents, one after the other, ``[batch, dimensions]``."""
        return self._joined(innovation)

    def shifts(self) -> Tensor:
        """The t, likewise."""
        return self._joined(lambda q: innovation(q._replace(z=q.mean)))

    def ratios(self) -> Tensor:
        """The r, likewise."""
        return self._joined(ratio)

    def _joined(self, of: Callable[[Posterior], Tensor]) -> Tensor:
        return torch.cat([of(q).flatten(1) for q in self.posteriors.values()], dim=1)


class HeldOut(NamedTuple):
    """What is kept of held-out scans, of this process's share: u and t, bits per dim, covariates."""

    u: Tensor
    t: Tensor
    bits_per_dim: Tensor
    features: Tensor


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
    and where these are few a fifth of the training scans, which are taken in afterwards.

    Args:
        network: trained.
        training, validation: data sets of plain scans, as the network gets them.
        path: of the file that is written.
        factors: how many at most; 0 fits nothing.
        batch_size, num_workers: of the data loader.
        device: of the network.
        seed: of the latents' noise.
        covariates: of the scans; None: there are none.
        memory: GiB that it may take of the host's, in each process; latents of the finest grids are left out where they
            would need more. None: half of what is free.
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
        memory: float | None = None,
    ) -> None:
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or memory <= 0):
            raise InputError(f"prior_memory is {memory!r}: set it to a number of GiB above 0, or to None.")
        check_integer("prior_factors", factors, 0)
        self.network, self.path, self.factors = unwrap(network), Path(path), factors
        self.coding = covariates and covariates.coding
        self.training = _Scans(training, covariates and covariates.training)
        self.validation = _Scans(validation, covariates and covariates.validation)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.device, self.seed, self.memory = torch.device(device), seed, memory
        self.latents: list[int] = []
        self.gains: dict[int, float] = {}  # nats per held-out scan, of each number of factors that was tried

    def attach(self, engine: VDVAETrainer) -> None:
        """Fit after the last epoch, or when a run that had ended before its fit is resumed; not after a signal.

        What the fit leaves out for want of memory is said now, before the first update.
        """
        if self.factors:
            self._plan()
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
            engine.add_event_handler(TrainingEvents.NOTHING_LEFT, self._after_end)

    def _plan(self) -> None:
        """Choose the latents that fit into memory, and say which do not."""
        held_out = len(self.validation)
        if held_out < LEAST_HELD_OUT:
            held_out += len(self.training) // 5
        held_out = min(held_out, MOST_HELD_OUT)
        features = 0 if self.coding is None else self.coding.size
        per_dimension = fit_bytes(self.factors, features, self.batch_size, held_out)
        memory = _memory_to_use() if self.memory is None else self.memory * 2**30
        memory = idist.all_reduce(memory, "MIN")  # all must take the same latents
        self.latents = latents_within(self.network, memory, per_dimension)
        left_out = [grid for i, grid in enumerate(self.network.latent_grids()) if i not in self.latents]
        if left_out and idist.get_rank() == 0:
            needed = sum(map(math.prod, self.network.latent_grids())) * per_dimension
            finest = grid_name(self.network.latent_grids()[max(self.latents)][1:])
            logger.warning(
                "The population prior takes latents of grids up to %s, and leaves out %d finer ones: with them its fit "
                "would need %.1f GiB of memory, and has %.1f (prior_memory). With fewer --prior_factors it needs less.",
                *(finest, len(left_out), needed / 2**30, memory / 2**30),
            )

    def _after_end(self, engine: VDVAETrainer) -> None:
        """Fit where a run that had come to its end was stopped before the fit was done."""
        if not from_rank_zero(self._is_done):
            self.run()

    def _is_done(self) -> bool:
        with contextlib.suppress(CheckpointError, OSError):
            content = read_archive(self.path)
            return isinstance(content, dict) and content.get("weights") == fingerprint(self.network)
        return False

    def _after_epoch(self, engine: VDVAETrainer) -> None:
        if engine.state.epoch == engine.state.max_epochs:
            self.run()

    @torch.no_grad()
    def run(self) -> PopulationPrior | None:
        """Fit, choose, save; with several processes all take part. None where there are too few scans."""
        indices = list(range(len(self.training)))
        held_out: Dataset = self.validation
        late: list[int] = []
        if len(self.validation) < LEAST_HELD_OUT:
            people = people_of(self.training.dataset)
            # whole people, since scans of one are alike: what is measured of them would be too good
            late = sorted(itertools.chain(*people[::5])) if len(people) > 1 else indices[::5]
            held_out = ConcatDataset([self.validation, Subset(self.training, late)])
        indices = sorted(set(indices) - set(late))
        if len(indices) < 4 or len(held_out) < 1:
            logger.warning("%d scans are too few for a population prior, which needs 5.", len(self.training))
            return None
        if idist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # before the fit: an error comes at once
        if not self.latents:
            self._plan()
        first = Subset(self.training, indices)
        effects, means = self._effects(first)
        sketch = self._sketch(first, effects)
        chosen = Subset(held_out, spaced(len(held_out), MOST_HELD_OUT))
        drawn = self._held_out(chosen)
        rank, shrinkage, gain = self._choose(sketch, effects, drawn)
        prior = self._prior(sketch, rank, shrinkage, effects)
        prior.coding = self.coding
        if self.coding is not None:
            features = self.training.features
            known = torch.stack([features[:, own].any(1) for own in self.coding.slices().values()], dim=1).double()
            prior.correlation = correlation_of(self.coding, features.T @ features, known.T @ known)
            prior.sharpness = SHARPNESSES[int(self._likelihoods(prior, drawn).argmax())]
        self._add_offsets(prior, means, first)
        self._calibrate_deviations(prior, chosen)
        prior.distances = self._distances(prior, chosen)
        prior.bits_per_dim = torch.tensor(_gather([drawn.bits_per_dim]))
        before = prior
        if late:
            prior = self._refitted(prior, rank, shrinkage)
        # people whom neither network nor prior has seen; without any, those whom the prior had not seen at first
        sides = (prior, self.validation, self.training) if len(self.validation) else (before, chosen, first)
        loading = (self.batch_size, self.num_workers, self.device)
        prior.familiarity = fit_familiarity(self.network, *sides, *loading)
        self._save(prior, shrinkage, gain, len(self.training))
        return prior

    def _refitted(self, prior: PopulationPrior, rank: int, shrinkage: float) -> PopulationPrior:
        """The same fitted to all training scans; what was measured of held-out ones stays as it was."""
        effects, means = self._effects(self.training)
        refitted = self._prior(self._sketch(self.training, effects), rank, shrinkage, effects)
        refitted.take_measured(prior)
        self._add_offsets(refitted, means, self.training)
        return refitted

    def _prior(self, sketch: FactorSketch, rank: int, shrinkage: float, effects: Tensor | None) -> PopulationPrior:
        return prior_from_sketch(sketch, rank, shrinkage, self._grids(), effects)

    def _grids(self) -> dict[int, Sequence[int]]:
        """``[channels, *grid]`` of each latent that is taken."""
        return {index: self.network.latent_grids()[index] for index in self.latents}

    def _vectors(
        self, dataset: Dataset, what: str, temperature: float = 1.0, latents: Sequence[int] | None = None
    ) -> Iterator[ScanVectors]:
        """Of this process's share of the scans, by batches, on the host; by default of the latents that are taken."""
        wanted = set(self.latents if latents is None else latents)
        share = Subset(dataset, range(idist.get_rank(), len(dataset), idist.get_world_size()))
        loader = on_device(DataLoader(share, batch_size=self.batch_size, num_workers=self.num_workers), self.device)
        with eval_mode(self.network):
            for batch in tqdm(loader, f"population prior, {what}", unit="batch", disable=idist.get_rank() > 0):
                scans = batch["image"].to(self.device)
                posteriors: dict[int, Posterior] = {}

                def record(index: int, q: Posterior, kept: dict[int, Posterior] = posteriors) -> Tensor:
                    if index in wanted:
                        kept[index] = Posterior(*(part if part is None else part.cpu() for part in q))
                    return q.z

                sampler = self._sampler(batch["image"], record)
                output, _ = self.network.infer(scans, temperature, keep_posteriors=False, sampler=sampler)
                nats = negative_log_likelihood(output.loc, output.scale, scans) + output.kl.sum(1)
                bits = bits_per_dim(nats, scans).cpu()
                yield ScanVectors(dict(sorted(posteriors.items())), bits, batch["features"].cpu(), batch["image"].cpu())

    def _sampler(self, scans: Tensor, rule: Callable[[int, Posterior], Tensor] | None = None) -> LatentSampler:
        """Noise of each scan's own, by what it holds: it gives the same numbers in any cohort, batch and process."""
        seeds = (self.seed + zlib.crc32(scan.cpu().numpy().tobytes()) for scan in scans)
        return seeded_sampler(seeds, self.device, rule)

    def _held_out(self, dataset: Dataset) -> HeldOut:
        """What is kept of held-out scans; of each its latents are drawn once."""
        parts = [
            HeldOut(v.innovations(), v.shifts(), v.bits_per_dim, v.features)
            for v in self._vectors(dataset, "choosing the number of factors")
        ]
        none = torch.zeros(0, self._dimensions())
        empty = HeldOut(none, none, torch.zeros(0), torch.zeros(0, self.training.features.shape[1]))
        return HeldOut(*map(torch.cat, zip(empty, *parts, strict=True)))

    def _dimensions(self) -> int:
        """Of the latents that are taken."""
        return sum(map(math.prod, self._grids().values()))

    def _effects(self, dataset: Dataset) -> tuple[Tensor | None, Tensor | None]:
        """The regressions of the shifts, ``[features, dimensions]``, and of the scans themselves, ``[features,
        channels, *spatial]``, on the covariates; None without these.
        """
        if self.coding is None:
            return None, None
        covariates = list(self.coding.slices().values())
        network, size = self.network, self.coding.size
        latents = Effects(size, (self._dimensions(),), covariates)
        images = Effects(size, (network.in_channels, *network.spatial_shape), covariates)
        for vectors in self._vectors(dataset, "regression on the covariates"):
            latents.add(vectors.features, vectors.shifts())
            images.add(vectors.features, vectors.scans)
        return latents.fit(), images.fit()

    def _add_offsets(self, prior: PopulationPrior, means: Tensor | None, dataset: Dataset) -> None:
        """Give the prior what its effects on the latents lack of the scans' own mean differences.

        The network is not linear, so that effects on its latents are not quite what they are in scans; nor are they the
        same on latents that are drawn as on a scan's own.
        """
        if means is not None:
            prior.offset, prior.drawn_offset = None, None  # what is decoded here has none
            offset = means - self._gained_by_moving(prior, means, dataset)
            prior.drawn_offset = means - self._gained_by_drawing(prior)
            prior.offset = offset

    def _gained_by_moving(self, prior: PopulationPrior, means: Tensor, dataset: Dataset) -> Tensor:
        """What some scans gain when they are decoded under half a unit more of each feature, per unit.

        ``[features, channels, *spatial]``, as the regression of the scans themselves, ``means``.
        """
        gained = [torch.zeros_like(mean) for mean in means]
        scans = 0
        some = Subset(dataset, spaced(len(dataset), OFFSET_SCANS))
        all_latents = range(self.network.num_latents)  # they are decoded
        for vectors in self._vectors(some, "mean differences", temperature=0.0, latents=all_latents):
            innovations = [innovation(q) for q in vectors.posteriors.values()]
            count = len(vectors.scans)
            scans += count
            decoded = []
            for sign in (-0.25, 0.25):
                for feature in range(self.coding.size):
                    change = torch.zeros(count, self.coding.size)
                    change[:, feature] = sign
                    sampler = given_innovations(prior.moved(innovations, change))
                    decoded.append(self.network.decode([], 0.0, batch_size=len(change), sampler=sampler)[0].cpu())
            below, above = decoded[: self.coding.size], decoded[self.coding.size :]
            for feature, (less, more) in enumerate(zip(below, above, strict=True)):
                gained[feature] += 2 * (more - less).sum(0)
        return idist.all_reduce(torch.stack(gained)) / idist.all_reduce(scans)

    def _gained_by_drawing(self, prior: PopulationPrior) -> Tensor:
        """What drawn scans gain from a feature: a regression of draws under training people's covariates, each less
        the same draw under none.
        """
        responses = Effects(self.coding.size, (self.network.in_channels, *self.network.spatial_shape))
        world = idist.get_world_size()
        places = spaced(len(self.training), max(DRAWN_SCANS, world))[idist.get_rank() :: world]
        batches = [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        with eval_mode(self.network):
            for batch in tqdm(batches, "population prior, drawing", unit="batch", disable=idist.get_rank() > 0):
                features, drawn = self.training.features[batch], []
                for told in (features, torch.zeros_like(features)):
                    # the same draws of both, whatever the batch and the process
                    sampler = seeded_sampler((self.seed + place for place in batch), self.device)
                    drawn.append(prior.sample(self.network, told, sampler)[0].cpu())
                responses.add(features, drawn[0] - drawn[1])
        return responses.fit()

    def _sketch(self, dataset: Dataset, effects: Tensor | None) -> FactorSketch:
        sketch = FactorSketch(2 * self.factors)
        for vectors in self._vectors(dataset, "reading the training scans"):
            t = vectors.shifts()
            sketch.add(t if effects is None else t - vectors.features @ effects, vectors.ratios())
        sketch.merge()
        return sketch

    def _choose(self, sketch: FactorSketch, effects: Tensor | None, drawn: HeldOut) -> tuple[int, float, float]:
        """The rank and the shrinkage with the highest likelihood of held-out scans, and its gain in nats per scan."""
        latents = split_latents(drawn.u, self._grids())
        count = idist.all_reduce(len(drawn.features))
        most = min(self.factors, len(sketch.basis))

        def gain(rank: int, shrinkage: float) -> float:
            prior = self._prior(sketch, rank, shrinkage, effects)
            return idist.all_reduce(prior.log_ratio(latents, drawn.features).sum().item()) / count

        def best(gains: Mapping[Any, float]) -> Any:
            return max(gains, key=gains.__getitem__)

        ranks = sorted({rank for rank in (*RANKS, most) if rank <= most})
        # the more factors, the more of each is chance: the number is chosen again once it is known how much to shrink
        tried = {rank: gain(rank, SHRINKAGES[2]) for rank in ranks}
        shrinkage = best({shrinkage: gain(best(tried), shrinkage) for shrinkage in SHRINKAGES})
        self.gains = {rank: gain(rank, shrinkage) for rank in ranks}
        rank = best(self.gains)
        gains = {shrinkage: gain(rank, shrinkage) for shrinkage in SHRINKAGES}
        return rank, best(gains), max(gains.values())

    def _likelihoods(self, prior: PopulationPrior, drawn: HeldOut) -> Tensor:
        """The log likelihood of held-out scans' covariates for each sharpness that the prior's may have.

        Each covariate in turn is inferred, as if all values of its grid were as likely and no other one were known.
        """
        scores = prior.effect_scores(split_latents(drawn.t, self._grids()))
        features = drawn.features
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
        return idist.all_reduce(total)

    def _calibrate_deviations(self, prior: PopulationPrior, dataset: Dataset) -> None:
        """Note how much further from their expectation held-out scans are than the prior's draws for their covariates,
        by the square root of the mean square, and what is the largest in them.
        """
        if self.coding is None:
            return
        squares, counts, scores = self._deviations(prior, dataset)
        prior.dispersion, prior.region_dispersion = (squares / counts.clamp_min(1)).clamp_min(1e-6).sqrt().tolist()
        prior.deviation_scores = scores.sort().values / prior.dispersion

    def _deviations(self, prior: PopulationPrior, dataset: Dataset) -> Deviations:
        """Those of some scans, of all processes."""
        some = Subset(dataset, spaced(len(dataset), DISPERSION_SCANS))
        found = [
            deviations(self.network, prior, vectors.scans, vectors.features, self._sampler(vectors.scans))
            for vectors in self._vectors(some, "how far scans deviate", temperature=0.0, latents=())
        ]
        squares, counts = (
            idist.all_reduce(sum((getattr(part, name) for part in found), torch.zeros(2, dtype=torch.float64)))
            for name in ("squares", "counts")
        )
        return Deviations(squares, counts, torch.tensor(_gather([part.scores for part in found])))

    def _distances(self, prior: PopulationPrior, dataset: Dataset) -> Tensor:
        """Sorted Mahalanobis distances of scans, from the means of their posteriors as jobs take them."""
        distances = []
        for vectors in self._vectors(dataset, "measuring distances", temperature=0.0):
            innovations = {index: innovation(q) for index, q in vectors.posteriors.items()}
            distances.append(prior.typicality(prior.coordinates(innovations, vectors.features))[0])
        return torch.tensor(sorted(_gather(distances)))

    def _save(self, prior: PopulationPrior, shrinkage: float, gain: float, scans: int) -> None:
        if idist.get_rank() > 0:
            return
        found = {"scans": scans, "shrinkage": shrinkage, "gain": gain, "weights": fingerprint(self.network)}
        save_prior(prior, self.path, found)
        if gain <= 0:
            logger.warning(
                "The population prior does not help: scans that were held out of its fit are no likelier by it. It "
                "was fitted to too few scans, or to others than these; --prior network leaves it out."
            )
        logger.info(
            "Population prior of %d factors, fitted to %d scans: the held-out ones that chose their number gain "
            "%.0f nats each. '%s', %.1f MB.",
            *(prior.factors, scans, gain, self.path, self.path.stat().st_size / 1e6),
        )
