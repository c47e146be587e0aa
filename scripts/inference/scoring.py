"""How likely scans are and where they are not, as a MONAI inferer; how good reconstructions are; both in short."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.metrics import PSNRMetric, SSIMMetric
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.networks.layers.factories import Pool
from monai.transforms import LoadImage, Orientation
from scripts.inference import detection
from scripts.inference.common import Common
from scripts.inference.inferers import prior_where_missing
from scripts.inference.layouts import ScanLayout
from scripts.inference.lesions import PERCENTILE, LesionCounts
from scripts.inference.measures import ssim_window
from scripts.inference.outputs import read_rows
from scripts.inference.tables import row_table
from scripts.layers.gaussian import LatentSampler
from scripts.layers.output import foreground, foreground_percentile
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.familiarity import Familiarity, parts, statistics
from scripts.population.prior import LatentRecord, PopulationPrior
from scripts.training.losses import bits_per_dim, discretised_nll, negative_log_likelihood
from scripts.utils import figures
from scripts.utils.errors import InputError
from scripts.utils.files import write_csv, write_text
from scripts.utils.names import item_files, item_path, printable
from torch import Tensor

ROUNDS = 3  # in which what is unusual is looked for and taken out of a scan
NEIGHBOURHOOD = 5  # voxels: where more than MOST of a cube of this side is taken out, a lesion is large
MOST = 0.5
AROUND = 1 / 32  # of the grid's side: what lies so near to a large lesion counts as missing, too
LEAST_DEVIATION = 0.02  # of the range that scans are scaled to: no voxel is known better
logger = logging.getLogger(__name__)
MOST_UNUSUAL = 12  # scans in the picture
NAMED = 3  # in the log
LESION_TABLES = ("lesions.csv", "lesions_thresholds.csv", "lesions.md")


class Scoring(Inferer):
    """Say how likely scans are, and where they are not.

    ``[batch]`` each: ``bits_per_dim``, ``bits_per_voxel_8bit`` and ``bits_per_voxel_12bit`` (the same of the scan
    rounded to 256 and 4096 grey values, a bound of the size of a file), ``bits_per_voxel_8bit_brain`` (of the
    foreground alone, which bears all of the KL), ``elbo`` (nats), ``nll`` and ``kl`` (its parts), ``kl_z00``, ... (of
    each latent), ``psnr``, ``psnr_brain`` and ``ssim`` of the reconstruction, ``anomaly_score`` (the 99.9th percentile
    of the anomaly map in the foreground: what is too bright), ``anomaly_score_dark`` (likewise of what is too dark).
    With a population prior also ``bits_per_dim_population``, the bound under it; ``typicality``, the
    Mahalanobis distance of the scan's coordinates from the cohort's mean; and ``typicality_tail``, the share of the
    cohort's scans that lie at least so far.
    Where the prior knows what is usual also ``familiar``, bool: whether the cohort has such scans; and
    ``unfamiliarity``, the distance from what is usual over that which 1 % of people like the cohort's exceed.
    Shaped like the scans: ``restored``, the scan as the model would rather have it; and ``anomaly``, how many standard
    deviations the scan is brighter (or darker, below 0) than that, see :func:`anomaly_map`, smoothed.

    Scans need not be clipped to the range that they are scaled to. The network sees them clipped, and all numbers are
    of that; the anomaly is that of the scan as it is, since the brightest lesions are what clipping hides.

    Args:
        importance_samples: with K = 1 the bound is the ELBO with its KL in closed form. With more it is the
            importance-weighted bound of K draws (Burda et al. 2016, arXiv:1509.00519), in the mean tighter with each.
        smoothing: standard deviation in voxels of the Gaussian that smooths the anomaly map.
        restore: by how many standard deviations a voxel must differ from its reconstruction to be restored, see
            :func:`restored`; None restores nothing, so that ``restored`` is the reconstruction.
        prior: the network's population prior.
    """

    def __init__(
        self,
        importance_samples: int = 1,
        smoothing: float = 0.25,
        restore: float | None = 6.0,
        prior: PopulationPrior | None = None,
    ) -> None:
        if importance_samples < 1:
            raise InputError(f"importance_samples is {importance_samples}: it must be 1 or more.")
        if restore is not None and not restore > 0:
            raise InputError(
                f"restore is {restore}: it must be more than 0 standard deviations; None restores nothing."
            )
        self.importance_samples = importance_samples
        self.smoothing = gaussian_1d(torch.tensor(smoothing))
        self.restore = restore
        self.prior = prior

    def __call__(
        self,
        inputs: Tensor,
        network: VDVAE,
        features: Tensor | None = None,
        *,
        sampler: LatentSampler | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """``features`` are what the scans' covariates become, ``[batch, numbers]``, where the prior knows such."""
        value_range = OUTPUT_RANGES[network.output_activation]
        scans = inputs.clamp(*value_range)
        inside = foreground(scans, network)
        nlls, kls, ratios, gains = [], [], [], []
        rounded: dict[str, list[Tensor]] = {"8bit": [], "12bit": [], "8bit_brain": []}
        for _ in range(self.importance_samples):
            record = LatentRecord(self.prior, with_ratios=self.importance_samples > 1)
            output = record.infer(network, scans, temperature=1.0, sampler=sampler)
            nlls.append(negative_log_likelihood(output.loc, output.scale, scans))
            for bits in (8, 12):
                voxels = discretised_nll(output.loc, output.scale, scans, value_range, 2**bits)
                rounded[f"{bits}bit"].append(_total(voxels))
                if bits == 8:
                    rounded["8bit_brain"].append(_total(voxels * inside))
            kls.append(output.kl.double())
            ratios.append(record.log_ratio)
            if self.prior is not None:
                gains.append(self.prior.log_ratio(record.innovations, features))
        nll, kl = torch.stack(nlls).mean(0), torch.stack(kls).mean(0)
        bound = self._bound(nlls, kls, ratios)
        record = LatentRecord(self.prior)
        output = record.infer(network, scans, temperature=0.0)
        loc, scale, _ = output
        expected = (loc, scale) if self.restore is None else restored(inputs, loc, scale, network, self.restore)
        results = {"bits_per_dim": bits_per_dim(-bound, scans)}
        for name, nats in rounded.items():
            voxels = _total(inside).clamp_min(1) if name == "8bit_brain" else scans[0].numel()
            results[f"bits_per_voxel_{name}"] = -self._bound(nats, kls, ratios) / (voxels * math.log(2))
        results |= {"elbo": bound, "nll": nll, "kl": kl.sum(1)}
        results |= {f"kl_z{index:02d}": kl[:, index] for index in range(kl.shape[1])}
        if self.prior is not None:
            under_it = self._bound(nlls, kls, ratios, gains)
            coordinates = self.prior.coordinates(record.innovations, features)
            distance, tail = self.prior.typicality(coordinates)
            results |= {"bits_per_dim_population": bits_per_dim(-under_it, scans)}
            results |= {"typicality": distance, "typicality_tail": tail}
        familiarity = Familiarity.of(self.prior)
        if familiarity is not None:
            numbers = statistics(network, scans, output, record.innovations, parts(network), self.prior)
            apart = familiarity.unfamiliarity(numbers)
            results |= {"familiar": apart <= 1, "unfamiliarity": apart}
        with torch.autocast(inputs.device.type, enabled=False):
            results |= image_quality(loc, scans, network)
            anomaly = separable_filtering(anomaly_map(inputs, *expected, network), self.smoothing)
        results["anomaly_score"] = foreground_percentile(anomaly, scans, network, PERCENTILE)
        results["anomaly_score_dark"] = foreground_percentile(-anomaly, scans, network, PERCENTILE)
        return results | {"restored": expected[0], "anomaly": anomaly}

    def _bound(
        self,
        nlls: Sequence[Tensor],
        kls: Sequence[Tensor],
        ratios: Sequence[Tensor | float],
        gains: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The bound of one draw, whose KL is known, or that of several, importance-weighted; in nats, ``[batch]``."""
        gains = gains or [0.0] * len(nlls)
        if self.importance_samples == 1:
            return gains[0] - (nlls[0] + kls[0].sum(1))
        weights = [gain - nll - ratio for nll, ratio, gain in zip(nlls, ratios, gains, strict=True)]
        return torch.logsumexp(torch.stack(weights), dim=0) - math.log(self.importance_samples)


def _total(voxels: Tensor) -> Tensor:
    """Of each scan, ``[batch]``, in double precision."""
    return voxels.flatten(1).sum(1, dtype=torch.float64)


def anomaly_map(scans: Tensor, loc: Tensor, scale: Tensor, network: VDVAE) -> Tensor:
    """How many standard deviations scans, not clipped, are brighter (or darker, below 0) than expected, shaped like
    them.

    The standard deviation is what was predicted, together with 2 % of the range that scans are scaled to: noise,
    resampling, and what the latents leave open, so that no voxel stands out that the network is all too sure of.
    """
    low, high = OUTPUT_RANGES[network.output_activation]
    return (scans - loc) / (scale.square() + (LEAST_DEVIATION * (high - low)) ** 2).sqrt()


def restored(inputs: Tensor, loc: Tensor, scale: Tensor, network: VDVAE, threshold: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a network expects of each voxel, without what is unusual in the scans.

    A network that reconstructs well reconstructs lesions too, in part. So voxels that differ too much from their
    reconstruction, and those next to them, are given its value, and the network reconstructs that, in some rounds.
    Where most voxels of a neighbourhood are such, and around it, the scan counts as missing: latents become the means
    of the prior, and what is expected of a voxel is known no better than over the cohort. Of a small lesion the rest
    of the scan says enough.

    Args:
        inputs: scans, not clipped.
        loc, scale: of their reconstruction.
        threshold: standard deviations, of any channel.
    """
    scans, dims = inputs.clamp(*OUTPUT_RANGES[network.output_activation]), network.spatial_dims
    reach = max(1, round(AROUND * max(scans.shape[2:])))
    beside, share = Pool["MAX", dims](3, 1, 1), Pool["AVG", dims](NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2)
    around = Pool["MAX", dims](2 * reach + 1, 1, reach)
    replaced, cohort = torch.zeros_like(scans[:, :1]), network.voxel_gaussian()
    missing = replaced > 0
    for _ in range(ROUNDS):
        odd = (anomaly_map(inputs, loc, scale, network).abs() > threshold).any(1, keepdim=True)
        replaced = torch.maximum(replaced, beside(odd.to(scans.dtype)))
        missing |= around((share(replaced) > MOST).to(scans.dtype)) > 0
        seen = torch.where((replaced > 0) | missing, loc, scans)
        sampler = prior_where_missing(network, missing, temperature=0.0)
        loc, scale, _ = network.infer(seen, 0.0, keep_posteriors=False, sampler=sampler)[0]
        if cohort is not None:
            scale = torch.where(missing, torch.maximum(scale, cohort[1]), scale)
    return loc, scale


def image_quality(recon: Tensor, scans: Tensor, network: VDVAE) -> dict[str, Tensor]:
    """PSNR (dB) of all voxels and of the foreground, and SSIM, of reconstructions: ``[batch]``.

    They refer to the range that scans are scaled to.
    """
    low, high = OUTPUT_RANGES[network.output_activation]
    window = ssim_window(scans.shape[2:])
    ssim = SSIMMetric(network.spatial_dims, data_range=high - low, win_size=window)
    psnr = PSNRMetric(max_val=high - low)
    inside = foreground(scans, network)
    errors = _total((recon.float() - scans.float()).square() * inside) / _total(inside).clamp_min(1)
    return {
        "psnr": psnr(recon, scans).flatten(),
        "psnr_brain": 10 * torch.log10((high - low) ** 2 / errors.clamp_min(1e-12)).to(recon.dtype),
        "ssim": ssim(recon, scans).flatten(),
    }


def score_summary(
    common: Common,
    layout: Callable[..., ScanLayout],
    items: Sequence[Mapping[str, Any]],
    read: Callable,
    kinds: Mapping[str, str],
    unmasked_healthy: bool,
    scans: Sequence[str],
) -> None:
    """Write ``scores.csv``, ``most_unusual.png``, and with masks ``lesions.csv``, ``lesions_thresholds.csv`` and
    ``lesions.md``.

    Args:
        layout: makes the layout of a result's files, see :py:class:`scripts.inference.layouts.ScanLayout`.
        items: of the data set, with ``mask`` where there are masks.
        read: transforms that read a scan and turn it to RAS, for the picture.
        kinds: of the scans' lesions, see :func:`scripts.inference.masks.read_kinds`.
        unmasked_healthy: scans without a mask count as healthy; else they are left out of what is said of lesions.
        scans: paths of those that have results, in the order of the tables.
    """
    places, folder = layout("score", ".json"), common.output_dir
    row_table(folder / "scores.csv", places, common.cohort.columns, scans)
    rows = dict(read_rows(places, scans))
    scores = {scan: row["anomaly_score"] for scan, row in rows.items()}
    highest = sorted(scores, key=scores.get, reverse=True)[:MOST_UNUSUAL]
    if rows:
        bits = np.array([row["bits_per_dim"] for row in rows.values()])
        logger.info(
            "%d scan(s): %.3f bits per dim in the mean, %.3f to %.3f. Highest anomaly_score: %s. 'scores.csv' has all.",
            *(len(bits), bits.mean(), bits.min(), bits.max()),
            ", ".join(f"{printable(places.relative(scan))} ({scores[scan]:.1f})" for scan in highest[:NAMED]),
        )
    if common.figures and highest:
        found = {item_path(item): item for item in items}
        titles = [
            [f"{printable(Path(file).name)}, score {scores[scan]:.1f}" for file in item_files(found[scan])]
            for scan in highest
        ]
        pictures = _pictures([found[scan] for scan in highest], read, layout("anomaly"))
        figures.anomalies(folder / "most_unusual.png", pictures, titles)
    for name in LESION_TABLES:  # of an earlier run, with masks or of other scans
        (folder / name).unlink(missing_ok=True)
    if any("mask" in item for item in items):
        _lesion_tables(folder, layout("lesions", ".npz"), kinds, unmasked_healthy, scans)


def _pictures(
    items: Sequence[Mapping[str, Any]], read: Callable, layout: ScanLayout
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scans and their maps, one at a time."""
    load, turn = LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)
    for item in items:
        image = read({"image": item["image"]})["image"]
        yield image.as_tensor(), turn(load(layout.paths(item))).as_tensor()


def _lesion_tables(
    folder: Path, layout: ScanLayout, kinds: Mapping[str, str], unmasked_healthy: bool, scans: Sequence[str]
) -> None:
    counts = [
        LesionCounts.load(layout.relative(scan), layout.path(scan))._replace(kind=kinds[scan])
        for scan in scans
        if layout.path(scan).exists()
    ]
    unmasked = [scan for scan in counts if scan.mask == "none"]
    if unmasked:
        meaning = "count as healthy."
        if not unmasked_healthy:
            meaning = (
                "are left out of what is said of lesions. Give healthy ones an empty mask, or set "
                "--unmasked_healthy True if all of them are healthy."
            )
        logger.warning("%d scan(s) have no mask, such as '%s': they %s", len(unmasked), unmasked[0].name, meaning)
    if not unmasked_healthy:
        counts = [scan for scan in counts if scan.mask != "none"]
    if not counts:
        return
    write_csv(folder / "lesions.csv", *detection.scan_rows(counts))
    groups = detection.by_kind(counts)
    detected = detection.detect(counts, groups)
    points = detection.operating_points(counts, groups, detection.best(detected))
    write_csv(folder / "lesions_thresholds.csv", *detection.threshold_rows(points))
    parts = [detection.table(detected), *detection.sentences(detected), detection.threshold_table(points)]
    write_text(folder / "lesions.md", "\n\n".join(parts))
    for sentence in detection.sentences([d for d in detected if d.group == detected[-1].group]):
        logger.info("Lesions: %s", sentence)
