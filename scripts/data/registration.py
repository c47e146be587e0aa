"""Bias correction and affine alignment of head scans to the ICBM152 template, with SimpleITK.

The template is the 2009a symmetric T1 average that the nilearn wheel ships. It is skull-stripped and raw scans are not:
similarity is measured only in the template's brain and a rim around it, and the search starts in many places.

Images are SimpleITK's, whose world is LPS (x to the left, y to the back). A transform maps points of the template to
points of the scan, as resampling needs it, and as ITK and ANTs write it to file.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import SimpleITK
from scipy import ndimage
from scripts.utils.errors import InputError

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS (nibabel, NIfTI) and LPS (ITK)
BINS = 32  # of the joint histogram, along each axis
# The rim shows the size of the brain. With one of 10 mm the scalp of raw heads makes the brain too large.
RIM = 6.0  # mm around the template's brain that are compared as well
SEARCH, ROUGH, FINE = 8.0, 4.0, 3.0  # mm between the template's samples, stage by stage
PADDING = 60.0  # mm of air put around a scan
HEAD_HEIGHT = 170.0  # mm below the top of the head, where the neck begins
BIAS_SPACING = 6.0  # mm between the voxels that N4 sees
# The search starts from all combinations of these. Heads tilt forwards and back more than to a side.
PITCHES = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians
ROLLS = YAWS = (-0.25, 0.0, 0.25)
# Size is fixed at first: a template that is free to grow ends at the scalp of a raw head.
SCALES = (0.8, 0.9, 1.0)
TURNED, GROWN = 4, 2  # of each scale, how many starts are optimised as rigid, and how many of these with scaling
SPACING = 2.0  # mm
# All distances are mm from the surface of the template's brain, those inside are below 0.
DEEP = -15.0  # where every aligned head has brain: says how bright that is
CORE, OUTSIDE = -6.0, 7.0  # what is brain, and what is not, whatever the scan shows
DARK = 0.25  # of the brain's intensity: what is darker at its edge is not brain
OPENING, CLOSING = 4.0, 6.0  # mm, of the mask: bridges to what is around it are cut, sulci are filled
ABOVE = 10.0  # mm above the middle of the template's coordinates: below are face and neck
NORMALS = 7  # every seventh voxel of the surface sends one out
STEPS = np.arange(-30.0, 21.0)  # along a normal
INSIDE, BEYOND = range(-18, 3), range(11)  # where a dark rim is looked for
DEPTH_INSIDE, DEPTH_BEYOND = 0.35, 0.25  # of the brain's intensity, by which it is darker than what is around it
ON_SCALP = 0.2  # share of the normals from which on the template is said to lie on the scalp
SCALP = 9.0  # mm: scalp, and most of the skull


class Alignment(NamedTuple):
    """How a scan lies in the template.

    Attributes:
        transform: maps points of the template to points of the scan (LPS, mm).
        similarity: Mattes mutual information in nats, in the template's brain and its rim; higher is better.
    """

    transform: SimpleITK.AffineTransform
    similarity: float


@lru_cache(maxsize=1)
def template() -> SimpleITK.Image:
    """The ICBM152 2009a symmetric T1 average that nilearn ships: 1 mm, float32, 0 outside of the brain, up to 255."""
    from nilearn.datasets import load_mni152_template  # pandas and scikit-learn come with it: not before it is needed

    t1 = load_mni152_template(resolution=1)
    return to_sitk(255 * np.asarray(t1.dataobj), t1.affine)


@lru_cache(maxsize=1)
def template_brain() -> SimpleITK.Image:
    """The template's brain mask: 1 mm, uint8."""
    return template() > 0


def foreground(image: SimpleITK.Image) -> SimpleITK.Image:
    """What a scan shows without the air around it: the head, or the brain alone if the scan is skull-stripped.

    Air is the lowest value if a tenth of all voxels have exactly that, and what Otsu's threshold says otherwise. Small
    islands are dropped and holes are filled.

    Args:
        image: a scan, float32.

    Returns:
        uint8 on the grid of ``image``, 1 in the foreground.
    """
    voxels = SimpleITK.GetArrayViewFromImage(image)
    lowest = float(voxels.min())
    if np.count_nonzero(voxels == lowest) >= 0.1 * voxels.size:
        mask = ndimage.binary_opening(voxels > lowest)
        return like(_filled(_large_parts(mask)), image)
    # Otsu's threshold may separate dark from bright tissue; of the square root, it separates air from tissue.
    small = _to_spacing(image, ROUGH)
    smooth = SimpleITK.SmoothingRecursiveGaussian(
        SimpleITK.Sqrt(SimpleITK.Clamp(small - lowest, lowerBound=0.0)), ROUGH
    )
    mask = _large_parts(SimpleITK.GetArrayViewFromImage(SimpleITK.OtsuThreshold(smooth, 0, 1)) > 0)
    # The skull is as dark as air: close the gap, so that brain and scalp are one part.
    mask = np.pad(mask, 3)
    mask = ndimage.binary_closing(mask, ndimage.generate_binary_structure(3, 2), iterations=3)[3:-3, 3:-3, 3:-3]
    return SimpleITK.Resample(like(_filled(mask), small), image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)


def _large_parts(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that have a tenth of the largest one's voxels or more."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ((sizes > 0) & (sizes >= 0.1 * sizes.max()))[parts]


def _filled(mask: np.ndarray) -> np.ndarray:
    return ndimage.binary_fill_holes(mask).astype(np.uint8)


def log_bias_field(image: SimpleITK.Image, mask: SimpleITK.Image) -> SimpleITK.Image:
    """The logarithm of a scan's multiplicative bias field, by N4 on voxels of 6 mm.

    Args:
        image: a scan without negative values, float32.
        mask: uint8 on the grid of ``image``, where to estimate the field.

    Returns:
        float32 on the grid of ``image``, with a median of 0 within the mask; the corrected scan is
        ``image / exp(field)``.
    """
    small = _to_spacing(image, BIAS_SPACING)
    inside = SimpleITK.Resample(mask, small, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor) & (small > 0)
    correction = SimpleITK.N4BiasFieldCorrectionImageFilter()
    correction.SetMaximumNumberOfIterations([30, 30, 30])
    correction.Execute(small, inside)
    coarse = SimpleITK.GetArrayFromImage(correction.GetLogBiasFieldAsImage(small))
    level = np.median(coarse[SimpleITK.GetArrayViewFromImage(inside) > 0])
    return SimpleITK.Cast(correction.GetLogBiasFieldAsImage(image), SimpleITK.sitkFloat32) - float(level)


def align(image: SimpleITK.Image, head: SimpleITK.Image) -> Alignment:
    """Find the affine transform that maximises the mutual information of a scan with the template.

    Many rigid starts on coarse samples; the better ones with uniform scaling on finer samples; the best one with all
    twelve parameters. Nothing is random: the same scan gives the same transform.

    Args:
        image: a scan of a whole head or of a brain, float32; any contrast, orientation and voxel size.
        head: uint8 on the grid of ``image``, 1 in the head or brain.

    Raises:
        ValueError: when the scan and the template do not overlap anywhere.
    """
    search, rough, fine = (_Stage(_clamped(image, head), spacing) for spacing in (SEARCH, ROUGH, FINE))

    grown = []
    for scale in SCALES:
        angles = itertools.product(PITCHES, ROLLS, YAWS)
        starts = [_start(centre, turn, scale) for turn, centre in itertools.product(angles, _centres(head))]
        turned = [search.optimise(start, 8.0, weights=[1] * 6 + [0]) for start in search.best(starts, TURNED)]
        grown += [rough.optimise(start, 2.0) for start in rough.best(turned, GROWN)]
    affine = rough.optimise(_affine(*rough.best(grown, 1)), 1.0)
    return _finished(affine, rough, fine)


def refine(image: SimpleITK.Image, head: SimpleITK.Image, transform: SimpleITK.AffineTransform) -> Alignment:
    """Take the last step of :func:`align` from a transform that is nearly right; arguments and errors are the same."""
    return _finished(transform, *(_Stage(_clamped(image, head), spacing) for spacing in (ROUGH, FINE)))


def _finished(transform: SimpleITK.AffineTransform, rough: _Stage, fine: _Stage) -> Alignment:
    affine = fine.optimise(transform, 0.5)
    similarity = rough.similarity(affine)
    if not math.isfinite(similarity):
        raise InputError("the scan cannot be brought to overlap with the template")
    return Alignment(affine, similarity)


def _clamped(image: SimpleITK.Image, head: SimpleITK.Image) -> SimpleITK.Image:
    """A scan without its brightest voxels: fat and vessels, ten times as bright as the brain, leave it few bins."""
    inside = SimpleITK.GetArrayViewFromImage(image)[SimpleITK.GetArrayViewFromImage(head) > 0]
    lowest = float(SimpleITK.GetArrayViewFromImage(image).min())
    highest = max(float(np.percentile(inside, 99.5)), lowest + 1e-6)
    return SimpleITK.Clamp(image, SimpleITK.sitkFloat32, lowest, highest)


def smooth_for(image: SimpleITK.Image, spacing: float) -> SimpleITK.Image:
    """A scan smoothed along those axes on which voxels of ``spacing`` mm are larger than its own; float32."""
    zoom = spacing / np.array(image.GetSpacing()[::-1])
    sigma = np.maximum((zoom - 1) / 2, 0)  # voxels
    voxels = SimpleITK.GetArrayViewFromImage(image)
    return like(ndimage.gaussian_filter(voxels, sigma, output=np.float32, mode="nearest", truncate=3), image)


class _Stage:
    """The similarity of a scan and the template on samples of one density, and its maximum."""

    def __init__(self, image: SimpleITK.Image, spacing: float) -> None:
        moving = _to_spacing(image, spacing)
        # Samples outside of the scan do not count, which would favour transforms that leave it: put air around it.
        width = [math.ceil(PADDING / spacing)] * 3
        self.moving = SimpleITK.ConstantPad(moving, width, width, float(SimpleITK.GetArrayViewFromImage(moving).min()))
        self.fixed, mask = _fixed(spacing)
        self.method = SimpleITK.ImageRegistrationMethod()
        self.method.SetMetricAsMattesMutualInformation(BINS)
        self.method.SetMetricFixedMask(mask)
        self.method.SetInterpolator(SimpleITK.sitkLinear)
        self.method.MetricUseFixedImageGradientFilterOff()
        self.method.SetNumberOfThreads(1)

    def similarity(self, transform: SimpleITK.Transform) -> float:
        """Mutual information in nats; minus infinity where the two do not overlap."""
        self.method.SetInitialTransform(transform)
        self.method.MetricUseMovingImageGradientFilterOff()  # slow, and no gradient is needed
        try:
            return -self.method.MetricEvaluate(self.fixed, self.moving)
        except RuntimeError:
            return -math.inf

    def best(self, transforms: list, count: int) -> list:
        """The ``count`` transforms of the highest similarity, best first."""
        return sorted(transforms, key=self.similarity, reverse=True)[:count]

    def optimise(
        self, transform: SimpleITK.Transform, step: float, weights: list[float] | None = None
    ) -> SimpleITK.Transform:
        """Move a transform to a maximum near it, in steps of ``step`` mm at first; parameters of weight 0 stay."""
        result = type(transform)(transform)
        self.method.SetInitialTransform(result, inPlace=True)
        self.method.MetricUseMovingImageGradientFilterOn()  # without its smooth gradients the affine stage diverges
        self.method.SetOptimizerAsRegularStepGradientDescent(step, step / 64, 60, 0.6)
        self.method.SetOptimizerScalesFromPhysicalShift()
        self.method.SetOptimizerWeights(weights or [1] * len(transform.GetParameters()))
        try:
            self.method.Execute(self.fixed, self.moving)
        except RuntimeError:  # it stepped out of the scan
            return transform
        return result if self.similarity(result) > self.similarity(transform) else transform


@lru_cache(maxsize=3)
def _fixed(spacing: float) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """The template on voxels of ``spacing`` mm, and the mask of its brain with the rim."""
    image = _to_spacing(template(), spacing)
    rim = _full_distance() < RIM
    return image, SimpleITK.Resample(rim, image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)


def _to_spacing(image: SimpleITK.Image, spacing: float) -> SimpleITK.Image:
    """A scan on cubic voxels of ``spacing`` mm over the same field of view, float32."""
    extent = np.array(image.GetSize()) * image.GetSpacing()
    size = np.maximum(np.ceil(extent / spacing - 1e-3), 4).astype(int).tolist()
    grid = SimpleITK.Image(size, SimpleITK.sitkUInt8)
    grid.SetSpacing([spacing] * 3)
    grid.SetDirection(image.GetDirection())
    grid.SetOrigin((np.array(_middle(image)) - _middle(grid)).tolist())
    resample = SimpleITK.ResampleImageFilter()
    resample.SetReferenceImage(grid)
    resample.SetInterpolator(SimpleITK.sitkLinear)
    resample.SetOutputPixelType(SimpleITK.sitkFloat32)
    resample.UseNearestNeighborExtrapolatorOn()
    return resample.Execute(smooth_for(image, spacing))


def _middle(image: SimpleITK.Image) -> tuple[float, float, float]:
    """The centre of the field of view, LPS mm."""
    return image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])


def _points(mask: SimpleITK.Image) -> np.ndarray:
    """Where a mask's voxels lie, ``[N, 3]``, LPS mm."""
    indices = np.argwhere(SimpleITK.GetArrayViewFromImage(mask))[:, ::-1]
    return indices @ (np.array(mask.GetDirection()).reshape(3, 3) * mask.GetSpacing()).T + mask.GetOrigin()


@lru_cache(maxsize=1)
def brain_centre() -> tuple[float, float, float]:
    """The centre of mass of the template's brain mask, LPS mm."""
    return tuple(_points(template_brain()).mean(0).tolist())


def _centres(head: SimpleITK.Image) -> list[np.ndarray]:
    """Where the middle of a scan's brain may be, LPS mm."""
    points = _points(head)
    above_neck = points[points[:, 2] > np.percentile(points[:, 2], 99.9) - HEAD_HEIGHT].mean(0)
    return [above_neck, np.array(_middle(head)), np.array(brain_centre())]


def _start(centre: np.ndarray, angles: tuple[float, float, float], scale: float) -> SimpleITK.Similarity3DTransform:
    """The transform that turns the template's brain about its centre, scales it and puts it at a scan's ``centre``."""
    start = SimpleITK.Similarity3DTransform()
    start.SetMatrix((np.array(SimpleITK.Euler3DTransform((0, 0, 0), *angles).GetMatrix()) * scale).tolist())
    start.SetCenter(brain_centre())
    start.SetTranslation((centre - brain_centre()).tolist())
    return start


def _affine(transform: SimpleITK.Similarity3DTransform) -> SimpleITK.AffineTransform:
    result = SimpleITK.AffineTransform(3)
    result.SetMatrix(transform.GetMatrix())
    result.SetCenter(transform.GetCenter())
    result.SetTranslation(transform.GetTranslation())
    return result


def to_sitk(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """An array as a SimpleITK image, float32.

    Args:
        array: ``[x, y, z]``.
        affine: ``[4, 4]``, voxel indices to world mm, RAS.
    """
    affine = FLIP @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def array_and_affine(image: SimpleITK.Image) -> tuple[np.ndarray, np.ndarray]:
    """A SimpleITK image's voxels, a view ``[x, y, z]``, and its affine ``[4, 4]``, RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayViewFromImage(image).T, FLIP @ affine


def like(voxels: np.ndarray, image: SimpleITK.Image) -> SimpleITK.Image:
    """An image of these voxels ``[z, y, x]`` on the grid of another."""
    result = SimpleITK.GetImageFromArray(voxels)
    result.CopyInformation(image)
    return result


def align_head(image: SimpleITK.Image, head: SimpleITK.Image) -> tuple[Alignment, float]:
    """Align a scan, and where the template comes to lie on a bright scalp, once more without scalp.

    Args:
        image: a scan of a whole head or of a brain, float32.
        head: uint8 on the grid of ``image``, 1 in the head or brain.

    Returns:
        The alignment, and its :func:`scalp_inside`.
    """
    found = align(image, head)
    share = scalp_inside(image, found.transform)
    if share <= ON_SCALP:
        return found, share
    depth = SimpleITK.SignedMaurerDistanceMap(head, squaredDistance=False, useImageSpacing=True)
    inner = SimpleITK.Cast(depth < -SCALP, SimpleITK.sitkUInt8)
    darkest = float(SimpleITK.GetArrayViewFromImage(image).min())
    again = refine(image, head, align(SimpleITK.Mask(image, inner, darkest), inner).transform)
    share_again = scalp_inside(image, again.transform)
    return (again, share_again) if share_again < share else (found, share)


def align_brain(image: SimpleITK.Image, transform: SimpleITK.AffineTransform) -> SimpleITK.AffineTransform:
    """Align the brain of a head alone, from where the head was aligned: its skull draws the template's rim outwards.

    ``transform`` maps points of the template to points of the scan (LPS, mm).
    """
    brain = SimpleITK.Cast(brain_mask(image, transform), SimpleITK.sitkFloat32)
    inside = SimpleITK.Resample(brain, image, transform.GetInverse(), SimpleITK.sitkLinear) >= 0.5
    darkest = float(SimpleITK.GetArrayViewFromImage(image).min())
    return refine(SimpleITK.Mask(image, inside, darkest), inside, transform).transform


def scalp_inside(image: SimpleITK.Image, transform: SimpleITK.Transform) -> float:
    """On which share of its upper surface the template's brain reaches the scalp instead of ending at the skull.

    There a dark rim with brightness on both of its sides lies within the template's brain, and none lies beyond it.
    Near 0 of a head that is aligned well, and of a skull-stripped scan.

    Args:
        image: a scan, float32.
        transform: maps points of the template to points of the scan (LPS, mm).
    """
    head = _on_template(image, transform)
    darkest, level = _brightness(head)
    if level <= 0:
        return 0.0
    points, normals = _surface()
    places = points[..., None] + normals[..., None] * STEPS / SPACING
    profiles = ndimage.map_coordinates(head, places, order=1, mode="nearest")
    profiles = np.minimum((profiles - darkest) / level, 1)
    inside, beyond = np.zeros(len(profiles), bool), np.zeros(len(profiles), bool)
    for place in INSIDE:
        around = np.minimum(_part(profiles, place + 1, place + 10).max(1), _median(profiles, place - 8, place - 3))
        inside |= around - _part(profiles, place, place)[:, 0] > DEPTH_INSIDE
    for place in BEYOND:
        outer = _part(profiles, place + 2, place + 10).max(1)
        beyond |= outer - _part(profiles, place, place)[:, 0] > DEPTH_BEYOND
    return float((inside & ~beyond).mean())


def brain_mask(image: SimpleITK.Image, transform: SimpleITK.Transform) -> SimpleITK.Image:
    """The brain of a head that is aligned to the template: uint8 on voxels of 2 mm over the template's field of view.

    A watershed between what is brain for certain and what lies 7 mm or more outside of the template's brain ends in
    the darkest rim between both, the skull. What is dark at the edge of that is taken away, thin bridges are cut, and
    sulci are filled.

    Args:
        image: a scan with its skull, float32.
        transform: maps points of the template to points of the scan (LPS, mm).
    """
    distance, grid = _distance(), _grid()
    head, core = _on_template(image, transform), _distance() < CORE
    darkest, level = _brightness(head)
    head = np.clip((head - darkest) / max(level, 1e-6), 0, 1)
    relief = SimpleITK.GetImageFromArray((1000 * (1 - ndimage.gaussian_filter(head, 1 / SPACING))).astype(np.uint16))
    marked = SimpleITK.GetImageFromArray(np.where(core, 1, np.where(distance > OUTSIDE, 2, 0)).astype(np.uint8))
    basins = SimpleITK.MorphologicalWatershedFromMarkers(relief, marked, markWatershedLine=False)
    basin = SimpleITK.GetArrayFromImage(basins) == 1
    parts, _ = ndimage.label(_eroded(basin & (head > DARK) | core, OPENING))
    brain = parts == np.bincount(parts[core & (parts > 0)]).argmax()
    brain = ~_eroded(~brain, OPENING) & basin
    brain |= _eroded(~_eroded(~brain, CLOSING), CLOSING)
    return like(ndimage.binary_fill_holes(brain).astype(np.uint8), grid)


def _on_template(image: SimpleITK.Image, transform: SimpleITK.Transform) -> np.ndarray:
    """A scan on voxels of 2 mm over the template's field of view, ``[z, y, x]``, 0 outside of its own."""
    return SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(smooth_for(image, SPACING), _grid(), transform, SimpleITK.sitkLinear, 0.0)
    )


def _brightness(head: np.ndarray) -> tuple[float, float]:
    """The intensity of air, and how much brighter the brain is: most of it, so that dark tissue does not count."""
    darkest = float(np.percentile(head, 1))
    return darkest, float(np.median(head[_distance() < DEEP])) - darkest


def _eroded(mask: np.ndarray, radius: float) -> np.ndarray:
    """What of a mask lies more than ``radius`` mm within it; its complement's is the mask grown by as much."""
    return ndimage.distance_transform_edt(mask) * SPACING > radius


def _part(profiles: np.ndarray, first: int, last: int) -> np.ndarray:
    """What profiles are from one distance to another, ``[normals, steps]``."""
    return profiles[:, first - int(STEPS[0]) : last - int(STEPS[0]) + 1]


def _median(profiles: np.ndarray, first: int, last: int) -> np.ndarray:
    return np.median(_part(profiles, first, last), axis=1)


@lru_cache(maxsize=1)
def _grid() -> SimpleITK.Image:
    """Voxels of 2 mm over the template's field of view."""
    step = int(SPACING)
    return template()[::step, ::step, ::step]


@lru_cache(maxsize=1)
def _full_distance() -> SimpleITK.Image:
    """How far each of the template's voxels lies outside of its brain, mm; below 0 inside."""
    return SimpleITK.SignedMaurerDistanceMap(template_brain(), squaredDistance=False, useImageSpacing=True)


@lru_cache(maxsize=1)
def _distance() -> np.ndarray:
    """The same on voxels of 2 mm, ``[z, y, x]``."""
    step = int(SPACING)
    return SimpleITK.GetArrayFromImage(_full_distance()[::step, ::step, ::step])


@lru_cache(maxsize=1)
def _surface() -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the upper surface of the template's brain and the normals there, outwards: ``[3, N]`` each, z y x."""
    distance = _distance()
    height = np.arange(len(distance)) * SPACING + template().GetOrigin()[2]
    points = np.argwhere((np.abs(distance) < SPACING / 2) & (height > ABOVE)[:, None, None])[::NORMALS].T
    slope = np.stack(np.gradient(ndimage.gaussian_filter(distance, 4 / SPACING)))[(slice(None), *points)]
    return points.astype(float), slope / np.linalg.norm(slope, axis=0)
