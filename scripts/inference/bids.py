"""Results as a BIDS derivative data set: their names, and the files that describe the data set and each volume.

See https://bids-specification.readthedocs.io/en/stable/derivatives/introduction.html.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple
from scripts.data.datalist import common_root
from scripts.utils.errors import ExistsError, InputError
from scripts.utils.files import read_json, write_text

__all__ = ["DatasetDescription", "derivative_path"]

BIDS_VERSION = "1.10.1"
NAME = re.compile(r"sub-[A-Za-z0-9+]+(_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+")
DATATYPES = ("anat", "dwi", "fmap", "func", "perf", "pet")
ROWS = ("score", "regions", "covariates", "findings", "imputed")  # JSON by itself, not beside a volume
# pictures, arrays, tables and settings, for which BIDS has no names
IGNORED = ("*.png", "*.html", "*.npz", "*.csv", "*.md", "/*.json", "!/dataset_description.json")


def derivative_path(folder: str | os.PathLike, stem: str, result: str, extension: str) -> Path:
    """The path of a scan's result in a derivative data set.

    ``sub-01/ses-1/anat/sub-01_ses-1_desc-recon_FLAIR.nii.gz`` for ``recon`` of ``sub-01_ses-1_FLAIR.nii.gz``, whatever
    folders that is in: the folder ``anat`` is the scan's own if that has the name of a BIDS data type. ``desc`` of the
    scan gives way, since a name has one.

    Args:
        folder: of the scan.
        stem: the scan's file name without its suffix.
        result: what it is; letters and digits of it become the label.
        extension: of the result, with its dot.

    Raises:
        ValueError: the scan's name is not one of BIDS.
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
        self.output_dir, self.ckpt = Path(output_dir).expanduser(), Path(ckpt).expanduser().absolute()
        files = [file for scan in ensure_tuple(sources) for file in ensure_tuple(scan)]
        paths = [Path(file).expanduser().absolute() for file in files]
        self.sources = [Path(common_root([], path)) if path.suffix == ".json" else path for path in paths]
        self.metadata = Path(metadata).expanduser()

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
        """Say beside a volume what it was made of and by what: ``Sources`` and ``GeneratedBy``.

        Args:
            volume: a ``.nii.gz``.
            scans: the files that it was made of.
        """
        files = [Path(scan).expanduser().absolute() for scan in scans]
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
        """Describe the folder as one that holds results of this job.

        Raises:
            FileExistsError: it is another data set, such as that of the scans.
        """
        path = self.output_dir / "dataset_description.json"
        name, weights = self.generator["Name"], self.generator["Weights"]
        before = read_json(path, "the description of a BIDS data set") if path.exists() else {}
        generated = before.get("GeneratedBy", [])
        foreign = before and name not in [entry.get("Name") for entry in generated]
        if foreign or self.output_dir.absolute() in self.sources:
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
