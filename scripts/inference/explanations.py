"""Why a scan is unlike a cohort: what may have happened to it, each hypothesis with what undoes it.

The cohort's mean and standard deviation of each voxel choose among the many turns and movements, which is cheap; the
network then sees a scan for each hypothesis alone (:mod:`scripts.inference.familiar`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.networks.layers import AffineTransform
from monai.networks.layers.factories import Pool
from scipy import ndimage
from scripts.data.transforms import FitShape, RobustScaled
from scripts.layers.output import FOREGROUND
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.familiarity import Familiarity, parts, reference, roughness, tissue_quantiles
from torch import Tensor

STAGES = ((16, 60), (32, 25))  # voxels along an axis where a transform is sought, and steps of gradient descent
LEARNING_RATE = 0.02  # radians, tenths of a metre, logarithms of a scale
TAIL = 8.0  # squared deviation beyond which a voxel hardly counts where a transform is sought: skull, lesions
TURNS = 2  # by right angles, the likeliest ones, that the network is shown
SMOOTH = 3.0  # deviations of people below what is usual, from which on a scan's roughness is that of a blurred one
WIDTHS = np.linspace(0, 2, 21)  # of the blur that is undone, voxels (a standard deviation)
NOISE = 0.02  # of a frequency's power: nothing is restored of what blurring left less of
SCALP = 0.02  # share of the tissue that is no brain, from which on a scan without it is tried
BRIDGE = 8.0  # mm, the width of what may join brain and scalp
OUTSHONE = 1.3  # times that the brightest tissue is usually brighter, from which on that is not its own contrast
CLIPPED = 0.02  # share of the tissue that is as bright as it gets, from which on a scan is called clipped
COMPLETIONS = 2  # times that the network completes what is missing, from the mean scan on
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))

# of a scan, [channels, *spatial], from 0 to 1, with the share of tissue in each voxel, [1, *spatial]
Change = Callable[[Tensor, Tensor], Tensor]


class Hypothesis(NamedTuple):
    """What may have happened to a scan, as what undoes it.

    Attributes:
        transform: maps the world of the cohort to the world that the scan's header says, ``[rank + 1, rank + 1]``.
        stripped: only the brain is looked at.
        changes: of its voxels, in this order.
        reason: the word for the last of these.
        words: half a sentence about it.
    """

    transform: np.ndarray
    stripped: bool = False
    changes: tuple[Change, ...] = ()
    reason: str = ""
    words: str = ""


class Hypotheses:
    """What may have happened to one scan, upright, ``[channels, *spatial]``; ``fit`` and ``scale`` are of the
    preprocessing.
    """

    def __init__(
        self, network: VDVAE, familiarity: Familiarity, scan: MetaTensor, fit: FitShape, scale: RobustScaled
    ) -> None:
        self.network, self.familiarity, self.percentiles = network, familiarity, (scale.lower, scale.upper)
        self.range, self.rank = OUTPUT_RANGES[network.output_activation], scan.ndim - 1
        fitted = fit(scan)
        self.shape = tuple(fitted.shape[1:])
        self.affine, self.scan_affine = (
            to_affine_nd(self.rank, image.affine.numpy().astype(float)) for image in (fitted, scan)
        )
        # smoothed as FitShape does, once for all transforms
        zoom = affine_to_spacing(self.affine, self.rank) / affine_to_spacing(self.scan_affine, self.rank)
        pixels = _from_zero(scan)
        bright = _tissue(pixels)
        tissue = ndimage.binary_fill_holes(bright)[None]
        self.plateau = max((channel >= 0.999 * channel.max())[tissue[0]].mean() for channel in pixels)
        brain = connected_brain(scan, bright)[None]
        self.beyond = 1 - brain.sum() / max(1, tissue.sum())
        source = np.concatenate([pixels, tissue, pixels * brain, brain], dtype=np.float32)
        smooth = ndimage.gaussian_filter(source, (0, *np.maximum((zoom - 1) / 2, 0)), truncate=3)
        (mean, std), where = reference(network), parts(network)
        self.source = torch.from_numpy(smooth).to(mean.device)
        self.mean, self.std = self._unit(mean[0]), std[0] / (self.range[1] - self.range[0])
        self.brain, self.core = where["brain"] | where["border"], where["brain"]
        self.centre = _centre(self.brain.cpu().numpy(), self.affine)
        self.scan_centre = _centre(tissue[0], self.scan_affine)
        self.spacing = affine_to_spacing(self.affine, self.rank)

    def _unit(self, scan: Tensor) -> Tensor:
        low, high = self.range
        return (scan - low) / (high - low)

    def scan(self, hypothesis: Hypothesis) -> Tensor:
        """As the network would get it, ``[channels, *spatial]``."""
        image, _ = self._changed(hypothesis)
        low, high = self.range
        return low + (high - low) * image

    def _changed(self, hypothesis: Hypothesis) -> tuple[Tensor, Tensor]:
        """The scan under a hypothesis, from 0 to 1, and the share of tissue in its voxels."""
        (sampled,) = self._sampled(torch.from_numpy(hypothesis.transform)[None], hypothesis.stripped)
        image, tissue = self._scaled(sampled[:-1]), sampled[-1:]
        for change in hypothesis.changes:
            image = change(image, tissue)
        return image, tissue

    def _sampled(self, transforms: Tensor, stripped: bool, by: int = 1) -> Tensor:
        """The scan and its tissue under transforms, ``[n, rank + 1, rank + 1]``: ``[n, channels + 1, *shape / by]``."""
        source = self.source.chunk(2)[int(stripped)]
        coarse = np.diag([by] * self.rank + [1.0])
        coarse[:-1, -1] = (by - 1) / 2
        to_world, to_scan = (torch.from_numpy(m) for m in (self.affine @ coarse, np.linalg.inv(self.scan_affine)))
        theta = (to_scan @ transforms @ to_world).float().to(self.source.device)
        sampler = AffineTransform([size // by for size in self.shape], padding_mode="zeros", align_corners=True)
        return sampler(source.expand(len(theta), *source.shape), theta)

    def _scaled(self, image: Tensor) -> Tensor:
        """An image between its percentiles, as :class:`RobustScaled` has it, from 0 to 1."""
        values = image.detach().cpu().numpy().reshape(len(image), -1)
        ends = np.percentile(values, self.percentiles, axis=1).astype(np.float32)
        low, high = (torch.from_numpy(end).to(image).reshape(-1, *[1] * self.rank) for end in ends)
        return ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)

    def _unlikeness(self, transforms: Tensor, stripped: bool, by: int = 1) -> Tensor:
        """How far the scan is from the cohort's mean under transforms, ``[n]``, on a grid that is coarser ``by``.

        What lies far off counts little, be it skull or lesion.
        """
        pool = Pool["AVG", self.rank](by)
        images = torch.stack([self._scaled(sampled[:-1]) for sampled in self._sampled(transforms, stripped, by)])
        squares = ((images - pool(self.mean[None])) / pool(self.std[None])).square()
        return TAIL * torch.log1p(squares / TAIL).flatten(1).mean(1)

    def after(self, known: Hypothesis, tried: Sequence[str] = ()) -> Iterator[Hypothesis]:
        """What may have happened beside what is known, without what was tried; the simple hypotheses first."""
        image, tissue = self._changed(known)
        moved = iter(()) if {"alignment", "voxel_size"} & {*tried} else self._moved(known)
        yield from itertools.islice(moved, 1)  # whoever is turned is centred, too
        if "orientation" not in tried:
            yield from self._turned(known)
        if self.beyond > SCALP and not known.stripped:
            yield known._replace(stripped=True, reason="skull", words="it shows more than a brain")
        of_voxels = {"range": self._range, "crop": self._crop, "contrast": self._contrast}
        for reason, changes in of_voxels.items():
            if reason not in tried:
                for change, words in changes(image, tissue):
                    yield known._replace(changes=(*known.changes, change), reason=reason, words=words)
        yield from moved

    # where it lies

    def _turned(self, known: Hypothesis) -> Iterator[Hypothesis]:
        """The likeliest of the turns by right angles and mirrorings, about the centres of the brains."""
        identity = np.eye(self.rank)
        turns = [
            identity[:, list(order)] * signs
            for order in itertools.permutations(range(self.rank))
            for signs in itertools.product((1.0, -1.0), repeat=self.rank)
        ][1:]
        transforms = np.stack([self._centred(turn) for turn in turns])
        by = max(1, min(self.shape) // STAGES[-1][0])
        unlikeness = self._unlikeness(torch.from_numpy(transforms), known.stripped, by)
        for place in unlikeness.argsort()[:TURNS].tolist():
            yield known._replace(transform=transforms[place], reason="orientation", words=_turn_words(turns[place]))

    def _centred(self, linear: np.ndarray) -> np.ndarray:
        """A transform that maps the centre of the cohort's brains to that of the scan's foreground."""
        transform = np.eye(self.rank + 1)
        transform[:-1, :-1], transform[:-1, -1] = linear, self.scan_centre - linear @ self.centre
        return transform

    def _moved(self, known: Hypothesis) -> Iterator[Hypothesis]:
        """The likeliest rigid movement, and the likeliest that stretches too."""
        start = known.transform
        both = torch.from_numpy(np.stack([start, self._centred(start[:-1, :-1])]))
        by = max(1, min(self.shape) // STAGES[0][0])
        start = both[self._unlikeness(both, known.stripped, by).argmin()].numpy()
        for reason, stretches in (("alignment", False), ("voxel_size", True)):
            start = self._descend(start, known.stripped, stretches)
            words = _movement_words(np.linalg.inv(known.transform) @ start, self.centre, stretches)
            yield known._replace(transform=start, reason=reason, words=words)

    @torch.enable_grad()
    def _descend(self, start: np.ndarray, stripped: bool, stretches: bool) -> np.ndarray:
        """The transform near ``start`` under which the scan is most like the cohort, by gradients."""
        rank, turns = self.rank, self.rank * (self.rank - 1) // 2
        rows, columns = torch.tril_indices(rank, rank, -1)
        numbers = torch.zeros(turns + 2 * rank, dtype=torch.float64, requires_grad=True)
        begin, centre = torch.from_numpy(start), torch.from_numpy(self.centre)

        def transform() -> Tensor:
            angles, shift, scales = numbers.split([turns, rank, rank])
            skew = torch.zeros(rank, rank, dtype=torch.float64).index_put((rows, columns), angles)
            linear = torch.matrix_exp(skew - skew.T) * (scales.exp() if stretches else 1.0)
            moved = torch.cat([linear, (centre - linear @ centre + 100 * shift)[:, None]], dim=1)
            return begin @ torch.cat([moved, torch.eye(rank + 1, dtype=torch.float64)[-1:]])

        optimizer = torch.optim.Adam([numbers], LEARNING_RATE)
        for size, steps in STAGES:
            by = max(1, min(self.shape) // size)
            for _ in range(steps):
                optimizer.zero_grad()
                self._unlikeness(transform()[None], stripped, by).sum().backward()
                optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] /= 4
        return transform().detach().numpy()

    # what its voxels show

    def _range(self, image: Tensor, tissue: Tensor) -> Iterator[tuple[Change, str]]:
        """A curve where the brightest are alike; a factor where something outshines the brain."""
        if self.plateau > CLIPPED:
            curve, _ = next(self._contrast(image, tissue))
            yield curve, f"it is clipped: {100 * self.plateau:.0f} % of its tissue have the highest value"
        bright = [values[:, -2] for values in (self.familiarity.quantiles, tissue_quantiles(image, self.core))]
        factor = bright[0] / bright[1].clamp_min(FOREGROUND)
        if (factor > OUTSHONE).any():
            factor = factor.to(image).reshape(-1, *[1] * self.rank)
            words = f"something outshines its brain, which has {1 / factor.max():.2g} of its usual brightness"
            yield lambda scan, tissue: (scan * factor).clamp(0, 1), words

    def _contrast(self, image: Tensor, tissue: Tensor) -> Iterator[tuple[Change, str]]:
        """The monotone curves that give its tissue the cohort's histogram."""
        quantiles, usual = tissue_quantiles(image, self.core), self.familiarity.quantiles
        yield partial(_curve, points=quantiles, values=usual), "its contrast is another: a curve makes it usual"
        yield partial(_curve, points=quantiles, values=usual.flip(1)), "its contrast is another: inverted it is usual"

    def _crop(self, image: Tensor, tissue: Tensor) -> Iterator[tuple[Change, str]]:
        """Slices at a side that are empty where all of the cohort have brain."""
        shown = (image > FOREGROUND).any(0)
        for axis in range(self.rank):
            others = [other for other in range(self.rank) if other != axis]
            filled, expected = (mask.sum(others) > 0 for mask in (shown, self.core))
            for side, order in zip(SIDES[axis], (1, -1), strict=True):
                empty = (filled[::order] if order > 0 else filled.flip(0)).cumsum(0) == 0
                lost = int((empty & (expected if order > 0 else expected.flip(0))).sum())
                if lost:
                    end = int(empty.sum()) + 1  # the last of them is half empty
                    hole = torch.arange(len(empty)).to(shown.device) < end
                    hole = (hole if order > 0 else hole.flip(0)).reshape(
                        [-1 if a == axis else 1 for a in range(self.rank)]
                    )
                    words = f"it is cut at its {side}, by {lost * self.spacing[axis]:.0f} mm at least"
                    yield lambda scan, tissue, hole=hole: self._completed(scan, hole), words

    @torch.no_grad()
    def _completed(self, scan: Tensor, hole: Tensor) -> Tensor:
        """A scan whose hole, ``[*spatial]``, has what the network makes of the rest."""
        low, high = self.range
        scan = torch.where(hole, self.mean, scan)
        for _ in range(COMPLETIONS):
            output, _ = self.network.infer((low + (high - low) * scan)[None], 0.0, keep_posteriors=False)
            scan = torch.where(hole, self._unit(output.loc[0]), scan)
        return scan

    def blurred(self, known: Hypothesis) -> Hypothesis | None:
        """That it is blurred along some axes, where it is far smoother than usual there; None where it is not.

        No undoing of a blur gives usual voxels back: this is no candidate beside the others.
        """
        image, _ = self._changed(known)
        unit, widths = self.range[1] - self.range[0], {}
        spread = self.familiarity.covariance.diagonal().sqrt().tolist()
        references = {
            n: values for n, *values in zip(self.familiarity.names, self.familiarity.mean.tolist(), spread, strict=True)
        }
        for axis in range(self.rank):
            mean, deviation = references[f"roughness {'xyz'[axis]}"]
            for width in WIDTHS:
                rough = roughness(unit * _sharpened(image, {axis: width})[None])[axis].log().item()
                if rough > mean - (SMOOTH * deviation if width == 0 else 0):
                    break
                widths[axis] = float(width)
        if not widths:
            return None
        sizes = (f"{2.355 * width * self.spacing[axis]:.0f} mm along {'xyz'[axis]}" for axis, width in widths.items())
        changes = (*known.changes, lambda scan, tissue: _sharpened(scan, widths))
        return known._replace(changes=changes, reason="resolution", words=f"it is blurred, by {' and '.join(sizes)}")


def _from_zero(scan: MetaTensor) -> np.ndarray:
    """A scan's voxels less the lowest of their channel, ``[channels, *spatial]``."""
    pixels = scan.as_tensor().float().cpu().numpy()
    return pixels - pixels.min(tuple(range(1, pixels.ndim)), keepdims=True)


def _tissue(pixels: np.ndarray) -> np.ndarray:
    """What is not dark, ``[*spatial]``, of voxels from 0 on, ``[channels, *spatial]``."""
    return (pixels > FOREGROUND * np.percentile(pixels, 99.9)).any(0)


def connected_brain(scan: MetaTensor, tissue: np.ndarray | None = None) -> np.ndarray:
    """The largest piece of tissue that hangs together by more than thin bridges, and what it surrounds, ``[*spatial]``,
    of a scan, ``[channels, *spatial]``, and its tissue, bool ``[*spatial]``, where that is known.
    """
    tissue = _tissue(_from_zero(scan)) if tissue is None else tissue
    steps = max(1, round(BRIDGE / 2 / float(np.mean(affine_to_spacing(scan.affine.numpy(), tissue.ndim)))))
    pieces, _ = ndimage.label(ndimage.binary_erosion(tissue, iterations=steps))
    sizes = np.bincount(pieces.ravel())[1:]
    if not len(sizes):
        return tissue
    brain = ndimage.binary_dilation(pieces == 1 + sizes.argmax(), iterations=steps + 1, mask=tissue)
    return ndimage.binary_fill_holes(brain)


def _centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Of the voxels of a mask, in the world."""
    return affine[:-1, :-1] @ np.argwhere(mask).mean(0) + affine[:-1, -1]


def _curve(scan: Tensor, tissue: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """A scan's tissue on a curve through points, ``[channels, n]`` each; at the border its share stays what it is."""
    share = tissue.clamp(FOREGROUND, 1)
    pure = (scan / share).clamp(0, 1)
    mapped = np.stack([np.interp(*map(np.asarray, line)) for line in zip(pure.cpu(), points, values, strict=True)])
    return torch.where(tissue > FOREGROUND, share * torch.from_numpy(mapped).to(scan).clamp(FOREGROUND, 1), scan)


def _sharpened(scan: Tensor, widths: dict[int, float]) -> Tensor:
    """A scan without a Gaussian blur of so many voxels (a standard deviation) along its axes, by Wiener's filter."""
    result = scan
    for axis, width in widths.items():
        frequencies = torch.fft.rfftfreq(scan.shape[1 + axis], device=scan.device)
        passed = torch.exp(-2 * (torch.pi * width * frequencies).square())
        gain = passed * (1 + NOISE) / (passed.square() + NOISE)
        gain = gain.reshape([-1 if other == axis + 1 else 1 for other in range(scan.ndim)])
        result = torch.fft.irfft(gain * torch.fft.rfft(result, dim=1 + axis), scan.shape[1 + axis], dim=1 + axis)
    return torch.where(result > FOREGROUND, result, 0).clamp(0, 1)


def _turn_words(turn: np.ndarray) -> str:
    """What lies where the header says right, front and top."""
    sides = [SIDES[np.abs(column).argmax()][int(column.sum() > 0)] for column in np.linalg.inv(turn).T]
    places = (f"{side} where it says {SIDES[axis][1]}" for axis, side in enumerate(sides) if side != SIDES[axis][1])
    return f"its axes are not those of its header: {', '.join(places)}"


def _movement_words(moved: np.ndarray, centre: np.ndarray, stretches: bool) -> str:
    """How a scan lies by its header, where ``moved`` maps the world of the cohort to the header's."""
    scales = np.linalg.norm(moved[:-1, :-1], axis=0)
    cosine = (np.trace(moved[:-1, :-1] / scales) - len(centre) % 2) / 2
    shift = np.linalg.norm(moved[:-1, :-1] @ centre + moved[:-1, -1] - centre)
    words = f"it is not aligned, {np.degrees(np.arccos(np.clip(cosine, -1, 1))):.0f}° and {shift:.0f} mm off"
    if stretches:
        words += (
            f", and its header says voxels {' x '.join(f'{scale:.2f}' for scale in scales)} times as large as they are"
        )
    return words
