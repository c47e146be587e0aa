"""Put together what hospitals tell of their cohorts, without a scan, as the population prior of all of them.

    python -m scripts.merge_priors A/statistics.pt B/statistics.pt C/statistics.pt --output DIR/population_prior.pt

Each file is written at its site by ``fit_prior --statistics_only True``. Their order does not matter, and a site is
taken out again by leaving its file out. ``--describe True`` prints what each file holds, and merges nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path

from scripts.utils.command_line import run
from scripts.utils.errors import InputError
from scripts.utils.files import absolute, as_folder, expand, write_csv

logger = logging.getLogger(__name__)

REPORT = "left_out.csv"


def merge_priors(*files: str, output: str | Path = "population_prior.pt", describe: bool | str = False) -> None:
    """The population prior of the union of cohorts, and what the prior of all others says of each of them.

    Args:
        files: ``statistics.pt`` of each cohort. One is called after its folder, another name after itself.
        output: the prior; ``left_out.csv`` is written beside it.
        describe: print what the files hold, and merge nothing.
    """
    from scripts.population.files import save_prior
    from scripts.population.merging import merge, refuse_shared_people
    from scripts.population.statistics import CohortStatistics

    if isinstance(describe, str):  # --describe before the files takes the first of them
        files, describe = (describe, *files), True
    if not files:
        raise InputError("name the statistics.pt of one cohort or more.")
    cohorts: dict[str, CohortStatistics] = {}
    for path in map(Path, files):
        name = absolute(path).parent.name if path.stem == "statistics" else path.stem
        if name in cohorts:
            raise InputError(f"two files are of a cohort '{name}', after their folder or their name: rename one.")
        cohorts[name] = CohortStatistics.load(path)
        if describe:
            print(f"'{path}':", *cohorts[name].described(), sep="\n  ")
    if describe:
        return
    refuse_shared_people(cohorts)
    folder = as_folder("output", Path(expand(output)).parent)
    prior, left_out, chosen = merge(cohorts)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(cohorts.values()))
    extras = {"scans": sum(c.count for c in cohorts.values()), "weights": first.weights, **chosen}
    extras["cohorts"] = {name: cohorts[name].count for name in sorted(cohorts)}

    save_prior(prior, expand(output), extras)
    rows = [(name, c.people, f"{c.gain:.1f}", f"{c.mean:.3f}", f"{c.spread:.3f}") for name, c in left_out.items()]
    write_csv(folder / REPORT, ("cohort", "people", "nats_gained", "coordinates_mean", "coordinates_spread"), rows)
    for row in rows:
        logger.info(
            "%s, %d people, under the prior of all others: %s nats gained each, coordinates %s standard deviations "
            "off, spread %s.",
            *row,
        )
    people = sum(c.people for c in cohorts.values())
    logger.info("Population prior of %d factors and %d people: '%s'.", prior.factors, people, output)


if __name__ == "__main__":
    run("python -m scripts.merge_priors", merge_priors)
