"""What the page can ask of a trained network: each job a generator of steps, see :mod:`scripts.webpage.work`.

They use the inferers, the preprocessing and the seeds of configs/inference.json, so that a scan's numbers are those of
its jobs. Volumes lie on the network's grid: scans and what the network makes of them from 0 (background) to 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.utils import ensure_tuple
from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import Categorical, Continuous
from scripts.data.transforms import ScanError
from scripts.inference.covariates import Counterfactual, Deviation, need_covariates, targets
from scripts.inference.engine import scan_generator
from scripts.inference.inferers import CoordinateDecoding, Encoding, Imputation, Interpolation, Reconstruction, Sampling
from scripts.inference.layouts import channel_labels
from scripts.inference.outputs import from_zero_to_one
from scripts.layers.gaussian import noise_from
from scripts.layers.levels import find_level, grid_key, grid_name
from scripts.population.prior import PopulationPrior
from scripts.utils.errors import InputError
from scripts.webpage.cohort import SCORES, Cohort
from scripts.webpage.images import painted, picture, volume
from scripts.webpage.work import Result, Steps, request_key
from torch import Tensor

__all__ = ["Jobs"]

MOST_SAMPLES = 36
MOST_STEPS = 11  # of a film strip
MOST_DRAWS = 64
DRAWS = 32  # of what is usual
HOTTEST = 5  # temperature
BEYOND = 0.25  # of the width of a covariate's range, which values may lie outside of it
LARGEST = 100.0  # coordinate, in standard deviations of the cohort


class Jobs:
    """The jobs of one network and one cohort.

    Args:
        config: configs/inference.json, with its overlays and what the command line changes.

    Attributes:
        cohort: the table of the scans.
        name: of the weights.
    """

    def __init__(self, config: ConfigParser) -> None:
        self._config = config
        self.network = config.get_parsed_content("network").eval()
        self.prior: PopulationPrior | None = config.get_parsed_content("population_prior")
        self.cohort = Cohort(config.get_parsed_content("scans"), config.get_parsed_content("columns"))
        self.name = str(config.get_parsed_content("ckpt"))
        self.device = next(self.network.parameters()).device
        covariates = config.get_parsed_content("scan_folder"), config.get_parsed_content("covariates_file")
        with_covariates = self.prior is not None and self.prior.coding is not None
        self._known = Covariates(self.cohort.items, *covariates) if with_covariates else None
        self._preprocessing = config.get_parsed_content("scored#preprocessing")
        self._scoring = config.get_parsed_content("scoring_inferer")
        self._features_of = config.get_parsed_content("features_of")
        self._range = config.get_parsed_content("output_range")
        patterns = ensure_tuple(config.get_parsed_content("pattern"))
        count = self.network.in_channels
        self._channels = channel_labels(patterns if len(patterns) == count > 1 else [""] * count)
        self._seed = config.get_parsed_content("seed")
        self._iterations = config.get_parsed_content("iterations")
        self._decoded = lru_cache(maxsize=8)(self._decode)
        self.kinds: dict[str, Callable[..., Steps]] = {
            "thumbnail": self.thumbnail,
            "score": self.score,
            "view": self.view,
            "coordinates": self.coordinates,
            "decode": self.decode,
            "sample": self.sample,
            "change": self.change,
            "mix": self.mix,
            "deviation": self.deviation,
            "scan": self.scan,
            "fill": self.fill,
        }

    def about(self) -> dict[str, Any]:
        """What the page must know of the network."""
        network, grids = self.network, self.network.grids()
        with_latents = sorted(set(network.latent_levels), reverse=True)
        coding = None if self.prior is None else self.prior.coding
        return {
            "ckpt": self.name,
            "device": str(self.device),
            "shape": list(network.spatial_shape),
            "channels": self._channels,
            "parameters": sum(p.numel() for p in network.parameters()),
            "levels": [{"key": grid_key(grids[level]), "name": grid_name(grids[level])} for level in with_latents],
            "factors": 0 if self.prior is None else self.prior.factors,
            "explained": [] if self.prior is None else self.prior.explained.tolist(),
            "covariates": []
            if coding is None
            else [
                {"name": name, "kind": variable.kind, "values": _values(variable)}
                for name, variable in coding.variables.items()
            ],
            "scans": len(self.cohort),
        }

    def prepare(self, kind: Any, arguments: Any) -> tuple[str, Steps]:
        """A job as it was asked for: the key of the request and the steps, of which none is done yet.

        Raises:
            ValueError: there is no such job, or its arguments are not understood.
        """
        if kind not in self.kinds or not isinstance(arguments, dict):
            raise InputError(f"There is no job {kind!r}: there are {', '.join(self.kinds)}.")
        job = self.kinds[kind]
        try:
            inspect.signature(job).bind(**arguments)
        except TypeError as error:
            raise InputError(f"The job '{kind}' was asked for wrongly: {error}.") from error
        return request_key(kind, arguments), job(**arguments)

    # each scan is read again when it is asked for: a cohort need not fit into memory
    def _read(self, index: Any) -> dict[str, Any]:
        """A scan after preprocessing, which does not clip it, with the covariates that are known of it.

        Raises:
            ScanError: it cannot be used; its row says so then.
            ValueError: there is no such scan, or one of its covariates makes no sense.
        """
        item = self.cohort.items[self.cohort.check(index)]
        try:
            found = self._preprocessing(item)
        except (ScanError, RuntimeError) as error:  # Compose wraps the one in the other
            cause = error if isinstance(error, ScanError) else error.__cause__
            if not isinstance(cause, ScanError):
                raise
            self.cohort.note(index, error=str(cause))
            raise cause from None
        if self._known is not None:
            found["covariates"] = self._known.values_of(index, self.prior.coding)
        return found

    def _unclipped(self, item: Mapping[str, Any]) -> Tensor:
        return item["image"].as_tensor()[None].to(self.device)

    def _inputs(self, item: Mapping[str, Any]) -> Tensor:
        return self._unclipped(item).clamp(*self._range)

    def _features(self, item: Mapping[str, Any]) -> dict[str, Any]:
        found = self._features_of([item])
        return {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in found.items()}

    def _unit(self, images: Tensor) -> Tensor:
        """The first scan of a batch, from 0 to 1, ``[channels, *spatial]``."""
        return from_zero_to_one(images[0].float(), self._range)

    def _channel(self, channel: Any) -> int:
        if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < self.network.in_channels:
            raise InputError(f"There is no channel {channel!r}: the network has {self.network.in_channels}.")
        return channel

    def thumbnail(self, index: int, channel: int = 0) -> Steps:
        """A small picture of a scan."""
        channel = self._channel(channel)
        yield 0, 1
        image = self._unit(self._inputs(self._read(index)))[channel]
        return Result(files={"thumbnail.png": picture(image)})

    def score(self, indices: Sequence[int] | None = None) -> Steps:
        """Scores of scans, into their rows; of all that have none yet, where none are named."""
        if indices is None:
            rows = self.cohort.page(limit=1)["scans"]
            indices = [i for i in range(rows) if not {"bits_per_dim"} & set(self.cohort.row(i))]
        indices = [self.cohort.check(index) for index in indices]
        yield 0, max(1, len(indices))
        for done, index in enumerate(indices):
            try:
                self._score(index, self._read(index))
            except ValueError as error:  # a ScanError among them: its row says it, and the others follow
                self.cohort.note(index, error=str(error))
            yield done + 1, len(indices)
        return Result({"scored": len(indices)})

    def _score(self, index: int, item: Mapping[str, Any]) -> dict[str, Tensor]:
        with noise_from([scan_generator(self._seed, self.cohort.row(index)["image"])]):
            found = self._scoring(self._unclipped(item), self.network, **self._features(item))
        scores = {name: float(found[name]) for name in SCORES if name in found}
        self.cohort.note(index, error="", **{name: value for name, value in scores.items() if math.isfinite(value)})
        return found

    def view(self, index: int, channel: int = 0) -> Steps:
        """A scan, its reconstructions up to each level, and maps of what is unusual in it."""
        channel = self._channel(channel)
        yield 0, 3
        item = self._read(index)
        inputs, affine = self._inputs(item), item["image"].affine
        yield 1, 3
        found = Reconstruction(levels="each")(inputs, self.network)
        yield 2, 3
        scored = self._score(index, item)
        files = {"scan": self._unit(inputs), "restored": self._unit(scored["restored"])}
        low, high = self._range
        for name, image in found.items():
            if name.startswith("recon"):
                files[name] = self._unit(image)
        files |= {"zscore": found["zscore"][0], "anomaly": scored["anomaly"][0]}
        files["scale"] = found["scale"][0] / (high - low)
        content = {"row": self.cohort.row(index), "largest_scale": float(files["scale"][channel].quantile(0.999))}
        return Result(content, {f"{name}.nii.gz": volume(image[channel], affine) for name, image in files.items()})

    def deviation(self, index: int, channel: int = 0) -> Steps:
        """How far a scan is from what is usual for its covariates, as the job ``deviation`` says it."""
        channel = self._channel(channel)
        prior = need_covariates(self.prior)
        yield 0, DRAWS
        item = self._read(index)
        generator = scan_generator(self._seed, self.cohort.row(index)["image"])
        results = Deviation(prior, DRAWS).refined(self._inputs(item), self.network, self._features(item)["features"])
        for done in range(2, DRAWS + 1):
            with noise_from([generator]):
                found = next(results)
            yield done, DRAWS
        image = volume(found["deviation"][0][channel], item["image"].affine)
        return Result({"known": _known(item)}, {"deviation.nii.gz": image})

    def coordinates(self, index: int) -> Steps:
        """A scan's coordinates in the population prior."""
        prior = self._need_prior()
        yield 0, 2
        item = self._read(index)
        yield 1, 2
        found = Encoding(prior=prior)(self._inputs(item), self.network)["coordinates"][0]
        return Result({"coordinates": found.tolist()})

    def _need_prior(self) -> PopulationPrior:
        if self.prior is None:
            raise InputError("These weights have no population prior: train or run fit_prior, which leave one.")
        return self.prior

    def decode(self, coordinates: Sequence[float], start: Sequence[float] | None = None, channel: int = 0) -> Steps:
        """The brain at coordinates of the population prior, and what differs from the one at ``start``."""
        channel = self._channel(channel)
        prior = self._need_prior()
        places = [self._place(place, prior.factors) for place in (coordinates, start) if place is not None]
        yield 0, 1
        images = [self._decoded(place)[channel] for place in places]
        affine = self.network.scan_affine
        files = {"decoded.nii.gz": volume(images[0], affine)}
        if start is not None:
            files["difference.nii.gz"] = volume(images[0] - images[1], affine)
        return Result(files=files)

    def _place(self, coordinates: Any, factors: int) -> tuple[float, ...]:
        try:
            numbers = tuple(round(float(value), 4) for value in coordinates)
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) > factors or not numbers or not all(abs(value) <= LARGEST for value in numbers):
            raise InputError(f"coordinates must be 1 to {factors} numbers, such as [0.5, -1]; others are 0.")
        return numbers + (0.0,) * (factors - len(numbers))

    def _decode(self, place: tuple[float, ...]) -> Tensor:
        inferer = CoordinateDecoding(self._need_prior())
        found = inferer(torch.tensor([place], device=self.device), self.network)["sample"]
        return self._unit(found).cpu()

    def sample(
        self,
        count: int = 8,
        temperature: float | Mapping[str, float] | None = None,
        seed: int = 0,
        prior: str = "population",
        covariates: Mapping[str, Any] | None = None,
        channel: int = 0,
    ) -> Steps:
        """New scans; those of the job ``sample`` with this seed."""
        channel = self._channel(channel)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_SAMPLES:
            raise InputError(f"count is {count!r}: it must be a whole number from 1 to {MOST_SAMPLES}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise InputError(f"seed is {seed!r}: it must be a whole number, 0 or more.")
        chosen = {"population": self.prior, "network": None}[prior] if prior in ("population", "network") else None
        if prior != "network" and chosen is None:
            raise InputError(f"prior is {prior!r}: these weights have 'network' alone, or 'population' and 'network'.")
        for value in temperature.values() if isinstance(temperature, Mapping) else [temperature]:
            if isinstance(value, float | int) and not 0 <= value <= HOTTEST:
                raise InputError(f"temperature is {value!r}: it must be from 0 to {HOTTEST}.")
        inferer = Sampling(temperature, prior=chosen, covariates=covariates or None)
        if covariates:
            self._check_near(covariates)
        yield 0, count
        files, images = {}, []
        for number in range(1, count + 1):
            with noise_from([scan_generator(seed, f"{number:04d}")]):
                image = self._unit(inferer(1, self.network)["sample"])[channel].cpu()
            images.append(image)
            files[f"sample_{number:04d}.nii.gz"] = volume(image, self.network.scan_affine)
            files[f"sample_{number:04d}.png"] = picture(image)
            yield number, count
        return Result({"count": count}, files)

    def _check_near(self, covariates: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where a number lies far outside of what the prior's cohort had."""
        for name, value in self.prior.coding.given(covariates).items():
            variable = self.prior.coding.variables[name]
            if variable.kind == "continuous" and value is not None:
                beyond = BEYOND * (variable.high - variable.low)
                if not variable.low - beyond <= value <= variable.high + beyond:
                    raise InputError(
                        f"{name} is {value:g}: in the prior's cohort it goes from {variable.low:.4g} to "
                        f"{variable.high:.4g}; ask for one from {variable.low - beyond:.4g} to "
                        f"{variable.high + beyond:.4g}."
                    )

    def change(self, index: int, covariates: Mapping[str, Any], channel: int = 0) -> Steps:
        """A scan under other covariates, of which one may be a list: a film strip."""
        channel = self._channel(channel)
        prior = need_covariates(self.prior)
        wanted = targets(prior.coding, covariates)
        if len(wanted) > MOST_STEPS:
            raise InputError(f"{len(wanted)} values were asked for: {MOST_STEPS} are the most.")
        for values in wanted.values():
            self._check_near(values)
        yield 0, len(wanted) + 1
        item = self._read(index)
        inputs, features = self._inputs(item), self._features(item)
        frames = [("as it is", inputs)]
        for name, values in wanted.items():
            yield len(frames), len(wanted) + 1
            found = Counterfactual(prior, {name: values})(inputs, self.network, **features)
            label = ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
            )
            frames.append((label, inputs + found[f"change{name}"]))
        return self._strip(frames, item["image"], channel, {"known": _known(item)})

    def mix(
        self, first: int, second: int, levels: Sequence[str] | None = None, steps: int = 5, channel: int = 0
    ) -> Steps:
        """From one scan to another in latent space, on some levels or all: a film strip."""
        channel = self._channel(channel)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= MOST_STEPS:
            raise InputError(f"steps is {steps!r}: it must be a whole number from 2 to {MOST_STEPS}.")
        if levels is not None:
            for level in levels:
                find_level("levels", level, self.network.grids())
        yield 0, 2
        items = [self._read(index) for index in (first, second)]
        yield 1, 2
        inferer = Interpolation(steps, levels)
        pair = torch.stack([self._inputs(item) for item in items], dim=1)
        found = inferer(pair, self.network)
        shares = [f"{step / (steps - 1):.0%}" for step in range(steps)]
        frames = [(share, found[name]) for share, name in zip(shares, inferer.images(), strict=True)]
        return self._strip(frames, items[0]["image"], channel, {})

    def scan(self, index: int, channel: int = 0) -> Steps:
        """A scan alone."""
        channel = self._channel(channel)
        yield 0, 1
        item = self._read(index)
        return Result(files={"scan.nii.gz": volume(self._unit(self._inputs(item))[channel], item["image"].affine)})

    def fill(self, index: int, mask: Sequence[int], draws: int = 4, channel: int = 0) -> Steps:
        """What is painted on a scan, see :func:`painted`, filled in given the rest, as the job ``impute`` does it."""
        channel = self._channel(channel)
        missing = painted(mask, self.network.spatial_shape)
        if isinstance(draws, bool) or not isinstance(draws, int) or not 2 <= draws <= MOST_DRAWS:
            raise InputError(f"draws is {draws!r}: it must be a whole number from 2 to {MOST_DRAWS}.")
        total = draws * self._iterations
        yield 0, total
        item = self._read(index)
        inputs = self._inputs(item)
        hidden = missing[None, None].to(self.device)
        generator = scan_generator(self._seed, self.cohort.row(index)["image"])
        images = []
        for draw in range(draws):
            chain = Imputation(self._iterations, draws).chain(inputs, self.network, hidden)
            for done in range(self._iterations):
                with noise_from([generator]):
                    filled = next(chain)
                yield draw * self._iterations + done + 1, total
            images.append(self._unit(filled)[channel].cpu())
        scan, stack = self._unit(inputs)[channel].cpu(), torch.stack(images)
        mean = torch.where(missing, stack.mean(0), scan)
        spread = torch.where(missing, stack.std(0), 0.0)
        shown = {"scan": scan, "filled": mean, "spread": spread, "difference": mean - scan}
        shown |= {f"draw_{number:02d}": image for number, image in enumerate(images)}
        content = {"voxels": int(missing.sum()), "largest_spread": float(spread.max())}
        return Result(content, {f"{name}.nii.gz": volume(image, item["image"].affine) for name, image in shown.items()})

    def _strip(
        self, frames: Sequence[tuple[str, Tensor]], image: MetaTensor, channel: int, content: dict[str, Any]
    ) -> Result:
        """Frames with their labels, each with its difference from the first."""
        files = {}
        images = [self._unit(frame)[channel] for _, frame in frames]
        for number, shown in enumerate(images):
            files[f"frame_{number:02d}.nii.gz"] = volume(shown, image.affine)
            files[f"difference_{number:02d}.nii.gz"] = volume(shown - images[0], image.affine)
            files[f"frame_{number:02d}.png"] = picture(shown)
        return Result(content | {"labels": [label for label, _ in frames]}, files)


def _values(variable: Continuous | Categorical) -> list[float] | list[str]:
    """What a film strip over a covariate shows: its categories, or numbers as round as their distance allows."""
    if variable.kind == "categorical":
        return variable.grid()
    numbers = variable.grid(9)
    distance = numbers[1] - numbers[0]
    digits = max(0, 1 - math.floor(math.log10(distance))) if distance > 0 else 3
    return [round(number, digits) for number in numbers]


def _known(item: Mapping[str, Any]) -> dict[str, Any]:
    """The covariates that are known of a scan."""
    return {name: value for name, value in item["covariates"].items() if value is not None}
