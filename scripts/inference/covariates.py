"""What a population prior with covariates can say: scans under other covariates, what is usual, and how old a brain is.

Abduction, action, prediction (Pearl 2009, chapter 7): a scan is encoded under its own covariates, which leaves what is
this person's alone: the innovations of all latents, and the voxels' residuals in units of the predicted deviation.
Decoded under other covariates these give the counterfactual.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from scipy import stats
from scripts.data.covariates import CovariateCoding, Value, missing
from scripts.layers.gaussian import LatentSampler
from scripts.layers.output import foreground
from scripts.networks import VDVAE
from scripts.population.prior import PopulationPrior, given_innovations, innovation
from scripts.utils.errors import InputError
from torch import Tensor

OTHER_STEPS = 9  # values of another continuous covariate that is not known
MOST_COMBINATIONS = 4096  # of values of those that are not known; of more so many are drawn
INTERVAL = 0.9


def need_covariates(prior: PopulationPrior | None) -> PopulationPrior:
    """The population prior, if it knows covariates; else that is refused."""
    if prior is None or prior.coding is None:
        raise InputError(
            "This job needs a population prior that was fitted with covariates: train, or run fit_prior, with "
            "--covariates \"{'age': 'continuous', 'sex': 'categorical'}\"; or set --ckpt to weights that have one."
        )
    return prior


def stack_features(prior: PopulationPrior | None, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``features`` and ``known`` for inferers: what the items' covariates become, and the covariates themselves.

    Nothing where the prior knows no covariates.
    """
    if prior is None or prior.coding is None:
        return {}
    coding = prior.coding
    known = [item["covariates"] for item in items]
    return {"features": torch.stack([coding.numbers(values) for values in known]), "known": known}


def targets(coding: CovariateCoding, covariates: Any, only: str | None = None) -> dict[str, dict[str, Value]]:
    """The covariates to change to, by what results under them are called.

    Args:
        coding: of the covariates.
        covariates: such as ``{"age": 80}``; one of them may be a list, for a result each.
        only: the kind that they must be of.

    Raises:
        ValueError: they are not such, or a value makes no sense.
    """
    if not isinstance(covariates, Mapping) or not covariates:
        coding.given(covariates)
    for name, value in covariates.items():
        if any(map(missing, value if isinstance(value, list | tuple) else [value])):
            raise InputError(f"covariates: {name} is {value!r}: give the value to change to.")
    lists = [name for name, value in covariates.items() if isinstance(value, list | tuple)]
    if len(lists) > 1 or any(len(covariates[name]) == 0 for name in lists):
        raise InputError(f"covariates is {dict(covariates)!r}: one of them can be a list of values, not more.")
    for name in covariates:
        if only is not None and name in coding.variables and coding.variables[name].kind != only:
            raise InputError(f"covariates: this job changes what is {only} alone, such as the site; {name} is not.")
    if not lists:
        return {"": coding.given(covariates)}
    name = lists[0]
    found = {}
    for value in covariates[name]:
        given = coding.given({**covariates, name: value})
        found[f"_{name}-{given[name]:g}" if isinstance(given[name], float) else f"_{name}-{given[name]}"] = given
    return found


class Counterfactual(Inferer):
    """Scans under other covariates: ``change``, what each voxel gains, in the range of the network's output.

    Args:
        prior: with covariates.
        targets: the covariates to change to, by the ends of the results' names; see :func:`targets`. A covariate of a
            scan that is to be changed and is not known is taken for what the scan itself says of it. Background that
            stays background is left as it is.
    """

    def __init__(self, prior: PopulationPrior, targets: Mapping[str, Mapping[str, Value]]) -> None:
        self.prior, self.targets = prior, targets

    def images(self) -> list[str]:
        """The names of its results."""
        return [f"change{name}" for name in self.targets]

    def __call__(
        self, inputs: Tensor, network: VDVAE, features: Tensor, known: Sequence[Mapping[str, Value]], **kwargs: Any
    ) -> dict[str, Tensor]:
        """``features`` are ``[batch, numbers]``, what the covariates in ``known`` become."""
        coding = self.prior.coding
        output, posteriors = network.infer(inputs, temperature=0.0)
        innovations = [innovation(q) for q in posteriors]
        residual = (inputs - output.loc) / output.scale
        scores = self.prior.effect_scores(innovations)
        results = {}
        for name, target in self.targets.items():
            changed = features.clone()
            before = features.clone()
            for covariate, value in target.items():
                own = coding.slices()[covariate]
                changed[:, own] = coding.numbers({covariate: value})[own].to(features)
                for row, values in enumerate(known):
                    if values[covariate] is None:
                        grid, likely = posterior(self.prior, scores[row], values, covariate)
                        numbers = torch.stack([coding.numbers({covariate: v})[own] for v in grid]).to(features)
                        with torch.autocast(features.device.type, enabled=False):
                            before[row, own] = likely.to(features) @ numbers
            sampler = given_innovations(self.prior.moved(innovations, changed - before))
            loc, scale = network.decode([], temperature=0.0, batch_size=len(inputs), sampler=sampler)
            loc = loc + self.prior.added(changed - before)
            outside = ~foreground(inputs, network) & ~foreground(loc, network)
            results[f"change{name}"] = (loc + scale * residual - inputs).masked_fill(outside, 0.0)
        return results


class Deviation(Inferer):
    """What is usual for a scan's covariates, and how far the scan is from it.

    Shaped like the scans: ``expected``, the mean of draws; ``spread``, their standard deviation with that of the
    likelihood; ``deviation``, the scan less the expected in units of the spread. With an atlas also ``regions``,
    ``[batch, regions, 4]``: the scan's mean in each region, the expected, the standard deviation of a further person's
    (with the dispersion of held-out people, and the uncertainty of the mean of so many draws), and the z score: how far
    out a normal distribution is as improbable as this value is given so few draws (Student's t).

    Args:
        prior: with covariates.
        draws: how many, 2 or more.
        labels: a region's number for each voxel of the network's grid, 0 for none, ``[*spatial]``; None: no atlas.
    """

    def __init__(self, prior: PopulationPrior, draws: int = 32, labels: Tensor | None = None) -> None:
        if draws < 2:
            raise InputError(f"draws is {draws}: it must be 2 or more.")
        self.prior, self.draws = prior, draws
        self.masks = None
        if labels is not None:
            numbers = [number for number in labels.unique().tolist() if number]
            masks = torch.stack([(labels == number).flatten() for number in numbers]).float()
            self.masks = masks / masks.sum(1, keepdim=True)

    def __call__(
        self, inputs: Tensor, network: VDVAE, features: Tensor, *, sampler: LatentSampler | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """``features`` are ``[batch, numbers]``, what the covariates become."""
        return next(itertools.islice(self.refined(inputs, network, features, sampler), self.draws - 2, None))

    def refined(
        self, inputs: Tensor, network: VDVAE, features: Tensor, sampler: LatentSampler | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The results of two draws, of three, and so on without end."""
        total, squares, noise = torch.zeros_like(inputs), torch.zeros_like(inputs), torch.zeros_like(inputs)
        means = []
        for count in itertools.count(1):
            loc, scale = self.prior.sample(network, features, sampler)
            total, squares, noise = total + loc, squares + loc.square(), noise + scale.square()
            if self.masks is not None:
                means.append(self.region_means(loc))
            if count == 1:
                continue
            expected = total / count
            between = (squares / count - expected.square()).clamp_min(0) * (count / (count - 1))
            spread = self.prior.dispersion * (between + noise / count).sqrt()
            results = {"expected": expected, "spread": spread, "deviation": (inputs - expected) / spread}
            if self.masks is not None:
                own, drawn = self.region_means(inputs), torch.stack(means)
                expected, std = drawn.mean(0), drawn.std(0) * (self.prior.region_dispersion * (1 + 1 / count) ** 0.5)
                z = normal_score((own - expected) / std, count - 1)
                results["regions"] = torch.stack([own, expected, std, z], dim=2)
            yield results

    def region_means(self, scans: Tensor) -> Tensor:
        """The mean of the first channel in each region, ``[batch, regions]``."""
        with torch.autocast(scans.device.type, enabled=False):
            return scans[:, 0].flatten(1) @ self.masks.to(scans).T


def normal_score(t: Tensor, degrees: int) -> Tensor:
    """The z score that is as improbable under a normal distribution as t is under Student's, shaped like it."""
    distances = t.abs().double().cpu().numpy()
    scores = stats.norm.isf(np.maximum(stats.t.sf(distances, degrees), 1e-300))
    return t.sign() * torch.from_numpy(scores).to(t)


class CovariatePosterior(Inferer):
    """What a scan says of each covariate: ``posterior_NAME``, ``[batch, values]``, over the values of its grid.

    By Bayes, from the likelihood of the scan under each value and a flat prior over the grid. Other covariates are
    those that are known of the scan; one that is not is averaged over. ``effect_scores``, ``[batch, features]``, hold
    all that the scan says.
    """

    def __init__(self, prior: PopulationPrior) -> None:
        self.prior = prior

    def __call__(
        self, inputs: Tensor, network: VDVAE, known: Sequence[Mapping[str, Value]], **kwargs: Any
    ) -> dict[str, Tensor]:
        """``known`` are the covariates of each scan."""
        _, posteriors = network.infer(inputs, temperature=0.0)
        scores = self.prior.effect_scores([innovation(q) for q in posteriors])
        results = {"effect_scores": scores}
        for name in self.prior.coding.variables:
            rows = [posterior(self.prior, row, values, name)[1] for row, values in zip(scores, known, strict=True)]
            results[f"posterior_{name}"] = torch.stack(rows)
        return results


def posterior(
    prior: PopulationPrior, scores: Tensor, known: Mapping[str, Value], name: str
) -> tuple[list[Value], Tensor]:
    """The values of a covariate's grid and how likely each is given a scan, ``[values]``.

    ``scores``, ``[features]``, are those of the scan, see :meth:`PopulationPrior.effect_scores`; of its known
    covariates that which is asked for is not used.
    """
    coding = prior.coding
    grid = coding.variables[name].grid()
    others = {other: known.get(other) for other in coding.variables if other != name}
    own = coding.slices()[name]
    base = _combinations(coding, tuple(other for other, value in others.items() if value is None))
    base = base + coding.numbers(others)
    values = torch.stack([coding.numbers({name: value})[own] for value in grid])
    combined = base.repeat(len(grid), 1)
    combined[:, own] = values.repeat_interleave(len(base), 0)
    logs = prior.covariate_likelihoods(scores[None], combined)[0].reshape(len(grid), len(base)).logsumexp(1)
    return grid, logs.softmax(0)


@lru_cache(maxsize=16)  # one for each pattern of what is known
def _combinations(coding: CovariateCoding, unknown: Sequence[str]) -> Tensor:
    """The features of all combinations of some values of these covariates, or of as many as are drawn."""
    values = [_few(coding.variables[name]) for name in unknown]
    counts = list(map(len, values))
    if math.prod(counts) <= MOST_COMBINATIONS:
        chosen = torch.tensor(list(itertools.product(*map(range, counts))), dtype=torch.long)
    else:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.stack([torch.randint(n, (MOST_COMBINATIONS,), generator=generator) for n in counts], dim=1)
    found = torch.zeros(len(chosen), coding.size)
    for name, of_one, places in zip(unknown, values, chosen.T, strict=True):
        own = coding.slices()[name]
        found[:, own] = torch.stack([coding.numbers({name: value})[own] for value in of_one])[places]
    return found


NOT_EVEN = 1.05  # times as likely as if nothing were known


def _few(variable: Any) -> list[Value]:
    """Some values of a covariate that is not known."""
    return variable.grid(OTHER_STEPS) if variable.kind == "continuous" else variable.grid()


def summary(coding: CovariateCoding, name: str, likely: Tensor) -> dict[str, Any]:
    """A posterior in a few numbers: mean and 90 % interval, or the likeliest category and the probability of each.

    The likeliest is empty where all are as likely as each other, within 5 %.
    """
    grid = coding.variables[name].grid()
    if coding.variables[name].kind == "categorical":
        best = int(likely.argmax())
        shares = {f"{name}_{value}": f"{share:.4g}" for value, share in zip(grid, likely.tolist(), strict=True)}
        known = float(likely[best]) > NOT_EVEN / len(grid)
        return {f"{name}_likeliest": grid[best] if known else "", **shares}
    points, below = torch.tensor(grid, dtype=torch.float64), likely.double().cumsum(0)
    mean = float((points * likely.double()).sum())
    # between the points of the grid, each of which stands for what is half a step around it
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), below])
    edges = torch.cat([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    ends = np.interp([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], steps, edges)
    return {f"{name}_mean": f"{mean:.5g}", f"{name}_low": f"{ends[0]:.5g}", f"{name}_high": f"{ends[1]:.5g}"}


class KeepScand(MapTransform):
    """Keep a copy of the scan as it was loaded, ``loaded``. It belongs right after loading."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d["loaded"] = d[key].clone()
        return d


class AddChanged(MapTransform):
    """Add a change, which came back to the scan's own grid and units, to the scan: detail finer than the network's
    grid stays.

    Adds ``<result>...`` and ``difference...`` for each key ``change...``. Nothing becomes darker than the scan's
    background.

    Args:
        keys: of the changes.
        result: what the changed scan is called.
    """

    def __init__(self, keys: KeysCollection, result: str = "counterfactual") -> None:
        super().__init__(keys)
        self.result = result

    def images(self) -> list[str]:
        """The names of what is added."""
        return [name for key in self.keys for name in self._names(str(key))]

    def _names(self, key: str) -> tuple[str, str]:
        return key.replace("change", self.result, 1), key.replace("change", "difference", 1)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        loaded = d["loaded"]
        scan = loaded.as_tensor().float()
        low = scan.flatten(1).amin(1).reshape(-1, *[1] * (scan.ndim - 1))
        for key in self.key_iterator(d):
            change = torch.as_tensor(d[key]).as_subclass(Tensor)
            changed = torch.maximum(scan + change, low)
            names = self._names(str(key))
            d[names[0]] = MetaTensor(changed).copy_meta_from(loaded)
            d[names[1]] = MetaTensor(changed - scan).copy_meta_from(loaded)
        return d
