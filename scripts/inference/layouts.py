"""Where results go: beside their scan's name or by BIDS, which wants a description of the data set as well."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple
from scripts.data.datalist import common_root
from scripts.data.transforms import ScanError
from scripts.utils.errors import ExistsError, InputError
from scripts.utils.files import absolute, expand, read_json, write_text
from scripts.utils.formats import save_nifti, without_image_suffix
from scripts.utils.names import item_files
from torch import Tensor

VOLUME = ".nii.gz"
LONGEST = 255  # bytes of a file's name, on most file systems
BIDS_VERSION = "1.10.1"
NAME = re.compile(r"sub-[A-Za-z0-9+]+(_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+")
DATATYPES = ("anat", "dwi", "fmap", "func", "perf", "pet")
ROWS = (
    "score",
    "regions",
    "covariates",
    "findings",
    "imputed",
    "deviationscore",
)  # JSON by itself, not beside a volume
# pictures, arrays, tables and settings, for which BIDS has no names
IGNORED = ("*.png", "*.html", "*.npz", "*.csv", "*.md", "/*.json", "!/dataset_description.json")


def scan_stem(scan: str | os.PathLike) -> str:
    """The file name of a scan, or of the scan that latents are of, without the suffix."""
    name = Path(scan).name
    if name.endswith(".npz"):
        return name.removesuffix(".npz").removesuffix("_latents").replace("_desc-latents_", "_")
    return without_image_suffix(name)


class ScanLayout:
    """The name of a result: that of its scan, relative to a root, with a postfix, under another folder.

    Args:
        root: the folder that the scans are under.
        output_dir: the folder for results.
        postfix: ``recon`` makes ``sub-01/sub-01_T1w_recon.nii.gz`` of ``sub-01/sub-01_T1w.nii.gz``.
        extension: of the result, with its dot.
        join_channels: a volume of a scan of several files is one file, named after the first; else one per channel,
            each named after its own. Other results are always named after the first.
        bids: name results by BIDS, see :func:`scripts.inference.layouts.derivative_path`.
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
        self.root, self.output_dir = absolute(root), Path(expand(output_dir))
        self.postfix, self.extension = postfix, extension
        self.join_channels, self.bids = join_channels, bids

    def filename(self, scan: str | os.PathLike) -> str:
        """The path of a scan's result; its folder is made."""
        path = self.path(scan)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def save(
        self, scan: str, image: Tensor, affine: np.ndarray | Tensor, files: Sequence[str], space_code: int | None = None
    ) -> None:
        """Write a volume, named by its scan, and the scan's files that it was made of where results are a BIDS data
        set.
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
        path = absolute(scan)
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


def derivative_path(folder: str | os.PathLike, stem: str, result: str, extension: str) -> Path:
    """The path of a scan's result in a derivative data set, by the scan's folder and its file name without suffix.

    ``sub-01/ses-1/anat/sub-01_ses-1_desc-recon_FLAIR.nii.gz`` for ``recon`` of ``sub-01_ses-1_FLAIR.nii.gz``, whatever
    folders that is in: the folder ``anat`` is the scan's own if that has the name of a BIDS data type. ``desc`` of the
    scan gives way, since a name has one.
    """
    if not NAME.fullmatch(stem):
        raise InputError(
            f"'{Path(folder) / stem}' has no BIDS name (sub-<label>, further entities, a suffix, as in "
            "sub-01_ses-1_FLAIR), so that its results cannot be named by BIDS: rename it, leave it out with "
            "--scan_pattern, or leave out --bids_derivatives."
        )
    *entities, suffix = stem.split("_")
    datatype = Path(folder).name if Path(folder).name in DATATYPES else "anat"
    folders = [entity for entity in entities if entity.startswith(("sub-", "ses-"))]
    kept = [entity for entity in entities if not entity.startswith("desc-")]
    label = re.sub(r"[^A-Za-z0-9]", "", result)
    return Path(*folders, datatype, "_".join([*kept, f"desc-{label}", suffix]) + extension)


class DatasetDescription:
    """Writes ``dataset_description.json`` of a folder of results, a JSON sidecar of each volume in it, and
    ``.bidsignore`` for what BIDS has no names for.

    A folder may hold results of several jobs: each has its entry in ``GeneratedBy``.

    Args:
        output_dir: the folder of the results.
        sources: the folder or datalist that the job reads, or several scans.
        ckpt: the weights.
        metadata: the bundle's ``metadata.json``, which has its name and version.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        sources: str | os.PathLike | Sequence[Any],
        ckpt: str | os.PathLike,
        metadata: str | os.PathLike,
    ) -> None:
        self.output_dir, self.ckpt = Path(expand(output_dir)), absolute(ckpt)
        files = [file for scan in ensure_tuple(sources) for file in ensure_tuple(scan)]
        paths = [absolute(file) for file in files]
        self.sources = [Path(common_root([], path)) if path.suffix == ".json" else path for path in paths]
        self.metadata = Path(expand(metadata))

    @cached_property
    def generator(self) -> dict[str, Any]:
        """The bundle and the weights: an entry of ``GeneratedBy``."""
        metadata = read_json(self.metadata, "the metadata of a bundle")
        digest = {"SHA-256": hashlib.sha256(self.ckpt.read_bytes()).hexdigest()}
        weights = {"URI": self.ckpt.as_uri(), "Digest": digest}
        return {"Name": metadata["name"], "Version": metadata["version"], "Weights": weights}

    @cached_property
    def links(self) -> dict[str, Path]:
        """The folders of the sources, by what BIDS URIs call them: the same in whatever job."""
        folders = dict.fromkeys(source if source.is_dir() else source.parent for source in self.sources)
        named = ((re.sub(r"[^A-Za-z0-9]", "", path.name), zlib.crc32(os.fsencode(path)), path) for path in folders)
        return {f"{name}{number:08x}": path for name, number, path in named}

    def write_sidecar(self, volume: str | os.PathLike, scans: Sequence[str]) -> None:
        """Say beside a ``.nii.gz`` of what files it was made and by what: ``Sources`` and ``GeneratedBy``."""
        files = [absolute(scan) for scan in scans]
        sources = [self._uri(file) for file in files if file.exists()]  # channels of latents have names, but no files
        content = {"Sources": sources} if sources else {}
        path = Path(volume)
        sidecar = path.with_name(f"{path.name.removesuffix('.nii.gz')}.json")
        write_text(sidecar, json.dumps({**content, "GeneratedBy": [self.generator]}, indent=2) + "\n")

    def _uri(self, file: Path) -> str:
        for name, folder in self.links.items():
            if file.is_relative_to(folder):
                return f"bids:{name}:{file.relative_to(folder).as_posix()}"
        return file.as_uri()

    def __call__(self, job: str) -> None:
        """Describe the folder as one that holds results of this job; refused is another data set, such as that of the
        scans.
        """
        path = self.output_dir / "dataset_description.json"
        name, weights = self.generator["Name"], self.generator["Weights"]
        before = read_json(path, "the description of a BIDS data set") if path.exists() else {}
        generated = before.get("GeneratedBy", [])
        foreign = before and name not in [entry.get("Name") for entry in generated]
        if foreign or absolute(self.output_dir) in self.sources:
            raise ExistsError(
                f"output_dir '{self.output_dir}' is another data set, not one of results of this bundle: set "
                "--output_dir to a folder for them alone, such as derivatives/vdvae in that data set."
            )
        made_by = f"{job}, with the weights '{self.ckpt}' (SHA-256 {weights['Digest']['SHA-256']})"
        entry = {**self.generator, "Description": made_by}
        others = [entry for entry in generated if not entry.get("Description", "").startswith(f"{job},")]
        sources = [*before.get("SourceDatasets", []), *({"URL": source.as_uri()} for source in self.sources)]
        content = {
            "Name": f"{name}: results",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [*others, entry],
            "SourceDatasets": [source for i, source in enumerate(sources) if source not in sources[:i]],
            "DatasetLinks": before.get("DatasetLinks", {}) | {key: path.as_uri() for key, path in self.links.items()},
        }
        write_text(path, json.dumps(content, indent=2) + "\n")
        write_text(
            self.output_dir / ".bidsignore", "\n".join((*IGNORED, *(f"*_desc-{row}_*.json" for row in ROWS))) + "\n"
        )


def list_samples(output_dir: str | os.PathLike, count: int) -> list[dict[str, str]]:
    """Names for scans to be drawn, 1 or more, numbered from 1; their noise follows from the name."""
    if count < 1:
        raise InputError(f"samples is {count}: set --samples to 1 or more.")
    return [{"image": str(Path(output_dir) / f"{number:04d}")} for number in range(1, count + 1)]
