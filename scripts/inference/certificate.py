"""Which deviations are significant: conformal p values from healthy people who were kept apart, and a certificate.

A p value is the share of calibration people, the scan itself counted among them, whose largest finding is at least as
large (Vovk et al. 2005). If a healthy scan is exchangeable with the people of its group, whatever the model, the chance
that any of its findings has p at most ``error_rate`` is at most that (Mondrian conformal prediction, of the maximum
over the scan: family-wise). Over scans the false discovery rate is bounded likewise (Bates et al. 2023). Where the
scans' covariates are distributed differently, people count by how much more frequent theirs are there (Tibshirani et
al. 2019).
"""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scripts.data.covariates import Categorical, CovariateCoding, Value
from scripts.utils.command_line import check_number
from scripts.utils.errors import InputError

CORRECTIONS = ("family", "discovery")
SETTINGS = ("error_rate", "correction", "calibration_people")  # in the record of results
SITE = "site"
FAMILIES = ("cluster", "region")
LEAST_SCANS = 10  # from which weights are estimated
MOST_WEIGHT = 20.0  # of a person, where 1 is one whose covariates are as frequent on both sides
APPROXIMATE = "Weights are estimated from covariates, so that the guarantee is approximate."


class Certificate:
    """P values by calibration people, and what is guaranteed of them.

    Args:
        coding: of the prior's covariates.
        error_rate: above 0 and below 1.
        correction: ``"family"``: of at most that share of healthy scans anything is significant. ``"discovery"``: at
            most that share of the scans with anything significant are healthy, in the mean.
        groups: names of the covariates by which people are compared with their like; None: the site and the first
            continuous one, as far as the prior has them. A continuous one has three bands, between the inner knots of
            its spline.
        weighted: compare with all people instead, who count by how much more frequent their covariates are among the
            scans than among them.

    Attributes:
        people: of the calibration, each with ``largest``, what is largest in it by kind, and ``covariates``.
        members: what is largest in the people of each group, and how much each counts.
        effective: how many people of equal weights would say as much; None without weights.
    """

    def __init__(
        self,
        coding: CovariateCoding,
        error_rate: float,
        correction: str = "family",
        groups: Any = None,
        weighted: bool = False,
    ) -> None:
        check_number("error_rate", error_rate, 1e-6, 0.5)
        if correction not in CORRECTIONS:
            raise InputError(f"correction is {correction!r}: set --correction to {' or '.join(CORRECTIONS)}.")
        if not isinstance(weighted, bool) or (weighted and (groups or correction != "family")):
            raise InputError(
                f"weighted is {weighted!r}: it must be True or False, and True goes with --correction family alone and "
                "with no --groups: all people are compared with."
            )
        if groups is None:
            continuous = [name for name, variable in coding.variables.items() if not isinstance(variable, Categorical)]
            groups = [] if weighted else [*([SITE] if SITE in coding.variables else []), *continuous[:1]]
        unknown = [name for name in groups if name not in coding.variables]
        if isinstance(groups, str) or unknown:
            raise InputError(f"groups is {groups!r}: give a list of some of the prior's {list(coding.variables)}.")
        self.coding, self.error_rate, self.correction, self.names = coding, error_rate, correction, list(groups)
        self.least = math.ceil(1 / error_rate - 1e-9) - 1  # people without whom nothing can be significant
        self.weighted, self.effective = weighted, None
        self.people: list[Mapping[str, Any]] = []
        self.members: dict[str, list[tuple[Mapping[str, float], float]]] = {}
        self._model: Any = None  # tells scans from people by their covariates

    def take(self, people: Sequence[Mapping[str, Any]], scans: Sequence[Mapping[str, Value]] = ()) -> None:
        """Take in the people of the calibration, see :attr:`people`, and the covariates of all scans that are to be
        judged, from which weights follow; refused are people who are too few for anything to be significant.
        """
        self.refuse_few(len(people))
        self.people, members = list(people), defaultdict(list)
        weights = self._weigh(scans) if self.weighted else [1.0] * len(people)
        for person, weight in zip(people, weights, strict=True):
            for name in self.groups_of(person["covariates"]):
                members[name].append((person["largest"], weight))
        self.members = dict(members)

    def refuse_few(self, people: int) -> None:
        if people < self.least:
            raise InputError(
                f"calibration: of {people} people the smallest p is {1 / (people + 1):.3g}; for an error_rate of "
                f"{self.error_rate:g} there must be {self.least} or more."
            )

    def _weigh(self, scans: Sequence[Mapping[str, Value]]) -> list[float]:
        """Weights of the people, by a logistic regression of scans against people on what covariates become."""
        if len(scans) < LEAST_SCANS:
            raise InputError(
                f"weighted: weights are estimated from the scans' covariates, of {LEAST_SCANS} scans or more; there "
                f"are {len(scans)}. Give more, or leave --weighted out."
            )
        from sklearn.linear_model import LogisticRegression  # only where there are weights: jobs start without it

        known = [person["covariates"] for person in self.people]
        x = torch.stack([self.coding.numbers(values) for values in (*known, *scans)]).numpy()
        self._model = LogisticRegression().fit(x, [0] * len(known) + [1] * len(scans))
        self._model.intercept_ += math.log(len(known) / len(scans))  # from odds to the ratio of densities
        weights, own = self._weights(known), self._weights(scans)
        self.effective = float(weights.sum() ** 2 / np.square(weights).sum())
        smallest = float(np.median(own / (own + weights.sum())))
        if self.effective < self.least or smallest > self.error_rate:
            raise InputError(
                f"weighted: the covariates of the scans are too rare among the {len(known)} people of the calibration, "
                f"who count as {self.effective:.3g}: for half of the scans no p can be below {smallest:.2g}. Add "
                "people like the scans to it."
            )
        return weights.tolist()

    def _weights(self, known: Sequence[Mapping[str, Value]]) -> np.ndarray:
        x = torch.stack([self.coding.numbers(values) for values in known]).numpy()
        return np.exp(np.minimum(self._model.decision_function(x), math.log(MOST_WEIGHT)))

    def weight(self, values: Mapping[str, Value]) -> float:
        """How much a scan counts beside the people."""
        return 1.0 if self._model is None else float(self._weights([values])[0])

    def groups_of(self, values: Mapping[str, Value]) -> list[str]:
        """The groups that a person belongs to, the narrowest first."""
        words = {name: self._word(name, values.get(name)) for name in self.names}
        categorical = [w for n, w in words.items() if isinstance(self.coding.variables[n], Categorical)]
        return list(dict.fromkeys([", ".join(words.values()) or "all", ", ".join(categorical) or "all", "all"]))

    def _word(self, name: str, value: Value) -> str:
        variable = self.coding.variables[name]
        if value is None or isinstance(variable, Categorical):
            return f"{name} {'n/a' if value is None else value}"
        low, high = (variable.knots[1], variable.knots[-2]) if variable.knots else (variable.mean,) * 2
        if value < low:
            return f"{name} below {low:.4g}"
        return f"{name} {low:.4g} to {high:.4g}" if value < high else f"{name} from {high:.4g}"

    def group(self, values: Mapping[str, Value]) -> str:
        """The narrowest group of a scan in which there are enough people of the calibration."""
        return next((g for g in self.groups_of(values) if len(self.members.get(g, ())) >= self.least), "all")

    def p(self, group: str, kind: str, size: float, weight: float = 1.0) -> float:
        """The share of a group's people, the scan among them, whose largest finding of this kind is as large; by the
        weight of the scan, see :meth:`weight`.
        """
        people = self.members[group]
        larger = sum(w for largest, w in people if largest[kind] >= size)
        return (weight + larger) / (weight + sum(w for _, w in people))

    def settings(self) -> dict[str, Any]:
        """On which p values and what is significant depend."""
        return dict(zip(SETTINGS, (self.error_rate, self.correction, self.digest()), strict=True))

    def digest(self) -> str:
        """What tells this calibration from others."""
        return f"{zlib.crc32(json.dumps(self.members, sort_keys=True).encode()):08x}"

    def content(self, scans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What the certificate says, by ``group``, ``smallest_p`` and ``findings`` of each scan."""
        rows = {}
        for group in sorted({scan["group"] for scan in scans.values()}):
            judged = [scan for scan in scans.values() if scan["group"] == group]
            people = len(self.members[group])
            share = math.floor(self.error_rate * (people + 1) + 1e-9) / (people + 1)
            rows[group] = {
                "people": people,
                "scans": len(judged),
                "smallest_p": min(scan["smallest_p"] for scan in judged),
                "expected": (self.error_rate if self.weighted else share) * len(judged),
                "observed": sum(any(f["significant"] == "yes" for f in scan["findings"]) for scan in judged),
            }
        families = {
            kind: sum(
                any(f["kind"] == kind and f["significant"] == "yes" for f in scan["findings"])
                for scan in scans.values()
            )
            for kind in FAMILIES
        }
        weights = {} if self.effective is None else {"effective_people": self.effective, "weights": APPROXIMATE}
        return {
            "people": len(self.people),
            **weights,
            "groups": rows,
            "scans": len(scans),
            "expected": sum(row["expected"] for row in rows.values()),
            "observed": families,
            "smallest_p": min((row["smallest_p"] for row in rows.values()), default=1 / (1 + len(self.people))),
            "error_rate": self.error_rate,
            "correction": self.correction,
            "calibration": self.digest(),
            "guarantee": self.sentence(),
        }

    def sentence(self) -> str:
        """What is promised."""
        rate, like = f"{100 * self.error_rate:.3g} %", f"healthy people like the {len(self.people)} of the calibration"
        if self.correction == "discovery":
            return f"Of scans with a significant cluster at most {rate} are of {like}; likewise with a region."
        counted = "" if self.effective is None else f" These count as {self.effective:.4g}. {APPROXIMATE}"
        return f"Of {like} at most {rate} have a significant cluster; likewise a region.{counted}"


def discovery_level(p: Sequence[float], rate: float) -> float:
    """Up to which p scans are discoveries, by Benjamini and Hochberg, given the smallest p of each scan."""
    if not len(p):
        return 0.0
    ordered, limits = np.sort(p), rate * np.arange(1, len(p) + 1) / len(p)
    passed = np.flatnonzero(ordered <= limits * (1 + 1e-9))  # a p at its limit passes, however both are rounded
    return float(max(ordered[passed[-1]], limits[passed[-1]])) if len(passed) else 0.0
