"""Where results go: beside their scan's name or by BIDS; one file per channel, or one for all channels."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import FolderLayoutBase
from monai.utils import ensure_tuple
from scripts.data.transforms import ScanError
from scripts.inference.bids import DatasetDescription, derivative_path
from scripts.utils.errors import InputError
from scripts.utils.formats import save_nifti, without_image_suffix
from scripts.utils.names import item_files
from torch import Tensor

__all__ = ["SampleLayout", "ScanLayout", "scan_stem"]

VOLUME = ".nii.gz"
LONGEST = 255  # bytes of a file's name, on most file systems


def scan_stem(scan: str | os.PathLike) -> str:
    """The file name of a scan, or of the scan that latents are of, without the suffix."""
    name = Path(scan).name
    if name.endswith(".npz"):
        return name.removesuffix(".npz").removesuffix("_latents").replace("_desc-latents_", "_")
    return without_image_suffix(name)


class ScanLayout(FolderLayoutBase):
    """The name of a result: that of its scan, relative to a root, with a postfix, under another folder.

    Args:
        root: the folder that the scans are under.
        output_dir: the folder for results.
        postfix: ``recon`` makes ``sub-01/sub-01_T1w_recon.nii.gz`` of ``sub-01/sub-01_T1w.nii.gz``.
        extension: of the result, with its dot.
        join_channels: a volume of a scan of several files is one file, named after the first; else one per channel,
            each named after its own. Other results are always named after the first.
        bids: name results by BIDS, see :func:`scripts.inference.bids.derivative_path`.
        description: writes a sidecar beside each volume; None: there is none.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        output_dir: str | os.PathLike,
        postfix: str,
        extension: str = VOLUME,
        join_channels: bool = False,
        bids: bool = False,
        description: DatasetDescription | None = None,
    ) -> None:
        self.description = description
        self.root, self.output_dir = Path(root).expanduser().absolute(), Path(output_dir).expanduser()
        self.postfix, self.extension = postfix, extension
        self.join_channels, self.bids = join_channels, bids

    def filename(self, subject: str | os.PathLike = "subject", idx: Any = None, **kwargs: Any) -> str:
        """The path of a scan's result; its folder is made.

        Raises:
            ScanError: when the scan is not under the root, so that its result would not be under ``output_dir``.
            ValueError: when it should be named by BIDS, and the scan is not.
        """
        path = self.path(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def save(
        self, scan: str, image: Tensor, affine: np.ndarray | Tensor, files: Sequence[str], space_code: int | None = None
    ) -> None:
        """Write a volume, and what it was made of where results are a BIDS data set.

        Args:
            scan: by which it is named.
            image, affine, space_code: see :func:`scripts.utils.formats.save_nifti`.
            files: of the scan.
        """
        path = self.filename(scan)
        if self.description is not None:
            self.description.write_sidecar(path, files)
        save_nifti(path, image, affine, space_code)

    def path(self, scan: str | os.PathLike) -> Path:
        """The path of a scan's result, without making anything."""
        relative, stem = Path(self.relative(scan)), scan_stem(scan)
        if self.bids:
            path = derivative_path(relative.parent, stem, self._postfix(scan), self.extension)
        else:
            path = relative.parent / f"{stem}_{self._postfix(scan)}{self.extension}"
        if len(os.fsencode(path.name)) > LONGEST:
            raise ScanError(f"'{scan}': its results would have a name of more than {LONGEST} bytes: rename the scan.")
        return self.output_dir / path

    def names(self, files: Sequence[str]) -> list[str]:
        """The files of a scan by which its results are named: all of them, or the first where there is one result."""
        return list(files) if self.extension == VOLUME and not self.join_channels else list(files[:1])

    def paths(self, item: Mapping[str, Any]) -> list[Path]:
        """The paths of all results of a datalist's item."""
        return [self.path(name) for name in self.names(item_files(item))]

    def relative(self, scan: str | os.PathLike) -> str:
        """The scan's posix path, relative to the root."""
        path = Path(os.path.normpath(Path(scan).expanduser().absolute()))
        if not path.is_relative_to(self.root):
            raise ScanError(f"'{scan}' is not under '{self.root}', so that its results have no place: move it there.")
        return path.relative_to(self.root).as_posix()

    def _postfix(self, scan: str | os.PathLike) -> str:
        return self.postfix


class SampleLayout(ScanLayout):
    """Names of scans that come from the model alone: ``0001_sample.nii.gz``, or ``0001_T1w_sample.nii.gz`` and so on.

    Args:
        output_dir: the folder for results; names are relative to it.
        postfix: see :class:`ScanLayout`.
        scan_pattern: of the scans; where it is a list of as many patterns as there are channels, what they differ in
            names the channels (``T1w`` and ``FLAIR`` of ``*_T1w.nii.gz`` and ``*_FLAIR.nii.gz``).
        channels: of the network.
        join_channels: see :class:`ScanLayout`.
        bids: is refused, since there is no scan to name results after.

    Raises:
        ValueError: ``bids`` is true.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        postfix: str,
        scan_pattern: str | Sequence[str],
        channels: int,
        join_channels: bool = False,
        bids: bool = False,
    ) -> None:
        if bids:
            raise InputError(
                f"bids_derivatives names results after scans, but a '{postfix}' comes from the model alone: leave "
                "--bids_derivatives out."
            )
        super().__init__(output_dir, output_dir, postfix, join_channels=join_channels)
        patterns = ensure_tuple(scan_pattern)
        self.labels = channel_labels(patterns) if len(patterns) == channels > 1 else []

    def names(self, files: Sequence[str]) -> list[str]:
        """One name for each channel, or for all, of the only name given."""
        (name,) = files
        if self.join_channels or not self.labels:
            return [name]
        path = Path(name)  # a row of coordinates has the name of its scan, which ends in the first channel's label
        stem = scan_stem(path).removesuffix(f"_{self.labels[0]}")
        return [str(path.with_name(f"{stem}_{label}")) for label in self.labels]


def channel_labels(scan_pattern: Sequence[str]) -> list[str]:
    """What patterns, one per channel, call the channels: their words that not all have; else numbers from 1."""
    words = [re.findall("[A-Za-z0-9]+", pattern) for pattern in scan_pattern]
    shared = set(words[0]).intersection(*words[1:])
    labels = ["-".join(word for word in own if word not in shared) for own in words]
    if all(labels) and len(set(labels)) == len(labels):
        return labels
    return [f"channel{number}" for number in range(1, len(labels) + 1)]
