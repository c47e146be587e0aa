"""The file of a population prior: writing, reading, and which one belongs to a network's weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.layers.factories import Pool
from scripts.data.covariates import CovariateCoding
from scripts.networks import VDVAE
from scripts.population.prior import OFFSETS, PARTS, PopulationPrior, fingerprint
from scripts.training.checkpoints import CheckpointError, read_archive
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import expand, write_tensors
from torch import Tensor
from torch.nn.functional import interpolate

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file
FIT_IT = "fit one by the run fit_prior of configs/inference.json"
OFFSET_GRID = 64
CHOICES = (None, "population", "network")


def as_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers, with a scale for each row."""
    flat = rows.flatten(1)
    scale = flat.abs().amax(1).clamp_min(1e-12) / 127
    return (flat / scale[:, None]).round().to(torch.int8).reshape(rows.shape), scale


def from_bytes(small: Tensor, scale: Tensor) -> Tensor:
    """What :func:`as_bytes` was given, but for rounding."""
    return small.float() * scale.reshape(-1, *[1] * (small.ndim - 1))


def coarse_offset(offset: Tensor) -> Tensor:
    """What features add to the mean of each voxel, ``[features, channels, *spatial]``, at 128³ and above coarser.

    There it would be most of the file, and what differs between groups of people from voxel to voxel is chance.
    """
    size = max(1, max(offset.shape[2:]) // OFFSET_GRID)
    return offset if size == 1 else Pool["AVG", offset.ndim - 2](size)(offset.float())


def offset_on(shape: Sequence[int], offset: Tensor, name: str) -> Tensor:
    """What a file, called ``name`` in the message, has of it, on the network's grid of a shape."""
    if offset.shape[2:] == torch.Size(shape):
        return offset
    if coarse_offset(torch.empty(1, 1, *shape)).shape[2:] != offset.shape[2:]:
        raise CheckpointError(f"{name} is of another grid than the network, by what covariates add: {FIT_IT}.")
    return interpolate(offset.float(), tuple(shape), mode="trilinear" if len(shape) == 3 else "bilinear")


def save_prior(prior: PopulationPrior, path: str | os.PathLike, extras: Mapping[str, Any] | None = None) -> None:
    """Write tensors and plain values; directions as 8-bit numbers with a scale for each direction of a latent.

    Args:
        path: of the file, which is written whole.
        extras: what else belongs to it, plain values by name.
    """
    latents = {}
    mean, variance, directions, effects = map(prior.of_latents, PARTS)
    for index in prior.latents:
        small, scale = as_bytes(directions[index])
        latents[index] = {"mean": mean[index].half(), "variance": variance[index].half()}
        latents[index] |= {"directions": small, "scale": scale}
        if prior.features:
            latents[index]["effects"], latents[index]["effects_scale"] = as_bytes(effects[index])
    content = {"population_prior": FORMAT, "latents": latents}
    content |= {name: getattr(prior, name) for name in ("distances", "bits_per_dim", "spread")} | dict(extras or {})
    if prior.familiarity is not None:
        content["familiarity"] = prior.familiarity
    if prior.coding is not None:
        content |= {"covariates": prior.coding.plain(), "sharpness": prior.sharpness, "dispersion": prior.dispersion}
        content |= {name: getattr(prior, name) for name in ("region_dispersion", "deviation_scores")}
        for name in OFFSETS:
            offset = getattr(prior, name)
            content |= {} if offset is None else {name: coarse_offset(offset).half()}
        content |= {} if prior.correlation is None else {"correlation": prior.correlation}

    write_tensors(path, content)


def read_prior(path: Path) -> dict[str, Any]:
    """What the file of a population prior holds, for :func:`load_prior`.

    Raises:
        CheckpointError: it holds something else, or cannot be read.
    """
    content = read_archive(path)
    if not isinstance(content, dict) or "population_prior" not in content:
        raise CheckpointError(f"'{path}' holds no population prior: {FIT_IT}.")
    version = content["population_prior"]
    if version != FORMAT:
        raise CheckpointError(
            f"'{path}' has format {version!r}, and this version of the bundle reads format {FORMAT}: take the version "
            f"that wrote it, or {FIT_IT}."
        )
    return content


def load_prior(content: Mapping[str, Any], name: str = "the file", network: VDVAE | None = None) -> PopulationPrior:
    """From what :func:`save_prior` wrote, as ``torch.load`` reads it.

    Args:
        content: of the file.
        name: of the file, for messages.
        network: that it is for; None: any.

    Raises:
        CheckpointError: the content is damaged, or of another network.
    """
    try:
        prior, offsets = _prior(content), {part: content[part] for part in OFFSETS if content.get(part) is not None}
        whole = all(buffer.isfinite().all() for buffer in (*prior.buffers(), *offsets.values()))
        if network is not None:
            grids = network.latent_grids()
            whole = whole and all(getattr(prior, f"mean_{i}").shape == torch.Size(grids[i]) for i in prior.latents)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{name} is damaged: take it from where it was made, or {FIT_IT}.")
    for part, offset in offsets.items():
        offset = offset if network is None else offset_on(network.spatial_shape, offset, name)
        setattr(prior, part, offset.float())
    return prior


def _prior(content: Mapping[str, Any]) -> PopulationPrior:
    """That of a file but for its offsets."""
    parts: dict[str, dict[int, Tensor]] = {name: {} for name in PARTS}
    for index, latent in content["latents"].items():
        parts["mean"][index], parts["variance"][index] = latent["mean"], latent["variance"]
        parts["directions"][index] = from_bytes(latent["directions"], latent["scale"])
        if "effects" in latent:
            parts["effects"][index] = from_bytes(latent["effects"], latent["effects_scale"])
    prior = PopulationPrior(
        **parts,
        distances=content["distances"],
        bits_per_dim=content.get("bits_per_dim"),
        coding=CovariateCoding.from_plain(content["covariates"]) if "covariates" in content else None,
        sharpness=content.get("sharpness", 1.0),
        dispersion=content.get("dispersion", 1.0),
        region_dispersion=content.get("region_dispersion"),
    )
    prior.familiarity, prior.correlation = content.get("familiarity"), content.get("correlation")
    prior.spread = content.get("spread", prior.spread).float()
    prior.deviation_scores = content.get("deviation_scores", prior.deviation_scores)
    return prior


def prior_path(weights: str | os.PathLike) -> Path:
    """Where the population prior of weights is: ``population_prior.pt`` of ``model.pt``, in the same folder.

    Of ``model_64.pt`` it is ``population_prior_64.pt``, of ``people.pt`` ``population_prior_people.pt``.
    """
    path = Path(weights)
    name = path.stem.removeprefix("model").removeprefix("_")
    return path.with_name(f"population_prior_{name}.pt" if name else "population_prior.pt")


def find_population_prior(prior: str | None, ckpt: str | os.PathLike, network: VDVAE) -> PopulationPrior | None:
    """The population prior of a ``model.pt``.

    Args:
        prior: ``"population"`` for the one beside the weights, or its path; ``"network"`` for the network's own, which
            needs no file; None takes the one beside the weights where there is one that was fitted to them.
        ckpt: the weights.
        network: with these weights.

    Raises:
        ValueError: ``prior`` is none of these.
        FileNotFoundError: it is asked for, and there is none.
        CheckpointError: its file is damaged; or, where it is asked for, of other weights.
    """
    named = isinstance(prior, str | os.PathLike) and str(prior).endswith(".pt")
    path = Path(expand(prior)) if named else prior_path(ckpt)
    if prior not in CHOICES and not named:
        raise InputError(
            f"prior is {prior!r}: set --prior to population, network or a population_prior.pt, or leave it out."
        )
    if prior == "network" or (prior is None and not path.is_file()):
        return None
    if not path.is_file():
        raise NotFoundError(f"'{path}' does not exist: {FIT_IT}, or set --prior network.")
    content = read_prior(path)
    if content.get("weights") != fingerprint(network):
        what = f"'{path}' was fitted to other weights than '{ckpt}'"
        if prior is None:
            logger.warning("%s, and is not used: %s.", what, FIT_IT)
            return None
        raise CheckpointError(f"{what}: {FIT_IT}, or set --prior network.")
    found = load_prior(content, f"'{path}'", network).to(next(network.parameters()).device)
    found.path = path
    return found
