"""What the file of a population prior must hold: everything is checked before anything of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Pool
from scripts.data.covariates import SHARES, Continuous, CovariateCoding
from scripts.training.checkpoints import CheckpointError
from torch import Tensor
from torch.nn.functional import interpolate

FORMAT = 1  # of the file
FIT_IT = "fit one by the run fit_prior of configs/inference.json"
OFFSET_GRID = 64
OFFSETS = ("offset", "drawn_offset")
FACTORS = ("sharpness", "dispersion", "region_dispersion")


def coarse_offset(offset: Tensor) -> Tensor:
    """What features add to the mean of each voxel as a file has it: at 128³ and above on a coarser grid.

    There it would be most of the file, and what differs between groups of people from voxel to voxel is chance.

    Args:
        offset: ``[features, channels, *spatial]``.
    """
    size = max(1, max(offset.shape[2:]) // OFFSET_GRID)
    return offset if size == 1 else Pool["AVG", offset.ndim - 2](size)(offset.float())


def offset_on(shape: Sequence[int], offset: Tensor, name: str) -> Tensor:
    """What a file has of it, on the grid of the network.

    Args:
        shape: of that grid.
        offset: of the file.
        name: of the file, for the message.

    Raises:
        CheckpointError: it is of another grid.
    """
    if offset.shape[2:] == torch.Size(shape):
        return offset
    if coarse_offset(torch.empty(1, 1, *shape)).shape[2:] != offset.shape[2:]:
        raise CheckpointError(f"{name} is of another grid than the network, by what covariates add: {FIT_IT}.")
    return interpolate(offset.float(), tuple(shape), mode="trilinear" if len(shape) == 3 else "bilinear")


class _WrongError(Exception):
    """Something is wrong, as the rest of a sentence says."""


def check_prior(content: Any, name: str, grids: Sequence[Sequence[int]] | None = None) -> None:
    """Refuse what is no population prior of this bundle.

    Args:
        content: of the file, as ``torch.load`` reads it.
        name: of the file, for the message.
        grids: ``[channels, *grid]`` of each latent of the network that it is for, top first; None: of any.

    Raises:
        CheckpointError: the sentence says what is wrong.
    """
    if not isinstance(content, Mapping) or "population_prior" not in content:
        raise CheckpointError(f"{name} holds no population prior: {FIT_IT}.")
    version = content["population_prior"]
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{name} has format {version!r}, and this version of the bundle reads format {FORMAT}: take the version "
            f"that wrote it, or {FIT_IT}."
        )
    try:
        factors, features = _check_latents(content.get("latents"), grids)
        _check_rest(content, factors, features)
    except _WrongError as error:
        raise CheckpointError(f"{name} is damaged: {error}. Take it from where it was made, or {FIT_IT}.") from None


def _check_latents(latents: Any, grids: Sequence[Sequence[int]] | None) -> tuple[int, int]:
    """Returns the numbers of factors and of features of covariates."""
    if not isinstance(latents, Mapping) or not latents:
        raise _WrongError("its 'latents' are no table of latents")
    sizes = set()
    for index, latent in latents.items():
        place = f"latent {index!r}"
        if type(index) is not int or index < 0 or not isinstance(latent, Mapping):
            raise _WrongError(f"'latents' has {place}, which is none")
        shape = _tensor(latent, "mean", place).shape
        if grids is not None and (index >= len(grids) or tuple(shape) != tuple(grids[index])):
            has = f"is {list(grids[index])}" if index < len(grids) else "does not exist"
            raise _WrongError(f"the mean of {place} is {list(shape)}, but the network's {has}")
        if (_tensor(latent, "variance", place, shape) < 0).any():
            raise _WrongError(f"the variance of {place} is negative somewhere")
        factors = _check_rows(latent, "directions", "scale", place, shape)
        effects = {"effects", "effects_scale"} & latent.keys()
        sizes.add((factors, _check_rows(latent, "effects", "effects_scale", place, shape) if effects else 0))
    if len(sizes) > 1:
        raise _WrongError("its latents differ in their numbers of factors or of covariates' effects")
    return sizes.pop()


def _check_rows(latent: Mapping, name: str, scale: str, place: str, shape: Sequence[int]) -> int:
    """Check 8-bit numbers and their scale, one for each row; returns how many rows there are."""
    rows = latent.get(name)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int8 or rows.shape[1:] != torch.Size(shape):
        raise _WrongError(f"the {name} of {place} are no 8-bit numbers of shape [n, {', '.join(map(str, shape))}]")
    _tensor(latent, scale, place, rows.shape[:1])
    return len(rows)


def _tensor(values: Mapping, name: str, place: str, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of finite numbers, of one shape if it is said."""
    tensor = values.get(name)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise _WrongError(f"the {name} of {place} is no tensor of numbers")
    if shape is not None and tensor.shape != torch.Size(shape):
        raise _WrongError(f"the {name} of {place} is {list(tensor.shape)}, and should be {list(shape)}")
    if not tensor.isfinite().all():
        raise _WrongError(f"the {name} of {place} is not finite")
    return tensor


def _check_rest(content: Mapping, factors: int, features: int) -> None:
    for name, needed in (("distances", True), ("bits_per_dim", False), ("deviation_scores", False)):
        if (needed or content.get(name) is not None) and _tensor(content, name, "the cohort").ndim != 1:
            raise _WrongError(f"its '{name}' are no list of numbers")
    if content.get("spread") is not None and (_tensor(content, "spread", "the cohort", [factors]) <= 0).any():
        raise _WrongError("its 'spread' has numbers that are not above 0")
    if not isinstance(content.get("weights", ""), str):
        raise _WrongError("its 'weights' are no checksum")
    for name in FACTORS:
        value = content.get(name)
        if value is not None and not (_is_number(value) and value > 0):
            raise _WrongError(f"its '{name}' is {value!r}, and should be a number above 0")
    if content.get("familiarity") is not None:
        _check_familiarity(content["familiarity"])
    if "covariates" not in content:
        if features:
            raise _WrongError("it has effects of covariates, and does not say of which")
        return
    size = _coding(content["covariates"]).size
    if size != features:
        raise _WrongError(f"its covariates become {size} numbers, but it has {features} effects")
    for name in OFFSETS:
        if content.get(name) is not None and _tensor(content, name, "the covariates").shape[:1] != (features,):
            raise _WrongError(f"its '{name}' is not that of {features} effects")
    if content.get("correlation") is not None:
        count = len(content["covariates"])
        correlation = _tensor(content, "correlation", "the covariates", [count, count])
        if not torch.linalg.eigvalsh(correlation.double()).min() > 0:
            raise _WrongError("the correlation of its covariates is none")


def _check_familiarity(plain: Any) -> None:
    place, size = "what is familiar", len(plain["names"]) if isinstance(plain, Mapping) and "names" in plain else 0
    if not size or not all(isinstance(name, str) for name in plain["names"]):
        raise _WrongError("its 'familiarity' is no table of numbers by name")
    _tensor(plain, "mean", place, [size])
    _check_covariance(plain, size, place)
    if _tensor(plain, "quantiles", place).ndim != 2 or not _is_number(plain.get("bits_per_dim")):
        raise _WrongError(f"the quantiles or the bits per dim of {place} are missing")
    if plain.get("surprise") is not None and tuple(_tensor(plain, "surprise", place).shape[:-1]) != (2,):
        raise _WrongError(f"how unlikely the places of a brain are in {place} is no table")
    people = plain.get("people")
    if not isinstance(people, list | tuple) or len(people) != 2 or not all(type(n) is int and n > 0 for n in people):
        raise _WrongError(f"the people of {place} are {people!r}, and should be two numbers of them")
    for kind in plain.get("added", ()):
        if not isinstance(kind, list | tuple) or len(kind) != 3 or type(kind[2]) is not int or kind[2] < 1:
            raise _WrongError(f"what was added to {place} is no mean and covariance of a number of people")
        _tensor({"mean": kind[0]}, "mean", place, [size])
        _check_covariance({"covariance": kind[1]}, size, place)


def _check_covariance(plain: Mapping, size: int, place: str) -> None:
    covariance = _tensor(plain, "covariance", place, [size, size])
    if not torch.linalg.eigvalsh(covariance.double()).min() > 0:
        raise _WrongError(f"the covariance of {place} is none")


def _coding(plain: Any) -> CovariateCoding:
    try:
        coding = CovariateCoding.from_plain(plain)
        for variable in coding.variables.values():
            middle = variable.mean if isinstance(variable, Continuous) else variable.categories[0]
            numbers = [*variable.numbers(middle), *variable.numbers(None)]
            if isinstance(variable, Continuous):
                numbers += [*variable.numbers(variable.high), variable.mean, variable.std, variable.low, variable.high]
                numbers += variable.quantiles
                values = [variable.low, *variable.quantiles, variable.high]
                ordered = values == sorted(values) and list(variable.knots) == sorted(set(variable.knots))
                if not ordered or variable.std <= 0 or len(variable.quantiles) not in (0, len(SHARES)):
                    which = f"its covariate {variable.name!r}"
                    raise _WrongError(f"the range, the quantiles or the knots of {which} make no sense")
            elif not all(isinstance(category, str) for category in variable.categories):
                raise _WrongError(f"the categories of its covariate {variable.name!r} are no texts")
            if not isinstance(variable.name, str) or not all(map(_is_number, numbers)):
                raise _WrongError(f"its covariate {variable.name!r} does not become numbers")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise _WrongError(f"its 'covariates' cannot be read ({type(error).__name__}: {error})") from None
    return coding


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
