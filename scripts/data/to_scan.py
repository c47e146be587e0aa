"""From the network's grid back to a scan's own: every result goes this way, in its own units."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from monai.utils import ImageMetaKey, TraceKeys, ensure_tuple
from scripts.data.geometry import fill_outside
from scripts.data.transforms import OUTSIDE, RobustScaled, per_channel, unscaled
from scripts.utils.errors import InputError
from scripts.utils.formats import SPACE_CODE
from scripts.utils.names import CHANNEL_FILES, image_files
from torch import Tensor

__all__ = ["Fit", "ToScand", "to_scan"]

KINDS = ("intensity", "deviation", "number", "label")


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
        """That of a preprocessed scan, from its metadata and the trace of its transforms."""
        steps = scan.applied_operations
        (fit,) = (step for step in steps if OUTSIDE in step)
        (scaling,) = (
            step[TraceKeys.EXTRA_INFO] for step in steps if step[TraceKeys.CLASS_NAME] == RobustScaled.__name__
        )
        # the file's own grid; without CheckScand, which notes it, that from which the scan was fitted
        geometry = scan.meta.get("geometry") or {
            "affine": fit[TraceKeys.EXTRA_INFO]["src_affine"],
            "shape": fit[TraceKeys.ORIG_SIZE],
        }
        grids = np.asarray(scan.affine), np.asarray(geometry["affine"]), tuple(geometry["shape"])
        numbers = scaling["gain"], scaling["offset"], float(scaling["b_min"])
        code = int(scan.meta.get(SPACE_CODE, 0)) or int(scan.meta.get("qform_code", 0)) or None
        return cls(*grids, fit[OUTSIDE], *numbers, image_files(scan), code)

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
