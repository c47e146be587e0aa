"""Where results go and how they are written: beside their scan's name, on its own grid, whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import FolderLayoutBase, MetaTensor, NibabelWriter
from monai.transforms import MapTransform, SaveImage, SpatialResample, Transform
from monai.utils import ImageMetaKey, TraceKeys, ensure_tuple
from scripts.data.geometry import fill_outside
from scripts.data.transforms import OUTSIDE, RobustScaled, ScanError, per_channel, unscaled
from scripts.inference.inferers import latents_up_to
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.utils import figures
from scripts.utils.files import write_text, write_whole
from scripts.utils.formats import without_image_suffix
from scripts.utils.names import image_path, item_path
from scripts.utils.nifti import save_nifti

__all__ = [
    "FitBackd",
    "IntensityUnitsd",
    "LoadLatentsd",
    "SaveFigured",
    "SaveLatentsd",
    "SaveRowd",
    "SaveScansd",
    "ScanLayout",
    "WholeNibabelWriter",
    "common_root",
    "read_row",
]

logger = logging.getLogger(__name__)

LATENTS_SUFFIXES = ("_latents.npz", ".npz")


def common_root(scans: Sequence[Mapping[str, Any]], dataset_dir: str | os.PathLike) -> str:
    """The folder that names of results are relative to: ``dataset_dir``, or for a datalist what its scans share."""
    root = Path(dataset_dir).expanduser()
    if root.is_dir():
        return str(root.absolute())
    return os.path.commonpath([Path(item_path(scan)).absolute().parent for scan in scans])


def scan_stem(scan: str | os.PathLike) -> str:
    """The file name of a scan, or of its latents, without the suffix."""
    name = Path(scan).name
    for suffix in LATENTS_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return without_image_suffix(name)


class ScanLayout(FolderLayoutBase):
    """The name of a result: that of its scan, relative to a root, with a postfix, under another folder.

    Args:
        root: the folder that the scans are under.
        output_dir: the folder for results.
        postfix: ``recon`` makes ``sub-01/sub-01_T1w_recon.nii.gz`` of ``sub-01/sub-01_T1w.nii.gz``.
        extension: of the result, with its dot.
    """

    def __init__(
        self, root: str | os.PathLike, output_dir: str | os.PathLike, postfix: str, extension: str = ".nii.gz"
    ) -> None:
        self.root, self.output_dir = Path(root).expanduser().absolute(), Path(output_dir).expanduser()
        self.postfix, self.extension = postfix, extension

    def filename(self, subject: str | os.PathLike = "subject", idx: Any = None, **kwargs: Any) -> str:
        """The path of a scan's result; its folder is made.

        Raises:
            ScanError: when the scan is not under the root, so that its result would not be under ``output_dir``.
        """
        path = self.path(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def path(self, scan: str | os.PathLike) -> Path:
        """The same without making anything."""
        relative = Path(self.relative(scan))
        return self.output_dir / relative.parent / f"{scan_stem(relative)}_{self.postfix}{self.extension}"

    def relative(self, scan: str | os.PathLike) -> str:
        """The scan's posix path, relative to the root."""
        path = Path(os.path.normpath(Path(scan).expanduser().absolute()))
        if not path.is_relative_to(self.root):
            raise ScanError(f"'{scan}' is not under '{self.root}', so that its results have no place: move it there.")
        return path.relative_to(self.root).as_posix()


class WholeNibabelWriter(NibabelWriter):
    """MONAI's ``NibabelWriter``, which writes an image as it lies, in files that appear whole or not at all."""

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = False, **options: Any) -> None:
        # MONAI's asks for a resampling even to the same grid, and takes a volume without channels for a slice there
        _, affine, _ = self.get_meta_info(meta_dict)
        self.affine = np.asarray(affine)
        self.data_obj = np.asarray(self.data_obj)

    def write(self, filename: str | os.PathLike, verbose: bool = False, **kwargs: Any) -> None:
        write_whole(filename, lambda temporary: super(WholeNibabelWriter, self).write(temporary, verbose, **kwargs))


class IntensityUnitsd(MapTransform):
    """Prepare results that are no intensities for the inverse of the preprocessing, which takes all for intensities.

    ``deviation``: a standard deviation goes back to the scan's units by their scale alone, without their offset.
    ``none``: a number without units, such as a z-score, comes out as it goes in. Both are 0 where the network's grid
    does not reach.

    Args:
        keys: of the results.
        units: one word for each key.
        scan: key of the preprocessed scan, whose trace is what will be inverted.
    """

    def __init__(self, keys: KeysCollection, units: Sequence[str] | str, scan: str = "image") -> None:
        super().__init__(keys)
        self.units, self.scan = ensure_tuple(units), scan
        if set(self.units) - {"deviation", "none"} or len(self.units) != len(self.keys):
            raise ValueError(f"units are {list(self.units)}: give 'deviation' or 'none' for each of {list(self.keys)}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        info = scaling_of(d[self.scan])
        gain, offset = (per_channel(info[name], d[self.scan]) for name in ("gain", "offset"))
        for key, units in self.key_iterator(d, self.units):
            result = (d[key] if units == "deviation" else d[key] * gain) - offset * gain + info["b_min"]
            trace, zeros = result.applied_operations, {OUTSIDE: [0.0] * len(result)}
            result.applied_operations = [step | zeros if OUTSIDE in step else step for step in trace]
            d[key] = result
        return d


def scaling_of(image: MetaTensor) -> dict[str, Any]:
    """What :class:`scripts.data.transforms.RobustScaled` did to a scan: ``gain``, ``offset`` and ``b_min``."""
    (info,) = (
        operation[TraceKeys.EXTRA_INFO]
        for operation in image.applied_operations
        if operation[TraceKeys.CLASS_NAME] == RobustScaled.__name__
    )
    return info


def background_of(image: MetaTensor) -> list[float]:
    """What each channel of a scan has around it, in its own units."""
    (background,) = (operation[OUTSIDE] for operation in image.applied_operations if OUTSIDE in operation)
    return background


class FitBackd(MapTransform):
    """Take what was decoded to the grid and the units of the scan that its latents came from.

    Needs what :class:`LoadLatentsd` reads. Input: ``[channels, *spatial]``; output: on the scan's grid.

    Args:
        keys: of the decoded images.
        deviation: keys among them that hold standard deviations.
    """

    def __init__(self, keys: KeysCollection, deviation: KeysCollection = (), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.deviation = ensure_tuple(deviation)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            values = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            values = values / per_channel(d["gain"], values) if key in self.deviation else unscaled(values, d)
            image = MetaTensor(values, affine=torch.as_tensor(d["affine"]))
            fitted = self.resample(
                image, dst_affine=torch.as_tensor(d["scan_affine"]), spatial_size=d["scan_shape"].tolist()
            )
            fitted.meta[ImageMetaKey.FILENAME_OR_OBJ] = d["path"]
            outside = [0.0] * len(fitted) if key in self.deviation else d.get("background", d["offset"])
            d[key] = fill_outside(fitted, d["affine"], values.shape[1:], outside)
        return d


class SaveLatentsd(Transform):
    """Write a scan's latents as ``.npz``: arrays ``z00``, ``mean00``, ``std00``, ``z01``, ..., ``[channels, *grid]``.

    Top first, and ``coordinates`` where there is a population prior; with them what decoding to the scan's grid and
    units needs: ``affine``, ``scan_affine``, ``scan_shape``, ``background``, ``gain``, ``offset`` and ``b_min``.

    Args:
        layout: says where.
        key: of the preprocessed scan, whose trace tells of its grid and units.
    """

    def __init__(self, layout: ScanLayout, key: str = "image") -> None:
        self.layout, self.key = layout, key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        image = data[self.key]
        names = ("z", "mean", "std", "coordinates")
        latents = {k: np.asarray(v) for k, v in data.items() if str(k).rstrip("0123456789") in names}
        content = {
            "affine": np.asarray(image.affine),
            "scan_affine": np.asarray(image.meta["geometry"]["affine"]),
            "scan_shape": np.asarray(image.meta["geometry"]["shape"]),
            "background": np.asarray(background_of(image)),
            **{name: np.asarray(value) for name, value in scaling_of(image).items()},
        }
        path = self.layout.filename(image_path(image))
        write_whole(path, lambda temporary: np.savez(temporary, **latents, **content))
        return data


class LoadLatentsd(MapTransform):
    """Read what :class:`SaveLatentsd` wrote; latents may be missing from some place on.

    Args:
        grids: of each latent, ``(channels, *grid)``, top first.

    Raises:
        ScanError: when the file is damaged, not such a file, or of another network.
    """

    def __init__(self, keys: KeysCollection, grids: Sequence[Sequence[int]], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.grids = [tuple(grid) for grid in grids]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = d[key]
            try:
                with np.load(path, allow_pickle=False) as file:
                    content = {name: file[name] for name in file.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ScanError(f"'{path}' cannot be read as latents ({error}): encode the scan again.") from error
            lacking = {"affine", "scan_affine", "scan_shape", "gain", "offset", "b_min"} - set(content)
            if lacking:
                raise ScanError(f"'{path}' lacks {', '.join(sorted(lacking))}: encode the scan again.")
            count = sum(name[0] == "z" and name[1:].isdigit() for name in content)
            missing = [f"z{i:02d}" for i in range(count) if f"z{i:02d}" not in content]
            if missing:
                raise ScanError(
                    f"'{path}' lacks {missing[0]} but has later latents: leave latents out from the end on."
                )
            shapes = [content[f"z{i:02d}"].shape for i in range(count)]
            wrong = next((i for i in range(count) if i >= len(self.grids) or shapes[i] != self.grids[i]), None)
            if wrong is not None:
                expected = list(self.grids[wrong]) if wrong < len(self.grids) else "no such latent"
                raise ScanError(
                    f"'{path}': z{wrong:02d} has shape {list(shapes[wrong])}, but the network has {expected}: decode "
                    "with the weights and the network_def that it was encoded with."
                )
            d |= content | {"path": str(path)}
            d["latents"] = [torch.as_tensor(content[f"z{i:02d}"]).float() for i in range(count)]
        return d


class SaveScansd(MapTransform):
    """Write images as NIfTI with MONAI's ``SaveImage``, each named after its scan and its key.

    Args:
        keys: of the images, ``[channels, *spatial]``.
        layout: makes the layout of a key's files.
    """

    def __init__(self, keys: KeysCollection, layout: Callable[[str], ScanLayout]) -> None:
        super().__init__(keys)
        self.savers = {
            key: SaveImage(folder_layout=layout(key), writer=WholeNibabelWriter, resample=False, print_log=False)
            for key in self.keys
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            self.savers[key](data[key])
        return data


class SaveFigured(Transform):
    """Draw a scan's result as PNG, on the network's grid.

    Args:
        layout: says where.
        draw: ``draw(path, data, value_range)``, such as the functions of this module.
        value_range: what black and white stand for.
        enabled: False draws nothing.
    """

    def __init__(
        self, layout: ScanLayout, draw: Callable[..., object], value_range: Sequence[float], enabled: bool = True
    ) -> None:
        self.layout, self.draw, self.value_range, self.enabled = layout, draw, tuple(value_range), enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        if self.enabled:
            self.draw(self.layout.filename(image_path(data["image"])), data, self.value_range)
        return data


def draw_reconstruction(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan beside its reconstruction, the predicted standard deviation and the difference."""
    name = Path(image_path(data["image"])).name
    figures.reconstructions(path, [data["image"]], [data["recon"]], [data["scale"]], [name], value_range)


def draw_levels(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan's reconstructions from the coarsest level alone to all of them."""
    keys = [key for key in map(str, data) if key.startswith("recon_to")]  # in the order in which they were made
    dims = data["image"].ndim - 1
    grids = [key.removeprefix("recon_to").split("x") for key in keys]
    labels = [f"to {grid_name(grid if len(grid) > 1 else grid * dims)}" for grid in grids]
    figures.progressive(path, data["image"], [data[key] for key in keys], labels, value_range)


def draw_anomaly(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan beside its restoration and its anomaly map."""
    name = Path(image_path(data["image"])).name
    title = f"{name}, {float(data['bits_per_dim']):.3f} bits per dim, score {float(data['anomaly_score']):.1f}"
    figures.anomaly(path, data["image"], data["restored"], data["anomaly"], title, value_range)


class SaveRowd(Transform):
    """Write the numbers of a scan as JSON; :func:`scripts.inference.tables.row_table` puts those of all together.

    Args:
        layout: says where.
    """

    def __init__(self, layout: ScanLayout) -> None:
        self.layout = layout

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        row = {k: float(f"{v.item():.7g}") for k, v in data.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
        path = self.layout.filename(image_path(data["image"]))
        write_text(path, json.dumps(row) + "\n")
        return data


class SaveSampled(Transform):
    """Write a scan that was drawn from the model as NIfTI, its intensities from 0 (background) to 1.

    Args:
        layout: says where.
        affine: of the network's grid.
        value_range: of what the network draws.
    """

    def __init__(self, layout: ScanLayout, affine: torch.Tensor, value_range: Sequence[float]) -> None:
        self.layout, self.affine, self.value_range = layout, affine, value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        save_nifti(self.layout.filename(data["image"]), from_zero_to_one(data["sample"], self.value_range), self.affine)
        return data


def from_zero_to_one(scan: torch.Tensor, value_range: Sequence[float]) -> torch.Tensor:
    """What the network predicts as intensities from 0 (background) to 1."""
    low, high = value_range
    return ((scan - low) / (high - low)).clamp(0, 1)


def sample_sheet(path: str | os.PathLike, layout: ScanLayout, scans: Sequence[str], most: int = 64) -> None:
    """Show the first samples on one sheet."""
    files = [file for file in map(layout.path, scans[:most]) if file.exists()]
    arrays = [np.atleast_3d(nib.load(file).get_fdata(dtype=np.float32)) for file in files]
    images = [np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None] for array in arrays]
    figures.batch(path, images, [file.name.split(".")[0] for file in files], value_range=(0, 1))


def stack_latents(items: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The latents of some items, each ``[batch, latent_channels, *grid]``; all items must have as many."""
    return [torch.stack(latents) for latents in zip(*(item["latents"] for item in items), strict=True)]


def read_row(path: Path) -> dict[str, float]:
    """The numbers of a scan, as :class:`SaveRowd` wrote them."""
    return json.loads(path.read_text(encoding="utf-8"))


def report_latents(network: VDVAE) -> None:
    """Log how many numbers the latents of a scan are, level by level, beside its voxels."""
    voxels = network.in_channels * math.prod(network.spatial_shape)
    for level in sorted(set(network.latent_levels), reverse=True):
        count = sum(map(math.prod, network.latent_grids()[: latents_up_to(network, level)]))
        logger.info(
            "Latents of grids up to %s: %d numbers per scan, compression %.3g : 1 (of %d voxels).",
            grid_name(network.grids()[level]),
            count,
            voxels / count,
            voxels,
        )
