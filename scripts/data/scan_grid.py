"""Where a cohort's scans lie in the world, and so whether all are fitted to one box of it or each to its file's own.

Scans that were aligned to a template lie in the same place of the world, whatever box their files cut out of it. They
are fitted to one box, so that a file with a few more empty slices gives the same voxels. Scans that were not aligned
lie in their file's box as whoever acquired them put it; each is fitted to its own.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import delayed
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import MapTransform, SpatialResample
from monai.utils import ImageMetaKey, ensure_tuple
from scipy.stats import median_abs_deviation
from scripts.data.geometry import differences, fill_outside, grid_box, world_axes
from scripts.data.transforms import FIT, SCALING, ScanError, per_channel, unscaled
from scripts.utils.distributed import from_rank_zero
from scripts.utils.errors import InputError
from scripts.utils.formats import SPACE_CODE
from scripts.utils.names import CHANNEL_FILES, image_files
from scripts.utils.parallel import choose_workers, run_parallel
from torch import Tensor

logger = logging.getLogger(__name__)
CHOICES = ("auto", "world", "centred")
SAMPLE = 64  # scans of a cohort that are read to decide
MIN_SCANS = 10  # of fewer the spread says nothing
MOST = 0.9  # the share of a cohort that counts for all of it
# Scans are aligned when the centres of their foregrounds spread by at most this along each axis (mm, a standard
# deviation, estimated robustly). Brains of different size and shape, aligned to a template, spread by 1 or 2; heads in
# a scanner by 5 to 20.
ALIGNED = 5.0
OBLIQUE = 3.0  # degrees by which the axes of a scan that was resampled to a template may differ from the world's
TEMPLATE_SPACES = (3, 4)  # sform codes of NIfTI: Talairach and MNI152
FAR = 3.0  # standard deviations, ALIGNED at least, between a scan's foreground and the cohort's
KINDS = ("intensity", "deviation", "number", "label")


class ScanGrid(NamedTuple):
    """How a cohort's scans are fitted to the network's grid, and where they lie.

    Attributes:
        box: centre and size of the box of the world that all are fitted to; None: each is fitted to its own.
        foreground: where their foregrounds' centres lie, median and standard deviation; None: not known.
        field_of_view: that of most of them; None: they have several, or it is not known.

    All in mm along right, anterior, superior.
    """

    box: list[list[float]] | None = None
    foreground: list[list[float]] | None = None
    field_of_view: list[float] | None = None

    def as_tensor(self) -> torch.Tensor:
        """As weights keep it, float64 ``[5, 3]``: box, foreground and field of view, rows of zeros for None."""
        rows = [*(self.box or [[], []]), *(self.foreground or [[], []]), self.field_of_view or []]
        return torch.tensor([[*row, 0.0, 0.0, 0.0][:3] for row in rows], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> ScanGrid:
        """The inverse of :meth:`as_tensor`; 2D scans get a third coordinate of 0, which is nowhere used."""
        box, foreground, view = values[:2], values[2:4], values[4]
        return cls(*(part.tolist() if part.any() else None for part in (box, foreground, view)))


class _Scan(NamedTuple):
    """What is known of one scan of the sample."""

    box: list[list[float]]
    geometry: dict[str, Any]
    sform_code: int


def choose_grid(
    scan_grid: str,
    items: Sequence[Mapping[str, Any]],
    transforms: Sequence[Callable],
    stored: ScanGrid | None = None,
    workers: int = 1,
) -> ScanGrid:
    """Decide for a cohort how its scans are fitted to the network's grid, on rank 0 for all processes, and log it.

    Args:
        scan_grid: ``world``: to one box of the world. ``centred``: each to its own. ``auto``: to one box if the scans
            are aligned, see :func:`find_alignment`.
        items: the scans to train on, ``[{"image": path}, ...]``; some of them are read.
        transforms: read a scan, check it and turn it to RAS. Scans that they refuse do not count.
        stored: of the weights that training goes on from, which were trained so, and keep it. None: it starts anew.
        workers: processes that read.

    Raises:
        ValueError: ``scan_grid`` is none of the three.
    """
    return ScanGrid(*from_rank_zero(_choose, scan_grid, items, transforms, stored, workers))


def _choose(
    scan_grid: str,
    items: Sequence[Mapping[str, Any]],
    transforms: Sequence[Callable],
    stored: ScanGrid | None,
    workers: int,
) -> ScanGrid:
    if scan_grid not in CHOICES:
        raise InputError(f"scan_grid is '{scan_grid}': it must be one of {', '.join(CHOICES)}.")
    if stored is not None:
        found = "centred" if stored.box is None else "world"
        if scan_grid not in ("auto", found):
            logger.warning(
                "scan_grid is '%s', but the weights to go on from were trained with '%s', which is kept: train anew to "
                "change it.",
                scan_grid,
                found,
            )
        logger.info("%s, as those of the weights to go on from.", _sentence(stored.box))
        return stored
    sample = random.Random(0).sample(list(items), min(SAMPLE, len(items)))
    jobs = [delayed(_read)(item["image"], transforms) for item in sample]
    read = run_parallel(jobs, choose_workers(len(jobs), workers), "looking where the scans lie")
    found = list(read)
    scans = [scan for scan in found if isinstance(scan, _Scan)]
    if found and not scans:  # before a whole cohort is read in vain
        raise ScanError(f"None of {len(found)} scan(s) can be used. The first: {found[0]}")
    geometries = [scan.geometry for scan in scans]
    centres = [geometry["foreground"]["centre"] for geometry in geometries if geometry["foreground"]]
    oblique = [geometry["oblique"] for geometry in geometries]
    aligned, reason = find_alignment(centres, oblique, [scan.sform_code for scan in scans])
    world = scan_grid == "world" or (scan_grid == "auto" and aligned)
    box = _common_box(scans) if world and scans else None
    foreground = [np.median(centres, axis=0).tolist(), _spread(centres).tolist()] if centres else None
    logger.info("%s. %s (scan_grid %s).", _sentence(box), reason, scan_grid)
    return ScanGrid(box, foreground, usual_field_of_view(geometries))


def _sentence(box: Sequence[Sequence[float]] | None) -> str:
    if box is None:
        return "Each scan is fitted to the box of its own file"
    centre, size = (", ".join(f"{value:.4g}" for value in values) for values in box)
    return f"All scans are fitted to one box of the world, of ({size}) mm about ({centre})"


def _read(image: str | Sequence[str], transforms: Sequence[Callable]) -> _Scan | str:
    data: Any = {"image": image}
    try:
        for transform in transforms:
            data = transform(data)
    except ScanError as error:
        return str(error)
    scan: MetaTensor = data["image"]
    rank = scan.ndim - 1
    affine = to_affine_nd(rank, scan.affine.numpy().astype(float))
    centre, extent = grid_box(affine, scan.shape[1:])
    size = np.abs(world_axes(affine)) @ extent
    return _Scan([centre.tolist(), size.tolist()], scan.meta["geometry"], int(scan.meta.get("sform_code", 0)))


def find_alignment(
    centres: Sequence[Sequence[float]], oblique: Sequence[float], sform_codes: Sequence[int]
) -> tuple[bool, str]:
    """Whether scans are aligned: their foregrounds lie in the same place of the world, and their axes are the world's.

    Where there are too few of them to tell, their headers are believed if all say that they lie in a template's space.

    Args:
        centres: of their foregrounds in the world, in mm.
        oblique: the largest angle in degrees between an axis of each and the world's.
        sform_codes: of their NIfTI headers; 0 for other formats.

    Returns:
        The answer, and a sentence on why, without its full stop.
    """
    if len(centres) < MIN_SCANS:
        if sform_codes and set(sform_codes) <= set(TEMPLATE_SPACES):
            return True, f"The headers of the {len(sform_codes)} scan(s) say that they are in a template's space"
        return False, f"{len(centres)} scan(s) are too few to tell whether they are aligned"
    spread = _spread(centres)
    upright = np.mean(np.array(oblique) <= OBLIQUE)
    reason = (
        f"The centres of their foregrounds spread by {', '.join(f'{value:.1f}' for value in spread)} mm along right, "
        f"anterior, superior (aligned: up to {ALIGNED:g}), and the axes of {upright:.0%} are the world's"
    )
    return bool((spread <= ALIGNED).all() and upright >= MOST), reason


def _spread(places: Sequence[Sequence[float]]) -> np.ndarray:
    return median_abs_deviation(places, axis=0, scale="normal").round(4)


def _common_box(scans: Sequence[_Scan]) -> list[list[float]]:
    """The median of the scans' boxes, grown to where it would cut the foreground of more than a few of them."""
    centre, size = np.median([scan.box for scan in scans], axis=0)
    lower, upper = centre - size / 2, centre + size / 2
    places = [scan.geometry["foreground"] for scan in scans if scan.geometry["foreground"]]
    if places:
        low = np.minimum(lower, np.quantile([place["lower"] for place in places], 1 - MOST, axis=0, method="lower"))
        high = np.maximum(upper, np.quantile([place["upper"] for place in places], MOST, axis=0, method="higher"))
        grown = (low < lower) | (high > upper)  # elsewhere, and where all boxes are equal, to the last bit
        centre, size = np.where(grown, (low + high) / 2, centre), np.where(grown, high - low, size)
    return [centre.tolist(), size.tolist()]


def usual_field_of_view(geometries: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The field of view in mm that nearly all scans of a cohort have; None where they have several."""
    if not geometries:
        return None
    usual = np.median([geometry["field_of_view"] for geometry in geometries], axis=0).tolist()
    like = [not differences(geometry, field_of_view=usual) for geometry in geometries]
    return usual if np.mean(like) >= MOST else None


def place_differences(
    grid: ScanGrid | None, geometry: Mapping[str, Any], affine: np.ndarray, shape: Sequence[int]
) -> list[str]:
    """Say where a scan that was fitted to a box of the world does not lie as the training scans do.

    Args:
        grid: of the training scans.
        geometry: of the scan, with ``foreground``.
        affine, shape: of the network's grid that it was fitted to.

    Returns:
        Half sentences, for people.
    """
    place = geometry.get("foreground")
    if grid is None or grid.box is None or place is None:
        return []
    rank, found = len(shape), []
    if grid.foreground is not None:
        centre, spread = (np.array(values[:rank]) for values in grid.foreground)
        apart = np.array(place["centre"]) - centre
        if (np.abs(apart) > FAR * np.maximum(spread, ALIGNED)).any():
            found.append(
                f"its foreground lies {np.linalg.norm(apart):.0f} mm from where that of the training scans lies: align "
                "it as they were (python -m scripts.prepare)"
            )
    affine = to_affine_nd(rank, np.asarray(affine, float))
    centre, extent = grid_box(affine, shape)
    half = np.abs(world_axes(affine)) @ extent / 2
    beyond = max((centre - half - place["lower"]).max(), (place["upper"] - centre - half).max())
    if beyond > affine_to_spacing(affine, r=rank).max():
        found.append(f"its foreground reaches {beyond:.0f} mm beyond the box that the network sees, and is cut there")
    return found


def field_of_view_differences(grid: ScanGrid | None, geometry: Mapping[str, Any]) -> list[str]:
    """Half sentences on a scan that, fitted to its own box, has another one than the training scans had."""
    if grid is None or grid.box is not None or grid.field_of_view is None:
        return []
    expected = grid.field_of_view[: len(geometry["field_of_view"])]
    return [
        sentence.replace("are expected", "was usual in training")
        + ", which moves or shrinks its brain on the network's grid: crop or pad it as the training scans were"
        for sentence in differences(dict(geometry), field_of_view=expected)
    ]


class Fit(NamedTuple):
    """How a scan was brought to the network's grid and range.

    Attributes:
        affine: of the network's grid, ``[4, 4]``.
        scan_affine, scan_shape: of the scan's own grid.
        background: what each channel has around the scan, in the scan's units.
        gain, offset: of each channel, and ``b_min``: ``(scan - offset) * gain + b_min`` is what the network sees.
        files: of the scan.
        space_code: which space its world is, NIfTI's ``sform_code``; None: not known.
    """

    affine: np.ndarray
    scan_affine: np.ndarray
    scan_shape: Sequence[int]
    background: Sequence[float]
    gain: Sequence[float]
    offset: Sequence[float]
    b_min: float
    files: Sequence[str] = ()
    space_code: int | None = None

    @classmethod
    def of(cls, scan: MetaTensor) -> Fit:
        """That of a preprocessed scan, from its metadata."""
        fit, scaling = scan.meta[FIT], scan.meta[SCALING]
        # the file's own grid; without CheckScand, which notes it, that from which the scan was fitted
        geometry = scan.meta.get("geometry") or fit
        grids = np.asarray(scan.affine), np.asarray(geometry["affine"]), tuple(geometry["shape"])
        numbers = scaling["gain"], scaling["offset"], float(scaling["b_min"])
        code = int(scan.meta.get(SPACE_CODE, 0)) or int(scan.meta.get("qform_code", 0)) or None
        return cls(*grids, fit["background"], *numbers, image_files(scan), code)

    def arrays(self) -> dict[str, np.ndarray]:
        """All but the files, as arrays by name."""
        return {
            name: np.asarray(value) for name, value in self._asdict().items() if name not in ("files", "space_code")
        }

    def scaled(self, values: Tensor) -> Tensor:
        """Intensities in the scan's units, on any grid, as the network sees them, but not clipped."""
        return (values - per_channel(self.offset, values)) * per_channel(self.gain, values) + self.b_min


def to_scan(result: Tensor, fit: Fit, as_: str) -> MetaTensor:
    """Bring a result from the network's grid to the scan's own, with the scan's affine and file names.

    Args:
        result: ``[channels, *network's grid]``.
        fit: of the scan.
        as_: ``"intensity"``: from the network's range to the scan's units, with background where the network's grid
            does not reach; ``"deviation"``: a difference or a standard deviation of intensities, to the scan's units;
            ``"number"``: without units, such as a z-score; ``"label"``: likewise, but the nearest voxel's value. All
            but the first are 0 where the network's grid does not reach.

    Returns:
        ``[channels, *scan's grid]``, float32.

    Raises:
        InputError: ``as_`` is none of these.
    """
    if as_ not in KINDS:
        raise InputError(f"as_ is {as_!r}: choose one of {', '.join(map(repr, KINDS))}.")
    values = torch.as_tensor(result).as_subclass(Tensor).float()
    if as_ == "intensity":
        values = unscaled(values, fit._asdict())
    elif as_ == "deviation":
        values = values / per_channel(fit.gain, values)
    # at the edge of the network's grid, within half a voxel, nothing must fade to zero
    resample = SpatialResample(mode="nearest" if as_ == "label" else "bilinear", padding_mode="border")
    image = resample(
        MetaTensor(values, affine=torch.as_tensor(fit.affine)),
        dst_affine=torch.as_tensor(fit.scan_affine),
        spatial_size=list(map(int, fit.scan_shape)),
    )
    image.meta |= {ImageMetaKey.FILENAME_OR_OBJ: fit.files[0] if fit.files else "", CHANNEL_FILES: list(fit.files)}
    image.meta[SPACE_CODE] = fit.space_code
    outside = fit.background if as_ == "intensity" else [0.0] * len(image)
    return fill_outside(image, fit.affine, values.shape[1:], outside)


class ToScand(MapTransform):
    """Dictionary form of :func:`to_scan`, for the results of a preprocessed scan.

    Args:
        keys: of the results.
        as_: one word for each key, or one for all.
        scan: key of the preprocessed scan, or of its :class:`Fit`.
    """

    def __init__(self, keys: KeysCollection, as_: Sequence[str] | str, scan: str = "image") -> None:
        super().__init__(keys)
        words = ensure_tuple(as_)
        self.as_, self.scan = words * len(self.keys) if len(words) == 1 else words, scan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        fit = d[self.scan] if isinstance(d[self.scan], Fit) else Fit.of(d[self.scan])
        for key, as_ in self.key_iterator(d, self.as_):
            d[key] = to_scan(d[key], fit, as_)
        return d
