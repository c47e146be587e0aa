"""Releases: the bundle as a zip in the form of the Model Zoo or as a folder for a hub, and weights in half precision.

    python -m scripts.release bundle --output_dir releases
    python -m scripts.release hf releases/hub
    python -m scripts.release weights output/checkpoints/model.pt --output models/model_lean_32.pt \\
        --config_file "['configs/inference.json','configs/lean_32.json']"

A release is checked before anything is written.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_METADATA
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from scripts.networks import VDVAE
from scripts.population.files import load_prior, prior_path, read_prior
from scripts.population.prior import fingerprint
from scripts.training.checkpoints import CheckpointError, load_weights, read_weights
from scripts.utils.command_line import run
from scripts.utils.errors import InputError
from scripts.utils.files import as_folder, expand, read_json, write_tensors, write_text, write_whole

logger = logging.getLogger(__name__)

SIZE_LIMIT = 25_000_000  # bytes; what is larger is downloaded, not shipped
LARGE_FILES = "large_files.yml"
INFERENCE = "configs/inference.json"
LAYOUT = (
    "README.md",
    "LICENSE",
    LARGE_FILES,
    "requirements.txt",
    "configs/metadata.json",
    "configs/logging.conf",
    "configs/train.json",
    "configs/multi_gpu_train.json",
    "configs/evaluate.json",
    "configs/multi_gpu_evaluate.json",
    INFERENCE,
    "configs/multi_gpu_inference.json",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
)
NOT_SHIPPED = ("tests/", ".ci/", ".git")
HUB = {
    "license": ["apache-2.0", "cc-by-sa-4.0"],  # of the code, of the weights
    "library_name": "monai",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["monai", "medical", "mri", "brain", "vae", "normative-modelling", "3d"],
}
MOVED = {"docs/README.md": "README.md", "README.md": "docs/bundle.md"}  # pages that have another place on a hub
BINARY, LFS = ("*.pt", "*.safetensors"), "filter=lfs diff=lfs merge=lfs -text"
# what the bundle specification asks of each input and output
FORMAT_KEYS = {
    "type",
    "format",
    "num_channels",
    "spatial_shape",
    "dtype",
    "value_range",
    "is_patch_data",
    "channel_def",
}


class ReleaseError(InputError):
    """A bundle cannot be released; the sentence says what is wrong and what to do."""


def make_release(
    output_dir: str | Path, url: str | Mapping[str, str] | None = None, bundle_root: str | Path = "."
) -> Path:
    """Check the bundle and write it as ``<name>_v<version>.zip``, which holds one folder, ``<name>``.

    It holds the files that git tracks, as they are in the folder, without the tests; and all ``models/*.pt``. A file
    above 25 MB is not included, but listed in ``large_files.yml``, in the folder and in the zip.

    Args:
        output_dir: made if needed.
        url: where the file above 25 MB will be; for several ``{"models/a.pt": url, ...}``. Not needed for files that
            ``large_files.yml`` lists already.
        bundle_root: the bundle's folder.

    Returns:
        Path of the zip.

    Raises:
        ReleaseError: the bundle is incomplete or contradicts itself, a large file has no url, or there is a release of
            this version.
    """
    root = Path(expand(bundle_root))
    files, metadata = _checked(root)
    weights = _weights(files)
    large = [file for file in files if (root / file).stat().st_size > SIZE_LIMIT]
    entries = _list_large_files(root, large, files, url)
    name = re.sub(r"\W+", "_", metadata["name"].lower()).strip("_")
    path = as_folder("output_dir", output_dir) / f"{name}_v{metadata['version']}.zip"
    if path.exists():
        raise ReleaseError(
            f"'{path}' is another release of version {metadata['version']}: raise 'version' in configs/metadata.json "
            "and say in 'changelog' what is new, or remove that file."
        )
    listed = _large_files_text(root, entries)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: str) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in files:
                if file == LARGE_FILES:
                    archive.writestr(f"{name}/{file}", listed)
                elif file not in large:
                    archive.write(root / file, f"{name}/{file}")

    write_whole(path, write)
    if listed != (root / LARGE_FILES).read_text(encoding="utf-8"):
        write_text(root / LARGE_FILES, listed)
        logger.info("Wrote '%s'.", root / LARGE_FILES)
    for file in weights:
        where = "downloaded by large_files.yml" if file in large else "in the zip"
        logger.info("%s  %s (%s)", _sha256(root / file), file, where)
    logger.info("%s  %s (%.1f MB)", _sha256(path), path, path.stat().st_size / 1e6)
    return path


def make_hub_folder(output_dir: str | Path, bundle_root: str | Path = ".") -> Path:
    """Check the bundle and write it as a folder that Hugging Face takes as a repository.

    It holds what a release holds, files above 25 MB too. ``README.md`` is the model card, whose front matter says what
    a hub sorts by; the bundle's own is ``docs/bundle.md``. Beside each ``.pt`` of weights there is a ``.safetensors``.

    Args:
        output_dir: made if needed; empty, or not there.
        bundle_root: the bundle's folder.

    Returns:
        Path of the folder.

    Raises:
        ReleaseError: the bundle is incomplete or contradicts itself, or the folder is not empty.
    """
    root, folder = Path(expand(bundle_root)), as_folder("output_dir", output_dir)
    files, metadata = _checked(root)
    if folder.exists() and any(folder.iterdir()):
        raise ReleaseError(f"output_dir '{folder}' is not empty: give another one, or empty it.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        _fill_hub_folder(unfinished, root, files, metadata)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("'%s' is a repository as a hub takes it: upload it as it is.", folder)
    return folder


def _fill_hub_folder(folder: Path, root: Path, files: Sequence[str], metadata: Mapping[str, Any]) -> None:
    pages = {file: MOVED.get(file, file) for file in files if file.endswith(".md")}
    for file in files:
        path = folder / pages.get(file, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, path)
        if file in pages:
            path.write_text(_relinked(path.read_text(encoding="utf-8"), file, pages), encoding="utf-8")
    for file in _weights(files):
        state = {name: tensor.contiguous() for name, tensor in read_weights(root / file).items()}
        path = folder / Path(file).with_suffix(".safetensors")
        save_file(state, path, metadata={"format": "pt"})
        shutil.copymode(root / file, path)  # else it is the owner's alone
    card = folder / MOVED["docs/README.md"]
    card.write_text(_front_matter(metadata) + card.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / ".gitattributes").write_text("".join(f"{kind} {LFS}\n" for kind in BINARY), encoding="utf-8")


def _relinked(text: str, file: str, moved: Mapping[str, str]) -> str:
    """A page whose links lead where they did, now that it or what they lead to has moved."""
    old, new = Path(file).parent.as_posix(), Path(moved[file]).parent.as_posix()

    def relink(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(old, target))
        return f"]({posixpath.relpath(moved.get(path, path), new)}{anchor})"

    return re.sub(r"\]\(([^)\s#]*)(#[^)\s]*)?\)", relink, text)


def _front_matter(metadata: Mapping[str, Any]) -> str:
    """What a hub sorts models by, as YAML at the head of the card: licence, library, tags, and what was measured."""
    measured = [{"type": name, "value": value} for name, value in metadata["eval_metrics"].items()]
    result = {
        "task": {"type": "unconditional-image-generation", "name": metadata["task"]},
        "dataset": {"type": "brain-mri", "name": metadata["data_source"]},
        "metrics": measured,
    }
    content = {**HUB, "model-index": [{"name": metadata["name"], "results": [result]}]}
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n\n"


def _checked(root: Path) -> tuple[list[str], dict[str, Any]]:
    """The files to release and the metadata, after all checks.

    Raises:
        ReleaseError: the bundle is incomplete or contradicts itself.
    """
    files = _list_files(root)
    _check_layout(root, files)
    metadata = read_json(root / "configs/metadata.json", "the metadata of a bundle")
    _check_metadata(metadata)
    _check_versions(metadata, root / "requirements.txt")
    weights = _weights(files)
    for file in weights:
        _load_shipped(root, file)
    for file in files:
        if _is_prior(file):
            _check_prior(root, file, weights)
    _check_data_format(metadata["network_data_format"], _read_network(root, [INFERENCE]))
    return files, metadata


def _is_prior(file: str) -> bool:
    return file.startswith("models/population_prior") and file.endswith(".pt")


def _weights(files: Sequence[str]) -> list[str]:
    return [file for file in files if file.startswith("models/") and file.endswith(".pt") and not _is_prior(file)]


def _list_files(root: Path) -> list[str]:
    """Paths of the files to release, relative to the root, in the order of their names."""
    tracked = [file for file in _git(root, "ls-files", "-z").split("\0") if file]
    missing = [file for file in tracked if not (root / file).is_file()]
    if missing:
        raise ReleaseError(
            f"'{missing[0]}' is tracked by git and not in the folder: restore it, or remove it in git too."
        )
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", ".").splitlines()
    if changed:
        logger.warning(
            "%d files differ from the last commit; they are released as they are in the folder.", len(changed)
        )
    weights = [path.relative_to(root).as_posix() for path in root.glob("models/*.pt")]
    return sorted(file for file in {*tracked, *weights} if not file.startswith(NOT_SHIPPED))


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, encoding="utf-8")
    except FileNotFoundError as error:
        raise ReleaseError(
            f"either the folder '{root}' or the program git is missing: git tells which files belong to the bundle."
        ) from error
    if result.returncode:
        raise ReleaseError(
            f"git cannot tell which files of '{root}' belong to the bundle ({result.stderr.strip()}): release from a "
            "clone of its repository."
        )
    return result.stdout


def _check_layout(root: Path, files: Sequence[str]) -> None:
    for file in LAYOUT:
        if file not in files:
            state = "not tracked by git: add it" if (root / file).exists() else f"missing: {_advice(file)}"
            raise ReleaseError(f"'{file}', which every bundle has, is {state}.")
    for file in _git(root, "ls-files", "-z", "--others", "--exclude-standard", "configs", "scripts").split("\0"):
        if file:
            raise ReleaseError(f"'{file}' is not tracked by git, so that the bundle would lack it: add or remove it.")


def _advice(file: str) -> str:
    if file.startswith("models/"):
        return (
            "make it by 'python -m scripts.release weights', or fetch it by "
            "'python -m monai.bundle download_large_files --bundle_path .'"
        )
    return "write it"


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    for key in ("schema", "name", *DEFAULT_METADATA):
        if key not in metadata:
            raise ReleaseError(
                f"configs/metadata.json has no '{key}', which the bundle specification asks for: add it."
            )
    if metadata["version"] not in metadata["changelog"]:
        raise ReleaseError(
            f"configs/metadata.json has no entry for version {metadata['version']} in 'changelog': say there what is "
            "new."
        )
    for side in ("inputs", "outputs"):
        described = metadata["network_data_format"].get(side)
        if not described:
            raise ReleaseError(f"configs/metadata.json describes no '{side}' in 'network_data_format': describe them.")
        for name, data in described.items():
            lacking = sorted(FORMAT_KEYS - data.keys())
            if lacking:
                raise ReleaseError(
                    f"configs/metadata.json says of '{name}' in 'network_data_format' nothing about '{lacking[0]}': "
                    "add it."
                )


def _check_versions(metadata: Mapping[str, Any], requirements: Path) -> None:
    lines = [line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    pins: dict[str, set[str]] = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("-")):
        versions = {specifier.version for specifier in requirement.specifier}
        pins.setdefault(canonicalize_name(requirement.name), set()).update(versions)
    stated = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    for package, version in (stated | metadata["required_packages_version"]).items():
        pinned = pins.get(canonicalize_name(package), set())
        if version not in pinned:
            there = f"has {' and '.join(sorted(pinned))}" if pinned else "does not have it"
            raise ReleaseError(
                f"configs/metadata.json says {package} {version}, but requirements.txt {there}: give both the version "
                "that was tested."
            )


def _read_network(root: Path, config_files: Sequence[str]) -> VDVAE:
    parser = ConfigParser()
    parser.read_config([str(root / file) for file in config_files])
    return parser.get_parsed_content("network_def")


def _load_shipped(root: Path, file: str) -> VDVAE:
    """The network of weights, which must fit: ``model_lean_64.pt`` that of ``configs/lean_64.json``, ``model_128.pt``
    that of ``configs/people_128.json`` or else ``configs/size_128.json``, others the default one.
    """
    name = Path(file).stem.removeprefix("model").removeprefix("_")
    named = (f"configs/{start}{name}.json" for start in ("", "people_", "size_"))
    overlays = [path for path in named if (root / path).is_file()]
    config_files = [INFERENCE, *overlays[:1]]
    return _load(_read_network(root, config_files), root / file, config_files)


def _check_prior(root: Path, file: str, weights: Sequence[str]) -> None:
    """Check that a population prior can be read, and was fitted to the weights that it lies beside."""
    own = next((other for other in weights if prior_path(other) == Path(file)), None)
    if own is None:
        raise ReleaseError(f"'{file}' is the population prior of weights that are not there: remove it.")
    try:
        content = read_prior(root / file)
        load_prior(content)
    except CheckpointError as error:
        raise ReleaseError(f"'{file}' is no population prior ({error}): fit one by the run fit_prior.") from error
    if content["weights"] != fingerprint(_load_shipped(root, own)):
        raise ReleaseError(f"'{file}' was fitted to other weights than '{own}': fit one by the run fit_prior.")


def _load(network: VDVAE, path: Path, config_files: Sequence[str]) -> VDVAE:
    try:
        return load_weights(network, path)
    except CheckpointError as error:
        raise ReleaseError(f"{error} It was loaded into the network of {', '.join(config_files)}.") from error


def _check_data_format(data_format: Mapping[str, Any], network: VDVAE) -> None:
    own = {"spatial_shape": list(network.spatial_shape), "num_channels": network.in_channels}
    for name, data in (data_format["inputs"] | data_format["outputs"]).items():
        for key, value in own.items():
            if data[key] != value:
                raise ReleaseError(
                    f"configs/metadata.json says {key} {data[key]} of '{name}' in 'network_data_format', but the "
                    f"network of {INFERENCE} has {value}: give both the same."
                )


def _list_large_files(
    root: Path, large: Sequence[str], files: Sequence[str], url: str | Mapping[str, str] | None
) -> list[dict[str, str]]:
    """The entries of ``large_files.yml``, in the order of their paths."""
    if isinstance(url, str) and len(large) != 1:
        raise ReleaseError(
            f"--url is one address, but {len(large)} files are above 25 MB{''.join(f', {file}' for file in large)}: "
            + ("give \"{'FILE': 'ADDRESS', ...}\"." if large else "leave it out.")
        )
    urls = {large[0]: url} if isinstance(url, str) else dict(url or {})
    for file in urls:
        if file not in large:
            raise ReleaseError(f"--url has an address for '{file}', which is no file above 25 MB: leave it out.")
    listed = {entry["path"]: entry for entry in _read_large_files(root)}
    # what is not in the folder was not downloaded; it stays listed
    entries = {path: entry for path, entry in listed.items() if path not in files}
    for file in large:
        hashed = {"hash_val": _sha256(root / file), "hash_type": "sha256"}
        if file in urls:
            entries[file] = {"path": file, "url": urls[file], **hashed}
        elif listed.get(file, {}).get("hash_val") == hashed["hash_val"]:
            entries[file] = listed[file]
        else:
            raise ReleaseError(
                f"'{file}' has {(root / file).stat().st_size / 1e6:.0f} MB, above the 25 MB that a bundle ships: put "
                "it where it can be downloaded from and say where by --url, or halve it by 'python -m scripts.release "
                "weights'."
            )
    return [entries[path] for path in sorted(entries)]


def _read_large_files(root: Path) -> list[dict[str, str]]:
    content = yaml.safe_load((root / LARGE_FILES).read_text(encoding="utf-8"))
    entries = content.get("large_files") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all({"path", "url"} <= entry.keys() for entry in entries):
        raise ReleaseError(
            f"'{root / LARGE_FILES}' is no list 'large_files' of 'path' and 'url': write 'large_files: []'."
        )
    return entries


def _large_files_text(root: Path, entries: Sequence[Mapping[str, str]]) -> str:
    """The content of ``large_files.yml``, with the comments of the file that is there."""
    lines = (root / LARGE_FILES).read_text(encoding="utf-8").splitlines(keepends=True)
    comment = "".join(line for line in lines if line.startswith("#"))
    return comment + yaml.safe_dump({"large_files": list(entries)}, sort_keys=False)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ship_weights(
    checkpoint: str | Path, output: str | Path = "models/model.pt", config_file: str | Sequence[str] = INFERENCE
) -> Path:
    """Write a copy of a ``model.pt`` in half precision, which loads like the original.

    Single precision becomes half, every other type stays (the template's affine is double).

    Args:
        checkpoint: a ``model.pt`` or ``best_model.pt``.
        output: path of the copy, in an existing folder.
        config_file: the config, or several, whose ``network_def`` the weights belong to.

    Returns:
        ``output``.

    Raises:
        ReleaseError: the weights don't fit the network, or a value is not finite, or too large for half precision.
    """
    config_files = [config_file] if isinstance(config_file, str) else list(config_file)
    state = _load(_read_network(Path(), config_files), Path(expand(checkpoint)), config_files).state_dict()
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    for name, tensor in halved.items():
        if not torch.isfinite(tensor).all():
            raise ReleaseError(
                f"weights '{checkpoint}' reach {state[name].abs().max():.3g} in '{name}', but half precision ends at "
                f"{torch.finfo(torch.float16).max:.0f}: ship them in single precision."
            )
    path = write_tensors(expand(output), halved)
    logger.info("%s  %s (%.1f MB)", _sha256(path), path, path.stat().st_size / 1e6)
    return path


if __name__ == "__main__":
    run("python -m scripts.release", {"bundle": make_release, "hf": make_hub_folder, "weights": ship_weights})
