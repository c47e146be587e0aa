"""Covariates of scans, such as age, sex and site: how they become numbers that a model takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import betaincinv
from scripts.utils.errors import InputError
from torch import Tensor

Value = float | str | None  # of a covariate; None: not known

KINDS = ("continuous", "categorical")
SHARES = (0.05, 0.35, 0.65, 0.95)  # of the training side below the quantiles that are kept, after Harrell
MOST_CATEGORIES = 64
KNOTS_OFF = 0.1  # standard deviations: so far the mean that knots imply as quantiles may be from the cohort's
BEYOND = 0.25  # of the width of a number's range: what is asked for may lie so far outside of it
# what tables write where they know nothing, in small letters: BIDS, R, pandas, spreadsheets, SAS
MISSING = ("", "n/a", "na", "nan", "none", "null", "<na>", "#n/a", "-", ".")
LARGEST = 1e12  # of a number, and its distance from the mean in standard deviations: its cube still fits in float32
ROUNDING = 1e-12  # of a cohort's largest value: a standard deviation that is no larger is what rounding leaves of 0
MOST_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Continuous:
    """A number, such as age, whose effect is a restricted cubic spline: a straight line beyond the outer knots.

    Attributes:
        name: of the covariate.
        mean, std: of the training side, in the covariate's unit; a std of 1 where all have the same value.
        low, high: its range there.
        knots: of the spline, in the covariate's unit; fewer than 3: the effect is a straight line.
        centre: means of the numbers that it becomes, over the training side.
        quantiles: of the training side, at the shares of ``SHARES``; empty in a file of an earlier version.
    """

    name: str
    mean: float
    std: float
    low: float
    high: float
    knots: tuple[float, ...]
    centre: tuple[float, ...]
    quantiles: tuple[float, ...] = ()
    kind: ClassVar[str] = "continuous"

    @classmethod
    def learn(cls, name: str, values: Sequence[float], knots: Sequence[float] | None = None) -> Continuous:
        """From the values of the training side, by default with knots at their quantiles."""
        mean, std = float(np.mean(values)), float(np.std(values))
        if std <= ROUNDING * max(map(abs, values)):
            std = 1.0
        quantiles = np.quantile(values, SHARES).tolist()
        curved = knots is not None or len(set(values)) > len(SHARES)
        knots = np.unique(quantiles if knots is None else np.array(knots, float)).tolist()
        curved = curved and len(knots) > 2
        knots = tuple(knots) if curved else ()
        plain = cls(name, mean, std, min(values), max(values), knots, (), tuple(quantiles))
        centre = np.mean([plain._curve(value) for value in values], axis=0)
        return cls(**{**asdict(plain), "centre": tuple(centre.tolist())})

    def _curve(self, value: float) -> list[float]:
        x, knots = (value - self.mean) / self.std, [(knot - self.mean) / self.std for knot in self.knots]
        if not knots:
            return [x]

        def cube(distance: float) -> float:
            return max(distance, 0.0) ** 3

        *inner, before, last = knots
        width = last - knots[0]
        bends = [
            cube(x - k)
            - cube(x - before) * (last - k) / (last - before)
            + cube(x - last) * (before - k) / (last - before)
            for k in inner
        ]
        return [x, *(bend / width**2 for bend in bends)]

    def numbers(self, value: Value) -> list[float]:
        """What the covariate becomes: numbers with a mean of 0 over the training side; zeros where it is not known."""
        if value is None:
            return [0.0] * len(self.centre)
        return [number - mean for number, mean in zip(self._curve(float(value)), self.centre, strict=True)]

    def parse(self, value: Any) -> float | None:
        """A value as it is written; None where it is missing.

        Raises:
            ValueError: it is no number.
        """
        number = parse_number(self.name, value)
        if number is not None and abs(number - self.mean) / self.std > LARGEST:
            raise InputError(f"{self.name} is {shortened(value)}: it is too large; correct it, or write n/a.")
        return number

    def quantile(self, share: float) -> float:
        """The value below which this share of the training side lies."""
        return float(np.interp(share, *self._distribution()))

    def interval(self, value: Value) -> tuple[float, float]:
        """The shares of the training side between which a value lies: twice that below it, but for a frequent one."""
        shares, values = self._distribution()
        equal = [share for share, quantile in zip(shares, values, strict=True) if quantile == float(value)]
        equal = equal or [float(np.interp(float(value), values, shares))]
        return equal[0], equal[-1]

    def _distribution(self) -> tuple[list[float], list[float]]:
        """Some shares of the training side, and the values below which they lie."""
        shares, quantiles = [0.0, *SHARES, 1.0], self.quantiles
        if not quantiles:  # of an earlier version, whose knots are the quantiles unless somebody gave others
            quantiles, values = self.knots, [self.low, *self.knots, self.high]
            usual = len(values) == len(shares) and values == sorted(values)
            if not usual or abs(np.trapezoid(values, shares) - self.mean) > KNOTS_OFF * self.std:
                quantiles = quantiles_of_moments(self.mean, self.std, self.low, self.high)
        return shares, [self.low, *quantiles, self.high]

    def outside(self, value: Value) -> bool:
        """Whether a value lies outside of the range of the training side."""
        return value is not None and not self.low <= value <= self.high

    def refuse_far(self, value: Value) -> None:
        """Refuse a value that is asked for where nothing was learnt, far outside of the range of the training side."""
        beyond = BEYOND * (self.high - self.low)
        if value is not None and not self.low - beyond <= value <= self.high + beyond:
            raise InputError(
                f"covariates: {self.name} is {value:g}: in the prior's cohort it goes from {self.low:.4g} to "
                f"{self.high:.4g}; ask for one from {self.low - beyond:.4g} to {self.high + beyond:.4g}."
            )

    def grid(self, steps: int = 81) -> list[float]:
        """Values to ask about: evenly spaced over the range of the training side."""
        return np.linspace(self.low, self.high, steps).tolist()


@dataclass(frozen=True)
class Categorical:
    """One of a few words, such as a sex or a site.

    Attributes:
        name: of the covariate.
        categories: of the training side, sorted.
        shares: how frequent each was.
    """

    name: str
    categories: tuple[str, ...]
    shares: tuple[float, ...]
    kind: ClassVar[str] = "categorical"

    @classmethod
    def learn(cls, name: str, values: Sequence[str]) -> Categorical:
        """From the values of the training side.

        Raises:
            ValueError: there are too many different ones.
        """
        categories = sorted(set(values))
        if len(categories) > MOST_CATEGORIES:
            raise InputError(
                f"covariates: {name} has {len(categories)} different values, such as {shortened(categories[0])}: a "
                f"categorical one can have {MOST_CATEGORIES}. Is it continuous?"
            )
        return cls(name, tuple(categories), tuple(values.count(c) / len(values) for c in categories))

    def quantile(self, share: float) -> str:
        """The category at this share of the training side, in the order of the categories."""
        place = int(np.searchsorted(np.cumsum(self.shares), share * sum(self.shares), side="right"))
        return self.categories[min(place, len(self.categories) - 1)]

    def interval(self, value: Value) -> tuple[float, float]:
        """The shares of the training side between which a category lies, in the order of the categories."""
        place, total = self.categories.index(value), sum(self.shares)
        return sum(self.shares[:place]) / total, sum(self.shares[: place + 1]) / total

    def numbers(self, value: Value) -> list[float]:
        """What the covariate becomes, one number per category but the first, with a mean of 0; zeros where unknown."""
        if value is None:
            return [0.0] * (len(self.categories) - 1)
        return [(value == c) - share for c, share in zip(self.categories[1:], self.shares[1:], strict=True)]

    def parse(self, value: Any) -> str | None:
        """A value as it is written; None where it is missing.

        Raises:
            ValueError: the training side had no such category.
        """
        if not self.has(value):
            raise InputError(
                f"{self.name} is {shortened(_word(value))}: the cohort that the model was fitted to has "
                f"{', '.join(self.categories)}; write n/a for one that is not known."
            )
        return None if missing(value) else self._known()[_word(value)]

    def has(self, value: Any) -> bool:
        """Whether a value as it is written is missing or one that the training side had."""
        return missing(value) or _word(value) in self._known()

    def _known(self) -> dict[str, str]:
        """The categories by how they are written now; a file of an earlier version may have 2.0 for 2."""
        return {_word(category): category for category in self.categories}

    def outside(self, value: Value) -> bool:
        """False: what no training scan had is refused."""
        return False

    def refuse_far(self, value: Value) -> None:
        """Nothing: what no training scan had is refused."""

    def grid(self) -> list[str]:
        """Values to ask about: all categories."""
        return list(self.categories)


class CovariateCoding:
    """The covariates of a cohort, and the numbers that they become for a model.

    Args:
        variables: the covariates, in their order.

    Attributes:
        size: how many numbers they become.
    """

    def __init__(self, variables: Sequence[Continuous | Categorical]) -> None:
        self.variables = {variable.name: variable for variable in variables}
        self.size = sum(len(variable.numbers(None)) for variable in variables)

    @classmethod
    def learn(cls, kinds: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> CovariateCoding:
        """From the training side.

        Args:
            kinds: ``continuous``, ``categorical`` or the knots of a continuous one's spline, for each covariate.
            rows: of each scan, what is written of it, by the covariates' names.

        Raises:
            ValueError: there is no such kind, a continuous covariate is no number, or no scan has the covariate.
        """
        variables: list[Continuous | Categorical] = []
        for name, kind in check_kinds(kinds).items():
            written = [row.get(name) for row in rows if not missing(row.get(name))]
            if not written:
                raise InputError(f"covariates: no training scan has a value for '{name}'.")
            if kind == "categorical":
                variables.append(Categorical.learn(name, [_word(value) for value in written]))
            else:
                knots = None if kind == "continuous" else kind
                variables.append(Continuous.learn(name, [parse_number(name, value) for value in written], knots))
        return cls(variables)

    def parse(self, row: Mapping[str, Any]) -> dict[str, Value]:
        """What is written of a scan, as values of all covariates; None for those that it lacks.

        Raises:
            ValueError: a value makes no sense.
        """
        return {name: variable.parse(row.get(name)) for name, variable in self.variables.items()}

    def unseen(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What is written of a scan that no training scan had, by the categorical covariates' names."""
        return {
            name: _word(row[name])
            for name, variable in self.variables.items()
            if isinstance(variable, Categorical) and not variable.has(row.get(name))
        }

    def numbers(self, values: Mapping[str, Value]) -> Tensor:
        """What the covariates become, ``[size]``; zeros for one that is not known or not named."""
        parts = [variable.numbers(values.get(name)) for name, variable in self.variables.items()]
        return torch.tensor([number for part in parts for number in part])

    def slices(self) -> dict[str, slice]:
        """Where each covariate's numbers are among all."""
        found, start = {}, 0
        for name, variable in self.variables.items():
            size = len(variable.numbers(None))
            found[name], start = slice(start, start + size), start + size
        return found

    def given(self, values: Any) -> dict[str, Value]:
        """Values that a user asks for, such as ``{"age": 70}``, checked.

        Raises:
            ValueError: they are no such mapping, the model has no such covariate, or a value makes no sense or lies far
                outside of what the training side had.
        """
        if not isinstance(values, Mapping) or not values:
            raise InputError(
                f'covariates is {values!r}: give values by names, as in --covariates "{{\'{self.example()}}}".'
            )
        for name in values:
            if name not in self.variables:
                raise InputError(f"covariates: the model knows no '{name}'; it knows {', '.join(self.variables)}.")
        found = {name: self.variables[name].parse(value) for name, value in values.items()}
        for name, value in found.items():
            self.variables[name].refuse_far(value)
        return found

    def example(self) -> str:
        """How a user writes a value of the first covariate."""
        name, variable = next(iter(self.variables.items()))
        value = variable.grid()[len(variable.grid()) // 2]
        return f"{name}': {f'{value:.3g}' if isinstance(value, float) else repr(value)}"

    def plain(self) -> list[dict[str, Any]]:
        """As plain values, for a file."""
        return [{"kind": variable.kind, **asdict(variable)} for variable in self.variables.values()]

    @classmethod
    def from_plain(cls, content: Sequence[Mapping[str, Any]]) -> CovariateCoding:
        """From what :meth:`plain` gave."""
        classes = {"continuous": Continuous, "categorical": Categorical}
        return cls([classes[item["kind"]](**{k: v for k, v in item.items() if k != "kind"}) for item in content])


def quantiles_of_moments(mean: float, std: float, low: float, high: float) -> tuple[float, ...]:
    """Quantiles at ``SHARES`` of a cohort of which no more is known: those of the beta distribution on its range."""
    if not low < mean < high:
        return (mean,) * len(SHARES)
    share, width = (mean - low) / (high - low), high - low
    weight = max(share * (1 - share) * (width / std) ** 2 - 1, 1e-2)
    return tuple((low + width * betaincinv(share * weight, (1 - share) * weight, SHARES)).tolist())


def check_kinds(kinds: Any) -> dict[str, Any]:
    """Refuse what does not say of what kind each covariate is; knots, 3 or more, say that it is continuous.

    Raises:
        ValueError: it is no such mapping.
    """
    if not isinstance(kinds, Mapping) or not kinds or not all(k in KINDS or _are_knots(k) for k in kinds.values()):
        raise InputError(
            f"covariates is {kinds!r}: say of what kind each is, such as "
            "\"{'age': 'continuous', 'sex': 'categorical'}\", or the knots of a spline, as \"{'age': [20, 50, 80]}\"."
        )
    return dict(kinds)


def _are_knots(kind: Any) -> bool:
    """Whether the kind of a covariate is three numbers or more, each larger than the one before."""
    numbers = isinstance(kind, list | tuple) and all(type(knot) in (int, float) for knot in kind)
    return numbers and len(kind) > 2 and all(map(float.__lt__, map(float, kind), map(float, kind[1:])))


def parse_number(name: str, value: Any) -> float | None:
    """The value of a continuous covariate as it is written; None where it is missing.

    Raises:
        InputError: it is no number, or one whose cube is none in single precision.
    """
    if missing(value):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise InputError(
            f"{name} is {shortened(value)}: it must be a number alone, with a point before its decimals and no larger "
            f"than {LARGEST:g}, or n/a where it is not known."
        )
    return number


def missing(value: Any) -> bool:
    """Whether a value as it is written says nothing: None, NaN, an empty text, or a word such as ``n/a`` or R's NA."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() in MISSING


def shortened(value: Any) -> str:
    """A value as it is written, for a message: quoted, and cut off where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(str(value))} characters)"


def _word(value: Any) -> str:
    """A category as text: 2, 2.0 and "2.0" are the same; "02" is another."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:g}"
    text = str(value).strip()
    whole = re.fullmatch(r"([+-]?\d+)\.0*", text)
    return whole[1] if whole else text
