"""What the page can ask of a trained network: each job a generator of steps, see :mod:`scripts.webpage.work`.

They are made by the functions of :mod:`scripts.inference.jobs`, so that a scan's numbers are those of its jobs. Volumes
lie on the network's grid: scans and what the network makes of them from 0 (background) to 1.
"""

from __future__ import annotations

import inspect
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.image import imsave
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.utils import ensure_tuple
from scripts.data.covariates import Categorical, Continuous
from scripts.inference import jobs
from scripts.inference.certified import CertifiedEvaluator
from scripts.inference.covariate_results import in_words
from scripts.inference.covariates import need_covariates, targets
from scripts.inference.engine import ScanEvaluator, read_item
from scripts.inference.inferers import CoordinateDecoding, Imputation, Reconstruction
from scripts.inference.layouts import channel_labels
from scripts.inference.outputs import from_zero_to_one
from scripts.layers.levels import find_level, grid_key, grid_name
from scripts.population.prior import PopulationPrior
from scripts.utils.command_line import check_integer
from scripts.utils.devices import on_device
from scripts.utils.errors import BundleError, InputError, root_cause
from scripts.utils.figures import peak_of
from scripts.utils.formats import nifti_bytes
from scripts.utils.names import image_files
from scripts.utils.sheets import PLANES, as_array, middle, plane
from scripts.webpage.cohort import SCORES, CohortTable
from scripts.webpage.work import Result, Steps, request_key
from torch import Tensor

__all__ = ["Jobs"]

# what can be asked for: methods of Jobs
KINDS = (
    *("thumbnail", "score", "view", "coordinates", "decode", "sample"),
    *("change", "mix", "deviation", "scan", "fill"),
)
MOST_SAMPLES = 36
MOST_STEPS = 11  # of a film strip
MOST_DRAWS = 64
HOTTEST = 5  # temperature
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
        self.common = config.get_parsed_content("common")
        self.network = self.common.network.eval()
        self.prior: PopulationPrior | None = self.common.prior
        self.cohort = CohortTable(self.common.cohort.items, self.common.cohort.columns)
        self.name = str(self.common.ckpt)
        self.device = next(self.network.parameters()).device
        self._scoring: ScanEvaluator = config.get_parsed_content("scoring")
        self._range = self.common.value_range
        patterns = ensure_tuple(self.common.cohort.pattern)
        count = self.network.in_channels
        self._channels = channel_labels(patterns if len(patterns) == count > 1 else [""] * count)
        self._promised = config.get_parsed_content("certified")
        self._usual = {"draws": config.get_parsed_content("draws"), "atlas": config.get_parsed_content("paths#atlas")}
        if any(self._promised[name] is not None for name in ("error_rate", "calibration")):
            _ = self._deviation  # what is wrong with it is said at the start
        self._iterations = config.get_parsed_content("iterations")
        self._requests = itertools.count()
        self._decoded = lru_cache(maxsize=8)(self._decode)

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
            "covariates": [
                {"name": name, "kind": variable.kind, "values": _values(variable)}
                for name, variable in ({} if coding is None else coding.variables).items()
            ],
            "certified": self._promised["calibration"] is not None,
            "scans": len(self.cohort),
        }

    def prepare(self, kind: Any, arguments: Any) -> tuple[str, Steps]:
        """A job as it was asked for: the key of the request and the steps, of which none is done yet."""
        if kind not in KINDS or not isinstance(arguments, dict):
            raise InputError(f"There is no job {kind!r}: there are {', '.join(KINDS)}.")
        job = getattr(self, kind)
        try:
            inspect.signature(job).bind(**arguments)
        except TypeError as error:
            raise InputError(f"The job '{kind}' was asked for wrongly: {error}.") from error
        # scores go into the scans' rows, and are computed anew each time: files may have changed
        request = {**arguments, "request": next(self._requests)} if kind == "score" else arguments
        return request_key(kind, request), job(**arguments)

    @cached_property
    def _reconstruction(self) -> ScanEvaluator:
        return jobs.reconstruct(self.common, Reconstruction(levels="each"))

    @cached_property
    def _encoding(self) -> ScanEvaluator:
        return jobs.encode(self.common)

    @cached_property
    def _deviation(self) -> tuple[ScanEvaluator, CertifiedEvaluator | None]:
        """The job of the deviation, and what says which of it is significant, if a calibration was named."""
        job = jobs.deviation(self.common, **self._usual, **self._promised)
        if isinstance(job, ScanEvaluator):
            return job, None
        if job.known is None:
            raise InputError(
                "calibration: the page takes a calibration.json, which the job deviation writes with --error_rate and "
                "--calibration; make it first."
            )
        job.calibrate()
        return job.scans, job

    # each scan is read again when it is asked for: a cohort need not fit into memory
    def _read(self, index: Any, job: ScanEvaluator | None = None) -> dict[str, Any]:
        """A scan after a job's preprocessing, that of scores by default; of one that cannot be used its row says so
        then.
        """
        index = self.cohort.check(index)
        try:
            return read_item((job or self._scoring).dataset, index)
        except Exception as error:
            cause = root_cause(error)  # MONAI's Compose wraps it
            if isinstance(cause, BundleError):
                self.cohort.note(index, error=str(cause))
                raise cause from None
            raise

    def _inputs(self, item: Mapping[str, Any]) -> Tensor:
        """A scan as the network sees it, ``[1, channels, *spatial]``."""
        return item["image"].as_tensor()[None].to(self.device).clamp(*self._range)

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
        yield Result(files={"thumbnail.png": _picture(image)})

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
        yield Result({"scored": len(indices)})

    def _score(self, index: int, item: Mapping[str, Any]) -> dict[str, Tensor]:
        results = self._scoring.compute([item])
        scores = {name: float(results[name]) for name in SCORES if name in results}
        self.cohort.note(index, error="", **{name: value for name, value in scores.items() if math.isfinite(value)})
        return results

    def view(self, index: int, channel: int = 0) -> Steps:
        """A scan, its reconstructions up to each level, and maps of what is unusual in it."""
        channel = self._channel(channel)
        yield 0, 3
        item = self._read(index)
        inputs, affine = self._inputs(item), item["image"].affine
        yield 1, 3
        results = self._reconstruction.compute([self._read(index, self._reconstruction)])
        yield 2, 3
        scored = self._score(index, item)
        files = {"scan": self._unit(inputs), "restored": self._unit(scored["restored"])}
        low, high = self._range
        for name, image in results.items():
            if name.startswith("recon"):
                files[name] = self._unit(image)
        files |= {"zscore": results["zscore"][0], "anomaly": scored["anomaly"][0]}
        files["scale"] = results["scale"][0] / (high - low)
        _, *place = peak_of(*(files[name][channel, None].cpu().numpy() for name in ("scan", "anomaly")))
        content = {
            "row": self.cohort.row(index),
            "largest_scale": float(files["scale"][channel].quantile(0.999)),
            # mm: where the anomaly of the foreground is largest
            "peak": (affine.numpy() @ [*place, *[0] * (3 - len(place)), 1])[:3].tolist(),
        }
        yield Result(content, _volumes({name: image[channel] for name, image in files.items()}, affine))

    def deviation(self, index: int, channel: int = 0) -> Steps:
        """How far a scan is from what is usual for its covariates, as the job ``deviation`` says it."""
        channel = self._channel(channel)
        job, certified = self._deviation
        draws = job.inferer.draws
        yield 0, draws
        item = self._read(index, job)
        (batch,) = on_device([job.batch([item])], self.device)
        scans, inputs, arguments = batch
        refined = job.inferer.refined(inputs, self.network, arguments["features"], job.sampler(scans.items))
        for done in range(2, draws + 1):
            results = next(refined)
            yield done, draws
        maps, content = {"deviation": results["deviation"][0]}, {"known": _known(item)}
        if certified is not None:
            judged = {name: values[0].cpu() for name, values in results.items()}
            content["certificate"], maps["significant"] = certified.judge({**item, **judged})
        yield Result(content, _volumes({n: image[channel] for n, image in maps.items()}, item["image"].affine))

    def coordinates(self, index: int) -> Steps:
        """A scan's coordinates in the population prior."""
        self._need_prior()
        yield 0, 2
        item = self._read(index, self._encoding)
        yield 1, 2
        yield Result({"coordinates": self._encoding.compute([item])["coordinates"][0].tolist()})

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
        shown = {"decoded": images[0]} | ({} if start is None else {"difference": images[0] - images[1]})
        yield Result(files=_volumes(shown, self.network.scan_affine))

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
        sample = inferer(torch.tensor([place], device=self.device), self.network)["sample"]
        return self._unit(sample).cpu()

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
        check_integer("count", count, 1, MOST_SAMPLES)
        check_integer("seed", seed, 0, 2**31 - 1)
        chosen = {"population": self.prior, "network": None}[prior] if prior in ("population", "network") else None
        if prior != "network" and chosen is None:
            raise InputError(f"prior is {prior!r}: these weights have 'network' alone, or 'population' and 'network'.")
        for value in temperature.values() if isinstance(temperature, Mapping) else [temperature]:
            if isinstance(value, float | int) and not 0 <= value <= HOTTEST:
                raise InputError(f"temperature is {value!r}: it must be from 0 to {HOTTEST}.")
        common = self.common.replace(prior=chosen, seed=seed)
        job = jobs.sample(common, count, temperature, covariates=covariates or None)
        yield 0, count
        files = {}
        for number in range(1, count + 1):
            drawn = job.compute([read_item(job.dataset, number - 1)])["sample"]
            image = self._unit(drawn)[channel].cpu()
            files |= _volumes({f"sample_{number:04d}": image}, self.network.scan_affine)
            files[f"sample_{number:04d}.png"] = _picture(image)
            yield number, count
        yield Result({"count": count}, files)

    def change(self, index: int, covariates: Mapping[str, Any], channel: int = 0) -> Steps:
        """A scan under other covariates, of which one may be a list: a film strip."""
        channel = self._channel(channel)
        wanted = targets(need_covariates(self.prior).coding, covariates)
        if len(wanted) > MOST_STEPS:
            raise InputError(f"{len(wanted)} values were asked for: {MOST_STEPS} are the most.")
        yield 0, len(wanted) + 1
        item = self._read(index)
        inputs = self._inputs(item)
        frames = [("as it is", inputs)]
        for values in wanted.values():
            yield len(frames), len(wanted) + 1
            job = jobs.counterfactual(self.common, values)
            change = job.compute([{**item, "image": item["image"].clamp(*self._range)}])["change"]
            frames.append((in_words(values), inputs + change))
        yield self._strip(frames, item["image"], channel, {"known": _known(item)})

    def mix(
        self, first: int, second: int, levels: Sequence[str] | None = None, steps: int = 5, channel: int = 0
    ) -> Steps:
        """From one scan to another in latent space, on some levels or all: a film strip."""
        channel = self._channel(channel)
        check_integer("steps", steps, 2, MOST_STEPS)
        if levels is not None:
            for level in levels:
                find_level("levels", level, self.network.grids())
        yield 0, 2
        ends = [self._read(index)["image"] for index in (first, second)]
        job = jobs.interpolate(self.common, [image_files(image) for image in ends], steps, levels)
        yield 1, 2
        results = job.compute([read_item(job.dataset, 0)])
        shares = [f"{step / (steps - 1):.0%}" for step in range(steps)]
        frames = [(share, results[name]) for share, name in zip(shares, job.inferer.images(), strict=True)]
        yield self._strip(frames, ends[0], channel, {})

    def scan(self, index: int, channel: int = 0) -> Steps:
        """A scan alone."""
        channel = self._channel(channel)
        yield 0, 1
        item = self._read(index)
        yield Result(files=_volumes({"scan": self._unit(self._inputs(item))[channel]}, item["image"].affine))

    def fill(self, index: int, mask: Sequence[int], draws: int = 4, channel: int = 0) -> Steps:
        """What is painted on a scan, see :func:`painted`, filled in given the rest, as the job ``impute`` does it."""
        channel = self._channel(channel)
        missing = _painted(mask, self.network.spatial_shape)
        check_integer("draws", draws, 2, MOST_DRAWS)
        total = draws * self._iterations
        yield 0, total
        item = self._read(index)
        inputs = self._inputs(item)
        hidden = missing[None, None].to(self.device)
        noise = self._scoring.sampler([item])
        images = []
        for draw in range(draws):
            chain = Imputation(self._iterations, draws).chain(inputs, self.network, hidden, noise)
            for done in range(self._iterations):
                filled = next(chain)
                yield draw * self._iterations + done + 1, total
            images.append(self._unit(filled)[channel].cpu())
        scan, stack = self._unit(inputs)[channel].cpu(), torch.stack(images)
        mean = torch.where(missing, stack.mean(0), scan)
        spread = torch.where(missing, stack.std(0), 0.0)
        shown = {"scan": scan, "filled": mean, "spread": spread, "difference": mean - scan}
        shown |= {f"draw_{number:02d}": image for number, image in enumerate(images)}
        content = {"voxels": int(missing.sum()), "largest_spread": float(spread.max())}
        yield Result(content, _volumes(shown, item["image"].affine))

    def _strip(
        self, frames: Sequence[tuple[str, Tensor]], image: MetaTensor, channel: int, content: dict[str, Any]
    ) -> Result:
        """Frames with their labels, each with its difference from the first."""
        files = {}
        images = [self._unit(frame)[channel] for _, frame in frames]
        for number, shown in enumerate(images):
            both = {f"frame_{number:02d}": shown, f"difference_{number:02d}": shown - images[0]}
            files |= _volumes(both, image.affine)
            files[f"frame_{number:02d}.png"] = _picture(shown)
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


def _volumes(images: Mapping[str, Tensor], affine: Any) -> dict[str, bytes]:
    """Volumes ``[*spatial]`` as the bytes of ``.nii.gz``, by their names; those of 2D become single slices."""
    arrays = {f"{name}.nii.gz": np.atleast_3d(as_array(image)) for name, image in images.items()}
    return {name: nifti_bytes(array, np.asarray(affine, np.float64), "aligned", 1) for name, array in arrays.items()}


def _picture(image: Tensor) -> bytes:
    """The axial slice through the middle of a scan ``[*spatial]``, from 0 to 1, as the bytes of a PNG."""
    array = as_array(image)
    _, axis = PLANES[array.ndim][0]
    shown = plane(array, axis, 0 if axis is None else middle(array)[axis])
    buffer = io.BytesIO()
    imsave(buffer, shown, cmap="gray", vmin=0.0, vmax=1.0, format="png")
    return buffer.getvalue()


def _painted(runs: Any, shape: Sequence[int]) -> Tensor:
    """A mask that was painted on a volume, bool ``[*shape]``.

    ``runs`` is ``[start, length, start, length, ...]`` of painted voxels, in the order of a NIfTI file: the first axis
    fastest. Refused is what is not such, or paints nothing or everything.
    """
    size = int(np.prod(shape))
    whole = isinstance(runs, Sequence) and all(type(value) is int for value in runs) and len(runs) % 2 == 0
    pairs = list(zip(runs[::2], runs[1::2], strict=True)) if whole else [(-1, 0)]
    if any(start < 0 or length < 1 or start + length > size for start, length in pairs):
        raise InputError(f"mask must be whole numbers, [start, length, ...], that lie in the scan's {size} voxels.")
    mask = np.zeros(size, bool)
    for start, length in pairs:
        mask[start : start + length] = True
    if not mask.any():
        raise InputError("Nothing is painted: paint what is to be filled in first.")
    if mask.all():
        raise InputError("Everything is painted: leave some of the scan, from which the rest can be filled in.")
    return torch.from_numpy(mask.reshape(tuple(shape), order="F").copy())
