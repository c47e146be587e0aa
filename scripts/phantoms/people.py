"""Age, sex and site of phantom brains, and what these do to anatomy and image.

Every effect is known and monotone, so that a phantom made again at another age, of the other sex or at another site is
the true counterfactual of the first: the same person, since all random numbers stay.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scripts.phantoms.fields import sample_maps, smooth_fields
from scripts.utils.command_line import check_number
from scripts.utils.errors import InputError

AGES = (45.0, 85.0)  # years
SEXES = ("F", "M")


class Scanner(NamedTuple):
    """What one site's scanner and sequence do to every image.

    Attributes:
        gray, fluid: multiply the ratios of gray matter's and CSF's signal to white matter's.
        bias: the site's own bias field falls by this share of the signal from the front to the back of the head.
        noise: multiplies the noise.
        blur: standard deviation of a Gaussian blur, mm.
    """

    gray: float
    fluid: float
    bias: float
    noise: float
    blur: float


SITES = {
    "A": Scanner(gray=1.0, fluid=1.0, bias=0.0, noise=1.0, blur=0.0),
    "B": Scanner(gray=0.92, fluid=1.25, bias=0.15, noise=1.6, blur=0.0),
    "C": Scanner(gray=1.06, fluid=0.85, bias=-0.10, noise=0.8, blur=1.5),
}


class Person(NamedTuple):
    """Who a phantom is.

    Attributes:
        age: in years.
        sex: ``F`` or ``M``.
        site: one of ``SITES``.
        rate: how fast this brain ages, about 1.
    """

    age: float
    sex: str
    site: str
    rate: float

    @property
    def scanner(self) -> Scanner:
        """Of the site."""
        return SITES[self.site]

    @property
    def aged(self) -> float:
        """0 at 45 years, 1 at 85 for a rate of 1, and faster from year to year."""
        years = (self.age - AGES[0]) / (AGES[1] - AGES[0])
        return self.rate * (0.4 * years + 0.6 * years * abs(years))

    @property
    def atrophy(self) -> float:
        """What age adds to the number that widens ventricles and sulci, whose standard deviation is 1 in a cohort."""
        return 2.6 * self.aged

    @property
    def thinning(self) -> float:
        """What age takes from the log odds of gray matter."""
        return 0.35 * self.aged

    @property
    def stretch(self) -> np.ndarray:
        """Size along right, anterior and superior that registration leaves: heads of men are larger, and longer."""
        return np.array([1.012, 1.025, 1.015]) ** (1 if self.sex == "M" else -1)


class Cohort(NamedTuple):
    """Who the phantoms of a cohort are: drawn, but for what is fixed for all of them.

    Attributes:
        age: in years; None: uniform from 45 to 85 years.
        sex: ``F`` or ``M``; None: either is as likely.
        site: one of ``SITES``; None: all are as likely. Age, sex and site are independent of each other.
    """

    age: float | None = None
    sex: str | None = None
    site: str | None = None

    def person(self, rng: np.random.Generator) -> Person:
        """Draw a person. What is fixed changes nothing else of the same person."""
        drawn = rng.uniform(*AGES), str(rng.choice(SEXES)), str(rng.choice(list(SITES)))
        rate = float(np.exp(rng.normal(0, 0.2)))
        return Person(*(new if fixed is None else fixed for fixed, new in zip(self, drawn, strict=True)), rate)

    def check(self) -> None:
        """Refuse values that no phantom has.

        Raises:
            ValueError: the age is not between 20 and 100 years, or there is no such sex or site.
        """
        if self.age is not None:
            check_number("age (years)", self.age, 20, 100)
        for name, value, known in (("sex", self.sex, SEXES), ("site", self.site, tuple(SITES))):
            if value is not None and value not in known:
                raise InputError(f"{name} is {value!r}: phantoms have {', '.join(known)}.")


def hyperintensities(
    rng: np.random.Generator, near: np.ndarray, white: np.ndarray, atlas_points: torch.Tensor, aged: float
) -> np.ndarray:
    """How much of each voxel is a white-matter hyperintensity of age, ``[N]``, 0 to 1.

    They begin as caps at the ventricles and grow: what is one at some age stays one.

    Args:
        rng: of the person.
        near: how near the ventricles each voxel is, 1 at their wall.
        white: the fraction of white matter in it.
        atlas_points: where it lies, see :class:`scripts.phantoms.anatomy.Anatomy`.
        aged: of the person.
    """
    field = sample_maps(smooth_fields(rng, 1, ((6.0, 0.15), (14.0, 0.1))), atlas_points)[0]
    threshold = 1.3 - 0.7 * aged
    return np.clip((near + field - threshold) / 0.3, 0, 1) * np.clip(2 * white - 0.5, 0, 1)
