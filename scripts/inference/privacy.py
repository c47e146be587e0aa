"""What a model gives away of the people whom it was trained on, and what evaluation knows of scans beside it."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from scripts.data.datalist import check_sides, list_sides
from scripts.inference.engine import ReadOrFail, ScanEvaluator, read_item
from scripts.inference.measures import distance_ratio, membership, nearest_training
from scripts.utils.distributed import shared_out
from scripts.utils.errors import InputError
from scripts.utils.files import write_csv, write_text
from scripts.utils.names import item_path
from scripts.utils.report import write_report
from torch import Tensor

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Scans as the network sees them, and what is measured of each.

    Attributes:
        items: of the data set, those that could be read.
        images: ``[scans, channels, *spatial]``.
        numbers: see :class:`scripts.inference.scoring.Scoring`.
        places: of these scans among all that were to be measured.
    """

    items: list[dict[str, Any]]
    images: Tensor
    numbers: list[dict[str, float]]
    places: list[int]

    def column(self, name: str) -> list[float]:
        """A number of all scans."""
        return [row[name] for row in self.numbers]


def measure(scoring: ScanEvaluator, what: str) -> Measured | None:
    """Score scans without writing anything; those that can't be read are left out, with a warning.

    All processes take part, and have all images in the end: 0.13 MB each at 32³, 8.4 MB at 128³.

    Args:
        scoring: see :func:`scripts.inference.jobs.score`.
        what: the bar of progress says.

    Returns:
        None where there is no scan.
    """
    items, (low, high) = scoring.dataset.data, scoring.common.value_range

    def score(places: Sequence[int]) -> list[tuple[Tensor, dict[str, float]] | str]:
        read = [*ReadOrFail(scoring.dataset, places)]
        good = [item for item in read if isinstance(item, dict)]
        results = scoring.compute(good) if good else {}
        columns = {name: values.tolist() for name, values in results.items() if values.ndim == 1}
        rows = iter([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        return [
            (item["image"].as_tensor().float().clamp(low, high), next(rows)) if isinstance(item, dict) else item.reason
            for item in read
        ]

    found = shared_out(len(items), scoring.common.loading["batch_size"], score, what)
    refused = [place for place, one in enumerate(found) if isinstance(one, str)]
    if refused and idist.get_rank() == 0:
        first = refused[0]
        logger.warning(
            "%s: %d scan(s) can't be read and are left out, such as '%s': %s.",
            *(what, len(refused), item_path(items[first]), found[first]),
        )
    kept = [place for place, one in enumerate(found) if not isinstance(one, str)]
    if not kept:
        return None
    images, numbers = zip(*(found[place] for place in kept), strict=True)
    return Measured([items[place] for place in kept], torch.stack(images), list(numbers), kept)


def draw_samples(sampling: ScanEvaluator) -> Tensor:
    """The samples of :func:`scripts.inference.jobs.sample`, without writing them, ``[samples, channels, *spatial]``."""

    def draw(numbers: Sequence[int]) -> list[Tensor]:
        drawn = sampling.compute([read_item(sampling.dataset, number) for number in numbers])["sample"]
        return list(drawn.float().cpu())

    count, batch_size = len(sampling.dataset.data), sampling.common.loading["batch_size"]
    return torch.stack(shared_out(count, batch_size, draw, "drawing samples"))


def one_per_subject(items: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Indices of at most so many scans, chosen at random, no two of one subject, whose scans are alike."""
    generator, subjects, chosen = random.Random(seed), set(), []
    for index in generator.sample(range(len(items)), len(items)):
        subject = items[index].get("subject") or f"scan {index}"
        if subject not in subjects and len(chosen) < count:
            chosen.append(index)
        subjects.add(subject)
    return sorted(chosen)


def membership_numbers(training: Measured | None, held_out: Measured, seed: int = 0) -> dict[str, float | None]:
    """See :func:`scripts.inference.measures.membership`: under the network's prior, and under the population prior."""
    people = one_per_subject(held_out.items, len(held_out.items), seed)
    found = {}
    for name, column in (("membership", "bits_per_dim"), ("membership_population", "bits_per_dim_population")):
        if column in held_out.numbers[0]:
            trained = [] if training is None else training.column(column)
            values = held_out.column(column)
            found |= membership(trained, [values[place] for place in people], name)
    return found


def privacy_sides(
    dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str], most: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """One scan each of people who were trained on, at most so many, and of people who were not."""
    sides, _, _ = list_sides(dataset_dir, scan_pattern)
    check_sides(sides, dataset_dir)
    training, held_out = sides.get("training", []), [*sides.get("validation", []), *sides.get("testing", [])]
    if not training or not held_out:
        raise InputError(
            f"dataset_dir '{dataset_dir}' does not say which scans were trained on and which were not: set --run_dir "
            "to a training run, without --dataset_dir, or --dataset_dir to a datalist with 'training' and 'validation' "
            "(or 'testing')."
        )
    return tuple([side[at] for at in one_per_subject(side, most, seed)] for side in (training, held_out))


class Privacy:
    """Writes ``privacy.json`` and ``privacy.csv``: can training people be told from others, are samples copies?

    Args:
        training, held_out: jobs that score scans which were trained on, and scans which were not.
        sampling: a job that draws samples.
        output_dir: of the files.
    """

    def __init__(
        self, training: ScanEvaluator, held_out: ScanEvaluator, sampling: ScanEvaluator, output_dir: str | os.PathLike
    ) -> None:
        self.training, self.held_out, self.sampling, self.output_dir = training, held_out, sampling, Path(output_dir)

    def run(self) -> None:
        """Score, draw, compare, and say what was found."""
        training = measure(self.training, "scoring training scans")
        held_out = measure(self.held_out, "scoring held-out scans")
        if training is None or held_out is None:
            raise InputError("No training scan, or no held-out scan, can be read: the warnings say why.")
        samples = draw_samples(self.sampling)
        if idist.get_rank() > 0:
            return
        common = self.training.common
        rows, nearest = [], []
        names = [Path(item["image"]).name for item in self.sampling.dataset.data]
        for kind, images, of in (
            ("sample", samples, names),
            ("held-out scan", held_out.images, [item_path(item) for item in held_out.items]),
        ):
            distances, places = nearest_training(images, training.images)
            nearest.append(distances)
            rows += [
                (kind, name, item_path(training.items[place]), f"{distance:.6g}")
                for name, place, distance in zip(of, places.tolist(), distances.tolist(), strict=True)
            ]
        numbers = {"training_scans": len(training.items), "held_out_scans": len(held_out.items)}
        numbers |= {"samples": len(samples), **membership_numbers(training, held_out, common.seed)}
        ratio = numbers["nearest_training_ratio"] = distance_ratio(*nearest)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(self.output_dir / "privacy.csv", ("kind", "image", "nearest_training", "distance"), rows)
        write_text(self.output_dir / "privacy.json", json.dumps(numbers, indent=2) + "\n")
        lead = f"{len(samples)} sample(s) beside {len(training.items)} scans that were trained on."
        table = self.output_dir / "privacy.csv"
        write_report(self.output_dir, "Results of privacy", lead, [table], settings=numbers, name="report_privacy.html")
        logger.info(
            "A scan that was trained on is likelier than a held-out one in %.1f %% of pairs (95 %% interval %.1f to "
            "%.1f; 50: the model keeps nothing of single people), by %.4f bits per dim in the mean. Samples lie at "
            "%s of the distance from their nearest training scan that held-out scans have from theirs (copies: far "
            "below 1). Results: '%s'.",
            *(100 * numbers[f"membership_{name}"] for name in ("auroc", "auroc_low", "auroc_high")),
            *(numbers["membership_gap"], "an unknown share" if ratio is None else f"{ratio:.2f}"),
            self.output_dir / "privacy.json",
        )
