"""Figures with a definition that others share: copies, spread, centiles, ages, information, and the size of a file.

All take arrays of what was measured, and give a flat dictionary of numbers. None: it can't be known of so few.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import logging
import lzma
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from scipy import stats
from scripts.data.covariates import Value
from scripts.population.fit import SHARPNESSES
from scripts.population.prior import PopulationPrior
from torch import Tensor

logger = logging.getLogger(__name__)

Numbers = dict[str, float | None]
BANDS = ((0, 5), (5, 20), (20, 50), (50, 100))  # of principal components, leading first
CENTILES = np.arange(1, 100) / 100
PIT_BINS = 20
NEIGHBOURS = 3  # of an image: how far its kind reaches around it
# what the log likelihood is multiplied by, beside the prior's own sharpness; 0, so that nothing is said, is the last
# resort of a model that is wrong
TEMPERED = (0.0, *SHARPNESSES)
SHUFFLES = 200
Row = Mapping[str, Value]


def ssim_window(shape: Sequence[int], most: int = 11) -> int:
    """Voxels of SSIM's window: ``most``, or on a smaller grid as many as fit, an odd number."""
    smallest = min(shape)
    return min(most, smallest if smallest % 2 else smallest - 1)


def mean_interval(name: str, values: Sequence[float], people: Sequence[Sequence[int]] | None = None) -> Numbers:
    """``NAME``, the mean; ``_std``, of people; ``_low`` and ``_high``, the mean's 95 % interval by Student's t.

    ``people`` are the places of each one's values, whose mean counts; None: each value is of another person.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values if people is None else np.array([values[list(places)].mean() for places in people])
    mean, few = float(values.mean()), len(values) < 2
    std = None if few else float(values.std(ddof=1))
    reach = None if few else float(stats.t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {name: mean, f"{name}_std": std} | {
        f"{name}_low": None if few else mean - reach,
        f"{name}_high": None if few else mean + reach,
    }


def membership(training: Sequence[float], held_out: Sequence[float], name: str = "membership") -> Numbers:
    """Can it be told from a scan's likelihood whether it was trained on?

    ``_auroc``: how often a training scan is likelier than a held-out one; 0.5 if the model keeps nothing of single
    people. Its 95 % interval is that of Hanley and McNeil (1982). ``_gap``: by how many bits per dim.

    Args:
        training, held_out: bits per dim of one scan of each person.
    """
    m, n = len(training), len(held_out)
    if not m or not n:
        return dict.fromkeys(f"{name}_{end}" for end in ("auroc", "auroc_low", "auroc_high", "gap"))
    auroc = float(stats.mannwhitneyu(held_out, training).statistic / (m * n))
    both, one = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (auroc * (1 - auroc) + (m - 1) * (both - auroc**2) + (n - 1) * (one - auroc**2)) / (m * n)
    reach = 1.96 * math.sqrt(max(variance, 0.0))
    gap = float(np.mean(held_out) - np.mean(training))
    return {
        f"{name}_auroc": auroc,
        f"{name}_auroc_low": max(auroc - reach, 0.0),
        f"{name}_auroc_high": min(auroc + reach, 1.0),
        f"{name}_gap": gap,
    }


def nearest_training(images: Tensor, training: Tensor) -> Tensor:
    """The distance of each image to its nearest training scan, and which that is: ``[images]`` each."""
    return torch.cdist(images.flatten(1).double(), training.flatten(1).double()).min(1)


def distance_ratio(of_samples: Tensor, of_scans: Tensor) -> float | None:
    """The median of the samples' distances to their nearest training scan over that of held-out scans.

    None, with a warning, where most of the held-out scans are training scans.
    """
    usual = float(of_scans.median())
    if usual == 0:
        logger.warning(
            "Half of the held-out scans or more are the same as training scans: no distance from these is usual, and "
            "no figure of held-out scans is one. Leave copies out."
        )
        return None
    return float(of_samples.median()) / usual


def spectrum(
    samples: Tensor, scans: Tensor, training: Tensor, bands: Sequence[tuple[int, int]] = BANDS
) -> dict[str, float]:
    """The variance of samples over that of scans, in bands of principal components: 1 where they vary alike.

    Args:
        samples, scans: two or more each, ``[images, channels, *spatial]``.
        training: the components are of these, which are neither of the two, so that neither is favoured.
        bands: of components, as far as there are so many.

    Returns:
        ``{"variance_1_5": ratio, ...}``.
    """
    training = training.flatten(1).double()
    mean = training.mean(0)
    count = min(bands[-1][1], len(training) - 1, training.shape[1])
    _, vectors = torch.linalg.eigh((training - mean) @ (training - mean).T)
    components = torch.nn.functional.normalize((training - mean).T @ vectors.flip(1)[:, :count], dim=0)
    variances = [((x.flatten(1).double() - mean) @ components).var(0) for x in (samples, scans)]
    return {
        f"variance_{first + 1}_{last}": (variances[0][first:last].sum() / variances[1][first:last].sum()).item()
        for first, last in bands
        if last <= count
    }


def precision_recall(samples: Tensor, scans: Tensor) -> Numbers:
    """Which samples lie among the scans, and which scans among the samples (Kynkäänniemi et al. 2019).

    An image lies among others if it is not farther from one of them than that one's third nearest.

    Args:
        samples, scans: more than three each; of fewer the farthest counts.

    Returns:
        ``precision`` and ``recall``, 0 to 1. Of as many scans more, instead of samples, they are what is to be had.
    """
    a, b = samples.flatten(1).double(), scans.flatten(1).double()
    between = torch.cdist(a, b)
    # the nearest of an image is itself
    reach_a, reach_b = (torch.cdist(x, x).kthvalue(min(NEIGHBOURS + 1, len(x)), dim=1).values for x in (a, b))
    precision = (between <= reach_b[None, :]).any(1).double().mean()
    recall = (between <= reach_a[:, None]).any(0).double().mean()
    return {"precision": precision.item(), "recall": recall.item()}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Frechet distance of two normal distributions that have the mean and covariance of each (FID).

    That of MONAI's ``FIDMetric``, but exact also where there are more features than images: the trace of the root of
    the product of covariances ``A^T A`` and ``B^T B`` is the sum of the singular values of ``A B^T``, or of that of the
    triangular factors of ``A`` and ``B``, which are no larger than the fewer of images and features.

    Args:
        first, second: features of two images or more each, ``[images, features]``.
    """
    a, b = first.double(), second.double()
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    first_factor, second_factor = (torch.linalg.qr(x, mode="r").R for x in centred)
    shared = torch.linalg.svdvals(first_factor @ second_factor.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * shared).item()


def region_distance(first: Tensor, second: Tensor, spread: Tensor) -> float:
    """The Wasserstein distance of two sets of people's region means, in standard deviations, over all regions.

    Args:
        first, second: ``[people, regions]``.
        spread: the standard deviation of each region among people, ``[regions]``.
    """
    pairs = zip(first.T.tolist(), second.T.tolist(), spread.tolist(), strict=True)
    return float(np.mean([stats.wasserstein_distance(a, b) / max(std, 1e-6) for a, b, std in pairs]))


def value_numbers(name: str, own: Sequence[float], said: Sequence[Mapping[str, float]], mean: float) -> Numbers:
    """How well a number such as the age is told: ``NAME_mae``, the mean absolute error, in the covariate's unit.

    Beside it ``_mae_mean``, that of always saying the mean of the training side; ``_slope`` of what is said over what
    is so, 1 without regression to the mean; ``_correlation``; ``_coverage_90``, how often the 90 % interval holds it.

    Args:
        name: of the covariate.
        own: what is so.
        said: of each scan ``mean``, ``low`` and ``high``.
        mean: of the training side.
    """
    truth, means = np.asarray(own), np.array([one["mean"] for one in said])
    held = [one["low"] <= value <= one["high"] for one, value in zip(said, own, strict=True)]
    varied = len(truth) > 2 and np.ptp(truth) > 0 and np.ptp(means) > 0
    line = stats.linregress(truth, means) if varied else None
    return mean_interval(f"{name}_mae", np.abs(means - truth)) | {
        f"{name}_mae_mean": float(np.abs(truth - mean).mean()),
        f"{name}_slope": float(line.slope) if varied else None,
        f"{name}_correlation": float(line.rvalue) if varied else None,
        f"{name}_coverage_90": float(np.mean(held)),
    }


def category_numbers(name: str, own: Sequence[str], said: Sequence[str], commonest: str) -> Numbers:
    """``NAME_accuracy`` of a category such as the sex, and ``_accuracy_commonest``, of always saying that one."""
    return {
        f"{name}_accuracy": float(np.mean([a == b for a, b in zip(own, said, strict=True)])),
        f"{name}_accuracy_commonest": float(np.mean([value == commonest for value in own])),
    }


class NormativeErrors:
    """How well it is known what is usual for scans' covariates, of many values of each scan: voxels, or regions.

    ``mace``: the mean over the centiles 1 to 99 of how far the share of values below it is from the centile, of all
    values and scans together. ``mace_UNIT``: likewise of each by itself, in the mean; of so few scans it is
    ``mace_UNIT_calibrated`` were all centiles right. ``expv``: the explained variance, 1 - var(value - expected) /
    var(value) over scans, in the mean over values. ``msll``: the mean standardised log loss in nats (Rasmussen and
    Williams 2006), less than 0 where the covariates' normal distribution is better than that of the training scans'
    mean and variance. ``smse``: the mean squared error over that of the training scans' mean.

    Args:
        size: how many values a scan has.
        training: those of training scans, ``[scans, values]``, for what is trivial; None: it isn't known.
    """

    def __init__(self, size: int, training: Tensor | None) -> None:
        self.scans, self.below = 0, np.zeros((len(CENTILES), size), dtype=np.int32)
        self.pit: list[np.ndarray] = []
        self.trivial = None
        if training is not None and len(training) > 1:
            values = training.double().numpy()
            self.trivial = values.mean(0), np.maximum(values.std(0, ddof=1), 1e-3)
        self.losses, self.errors = np.zeros(2), np.zeros(2)
        self.sums = np.zeros((2, 2, size))  # of values and of their errors: themselves, and squared

    def add(self, values: Tensor, expected: Tensor, spread: Tensor, z: Tensor | None = None) -> None:
        """The values of a scan, what is expected of each, the standard deviation, and the z score, ``[values]`` each.

        Without z it is that of the normal distribution of this mean and standard deviation.
        """
        x, mean, std = (each.double().numpy() for each in (values, expected, spread))
        centiles = stats.norm.cdf((x - mean) / std if z is None else z.double().numpy())
        self.scans += 1
        self.below += centiles < CENTILES[:, None]
        self.pit.append(np.histogram(centiles, PIT_BINS, (0, 1))[0] / len(x))
        self.sums += [[each, each**2] for each in (x, x - mean)]
        if self.trivial is not None:
            for place, (m, s) in enumerate(((mean, std), self.trivial)):
                self.losses[place] -= stats.norm.logpdf(x, m, s).mean()
                self.errors[place] += np.square(x - m).mean()

    @classmethod
    def joined(cls, parts: Sequence[NormativeErrors]) -> NormativeErrors:
        """Of the scans of several processes."""
        first, *others = parts
        for other in others:
            for name in ("scans", "below", "pit", "losses", "errors", "sums"):
                setattr(first, name, getattr(first, name) + getattr(other, name))
        return first

    def numbers(self, unit: str = "voxels") -> Numbers:
        """Those of all scans that were added, one or more; ``unit``: what the values are of."""
        shares = self.below / self.scans
        counts = np.arange(self.scans + 1)[:, None]
        chance = stats.binom.pmf(counts, self.scans, CENTILES) * np.abs(counts / self.scans - CENTILES)
        mean, square = np.swapaxes(self.sums, 0, 1) / self.scans
        total, left = square - mean**2
        varied = total > 1e-12
        return {
            "mace": float(np.abs(shares.mean(1) - CENTILES).mean()),
            f"mace_{unit}": float(np.abs(shares - CENTILES[:, None]).mean()),
            f"mace_{unit}_calibrated": float(chance.sum(0).mean()),
            "expv": float(1 - (left[varied] / total[varied]).mean()) if varied.any() else None,
            "msll": None if self.trivial is None else float(self.losses[0] - self.losses[1]) / self.scans,
            "smse": None if self.trivial is None else float(self.errors[0] / self.errors[1]),
        }

    def pit_histogram(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The probability integral transform: the share of values in each twentieth of the centiles, mean over scans.

        Beside it, how far from a twentieth the mean over so many scans is within 95 % of the time if it is one in
        truth (Student's t). Scans count as independent of each other, the values of one scan do not, but the error is
        no less than that of independent values. None for one scan.
        """
        shares = np.stack(self.pit)
        if len(shares) < 2:
            return shares[0], None
        least = math.sqrt((PIT_BINS - 1) / self.below.shape[1]) / PIT_BINS
        error = np.maximum(shares.std(0, ddof=1), least) / math.sqrt(len(shares))
        return shares.mean(0), stats.t.ppf(0.975, len(shares) - 1) * error


def _neighbours(volume: np.ndarray) -> np.ndarray:
    """Of each voxel of ``[depth, height, width]`` those of the cube of two before it, which a decoder knows, 0 outside:
    ``[7, depth, height, width]``, the three that share a face with the voxel last.
    """
    offsets = sorted(itertools.product((0, 1), repeat=3), key=sum)[:-1]
    padded = np.pad(volume, [(1, 0)] * 3)
    ends = [tuple(slice(o, o + size) for o, size in zip(offset, volume.shape, strict=True)) for offset in offsets]
    return np.stack([padded[end] for end in ends])


def fit_predictor(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Weights by which the seven voxels before one predict it best, in the least squares over all volumes, ``[7]``;
    these are ``[depth, height, width]`` or ``[height, width]``, uint8.
    """
    products, targets = np.zeros((7, 7)), np.zeros(7)
    for volume in volumes:
        before = _neighbours(volume.reshape(-1, *volume.shape[-2:])).reshape(7, -1).astype(np.float64)
        products += before @ before.T
        targets += before @ volume.ravel()
    return np.linalg.lstsq(products, targets)[0]


def file_bits(volume: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Bits per voxel of a volume of 8 bits in lossless files.

    Args:
        volume: ``[depth, height, width]`` or ``[height, width]``, uint8.
        weights: of :func:`fit_predictor`; None: ``linear`` is left out.

    Returns:
        ``gzip``, as a ``.nii.gz`` is; ``png``, ``webp`` and, where pillow-jxl-plugin is installed, ``jxl``, of all
        slices in one picture; ``xz``, of the differences to the mean of the three voxels before; ``linear``, ``xz`` of
        those to what the weights predict.
    """
    slices = volume.reshape(-1, *volume.shape[-2:])
    across = math.ceil(math.sqrt(len(slices)))
    padded = np.zeros((across * math.ceil(len(slices) / across), *slices.shape[1:]), dtype=np.uint8)
    padded[: len(slices)] = slices
    rows = padded.reshape(-1, across, *slices.shape[1:]).swapaxes(1, 2)
    picture = Image.fromarray(rows.reshape(-1, across * slices.shape[2]))
    before = _neighbours(slices)
    predicted = {"xz": before[-3:].sum(0, dtype=np.int16) // 3}
    if weights is not None:
        predicted["linear"] = np.rint(np.tensordot(weights, before, 1)).clip(0, 255).astype(np.int16)
    sizes = {"gzip": len(gzip.compress(volume.tobytes(), 9))}
    for name, values in predicted.items():
        sizes[name] = len(lzma.compress((slices - values).astype(np.uint8).tobytes(), preset=9))
    formats = {"png": {"optimize": True}, "webp": {"lossless": True, "quality": 100}}
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # it tells Pillow of the format
        formats["jxl"] = {"lossless": True, "effort": 9}
    for name, options in formats.items():
        file = io.BytesIO()
        picture.save(file, name, **options)
        sizes[name] = file.tell()
    return {name: 8 * size / volume.size for name, size in sizes.items()}


def information(prior: PopulationPrior, scores: Tensor, rows: Sequence[Row], seed: int = 0) -> Numbers:
    """What scans say of each covariate while the others are not known, and of all covariates together.

    For each, ``NAME_information``, bits per scan with the interval of :func:`mean_interval`; ``_most``, the entropy of
    the covariate among these people, which no model exceeds; and ``_shuffled_95``, the 95th percentile of what is found
    when the values are dealt out among the scans at random. All together are ``covariates_information``.

    The likelihood is tempered as best for these scans, by one number for each covariate. It can be 0, so that the mean
    lies between 0 and the entropy whatever the model. But for that choice, which favours by less than a bit over the
    number of scans, the mean falls short of the mutual information of scan and covariate and does not exceed it (van
    den Oord et al. 2018, Poole et al. 2019).

    Args:
        prior: with covariates.
        scores: of the scans, ``[scans, features]``, see :meth:`PopulationPrior.effect_scores`.
        rows: their covariates; a scan counts for those that are known.
        seed: of the shuffles.
    """
    names, found = list(prior.coding.variables), {}
    for about in [[name] for name in names] + ([names] if len(names) > 1 else []):
        known = [place for place, row in enumerate(rows) if all(row[name] is not None for name in about)]
        if len(known) > 1:
            likelihoods, own = _likelihoods(prior, scores[known], [rows[place] for place in known], about)
            found |= _gains(about[0] if len(about) == 1 else "covariates", likelihoods, own, seed)
    return found


def _likelihoods(
    prior: PopulationPrior, scores: Tensor, rows: Sequence[Row], about: Sequence[str]
) -> tuple[Tensor, list[int]]:
    """The log likelihood of each scan under each value that occurs, tempered by each of ``TEMPERED``: ``[sharpnesses,
    scans, values]``, each but for a number of the scan's own; and the place of each scan's value.

    Covariates that it is not about are averaged over, as these people have them.
    """
    coding = prior.coding
    others = [name for name in coding.variables if name not in about]
    values, rest = (_occurring(rows, names) for names in (about, others))
    features = torch.stack(
        [coding.numbers(dict(zip((*about, *others), (*v, *r), strict=True))) for v in values for r in rest]
    )
    logs = prior.covariate_likelihoods(scores.to(prior.information), features).double().cpu()
    logs = logs.reshape(len(scores), len(values), len(rest))
    shares = torch.tensor(list(rest.values()), dtype=torch.float64).log() - np.log(len(rows))
    tempered = torch.stack([(sharpness * logs + shares).logsumexp(2) for sharpness in TEMPERED])
    places = {value: place for place, value in enumerate(values)}
    return tempered, [places[tuple(row[name] for name in about)] for row in rows]


def _occurring(rows: Sequence[Row], names: Sequence[str]) -> Counter[tuple[Value, ...]]:
    """The combinations of values that occur, and how often."""
    return Counter(tuple(row[name] for name in names) for row in rows)


def _gains(name: str, likelihoods: Tensor, own: Sequence[int], seed: int) -> Numbers:
    """How much likelier scans are under their own values than on average, by the best of the sharpnesses."""
    places = torch.tensor(own)
    shares = torch.bincount(places).double() / len(own)
    gains = (likelihoods - (likelihoods + shares.log()).logsumexp(2, keepdim=True)) / np.log(2)
    generator = torch.Generator().manual_seed(seed)

    def of(order: Tensor) -> Tensor:
        """``[sharpnesses, scans]``, with the value of another scan for each."""
        return gains.gather(2, places[order].expand(len(gains), -1)[..., None])[..., 0]

    real = of(torch.arange(len(own)))
    shuffled = [of(torch.randperm(len(own), generator=generator)).mean(1).max().item() for _ in range(SHUFFLES)]
    return mean_interval(f"{name}_information", real[real.mean(1).argmax()].numpy()) | {
        f"{name}_information_most": float(-(shares * shares.log2()).sum()),
        f"{name}_information_shuffled_95": float(np.quantile(shuffled, 0.95)),
    }
