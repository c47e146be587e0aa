"""What is lost when sites share sums instead of scans, and what the sums tell of who was among them.

    python -m benchmarks.cohorts --ckpt models/model_phantoms_32.pt --dataset_dir D --output_dir OUT

``D`` holds a folder for each site. Two thirds of each site's people are given to the fit, the others are kept apart.
Every scan is encoded once. Prints a Markdown table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.common import print_table, read_config
from scripts.data.covariate_tables import CohortCovariates, Covariates
from scripts.data.covariates import CovariateCoding
from scripts.data.datalist import list_sides
from scripts.layers.gaussian import Posterior
from scripts.networks import VDVAE
from scripts.population.fit import PopulationFit, ScanVectors, shifts_and_ratios
from scripts.population.merging import _Fitted, merge, total, with_sites
from scripts.population.prior import PopulationPrior, innovation
from scripts.population.statistics import CohortStatistics, StatisticsFit
from scripts.utils.command_line import run

KINDS = {"age": "continuous", "sex": "categorical"}
KEPT_APART = 3  # every third person
Rows = list[tuple[str, str]]


class Encoded(StatisticsFit):
    """A fit to scans that were encoded before: an image of the data set is a scan's number."""

    encoded: Sequence[ScanVectors] = ()

    def _vectors(self, dataset: Any, *_: Any, **settings: Any) -> Iterator[ScanVectors]:
        for item in (dataset[place] for place in range(len(dataset))):
            vectors = self.encoded[int(item["image"])]
            kept = {index: vectors.posteriors[index] for index in self.latents}
            yield vectors._replace(posteriors=kept, features=item["features"][None])

    def _squared_deviations(self, *_: Any) -> tuple[Tensor, Tensor]:
        """Not measured here: it decodes."""
        return torch.zeros(2), torch.zeros(2)


def encode(network: VDVAE, preprocess: Any, paths: Sequence[str], path: Path) -> list[ScanVectors]:
    """Each scan's u, t and r, as posteriors whose prior is N(0, I)."""
    scans = Dataset([{"image": name} for name in paths], preprocess)
    fit = PopulationFit(network, scans, Dataset([]), path, 1, batch_size=4)
    fit._plan()
    found = []
    for vectors in fit._vectors(fit.training, "encoding"):
        for place in range(len(vectors.scans)):
            one = {i: Posterior(*(v if v is None else v[[place]] for v in q)) for i, q in vectors.posteriors.items()}
            plain = {
                i: Posterior(
                    innovation(q),
                    innovation(q._replace(z=q.mean)),
                    q.std if q.prior_std is None else q.std / q.prior_std,
                )
                for i, q in one.items()
            }
            found.append(ScanVectors(plain, vectors.bits_per_dim[[place]], torch.zeros(1, 0), torch.zeros(1, 1)))
    return found


def interval(members: Sequence[float], others: Sequence[float]) -> str:
    """The area under the curve of members against others, with its interval over 1,000 resamplings."""
    rng = np.random.default_rng(0)
    members, others = np.array(members), np.array(others)

    def area(a: np.ndarray, b: np.ndarray) -> float:
        return roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a, b]))

    drawn = [area(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{area(members, others):.2f} ({low:.2f} to {high:.2f})"


class Cohorts:
    """The sites of a folder, each scan encoded once, a part of the people kept apart."""

    def __init__(self, ckpt: str, dataset_dir: str, output_dir: str, sites: Sequence[str] | None, factors: int) -> None:
        config = read_config("configs/inference.json", ckpt=ckpt, bundle_root=".", device=torch.device("cpu"))
        self.network, self.folder, self.factors = config.get_parsed_content("network").eval(), Path(output_dir), factors
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values, self.members, self.apart, paths = [], {}, {}, []
        for site in sites or sorted(path.name for path in Path(dataset_dir).iterdir() if path.is_dir()):
            items = list_sides(Path(dataset_dir) / site, "*.nii*")[0]["training"]
            places = range(len(paths), len(paths) + len(items))
            rows = Covariates(items, Path(dataset_dir) / site)
            self.values += rows.values(rows.learn(KINDS))
            paths += [item["image"] for item in items]
            self.apart[site] = [place for place in places if place % KEPT_APART == 0]
            self.members[site] = [place for place in places if place % KEPT_APART]
        with torch.no_grad():
            Encoded.encoded = encode(
                self.network, config.get_parsed_content("preprocessing"), paths, self.folder / "x.pt"
            )

    def statistics(self, people: Sequence[int], name: str) -> CohortStatistics:
        """The file of some people, as it is read."""
        values = [self.values[place] for place in people]
        covariates = CohortCovariates.coded(CovariateCoding.learn(KINDS, values), values, [])
        path = self.folder / f"{name}.pt"
        scans = Dataset([{"image": torch.tensor(float(place))} for place in people])
        Encoded(
            self.network, scans, Dataset([]), path, self.factors, batch_size=1, covariates=covariates, kinds=KINDS
        ).run()
        return CohortStatistics.load(path)

    def gains(self, prior: PopulationPrior, people: Sequence[int], site: str | None = None) -> list[float]:
        """Nats that a prior gains on each of some people."""
        found = []
        for place in people:
            u = {index: innovation(q) for index, q in Encoded.encoded[place].posteriors.items()}
            values = self.values[place] | ({} if site is None else {"site": site})
            features = None if prior.coding is None else prior.coding.numbers(values)[None]
            found.append(prior.log_ratio(u, features).item())
        return found

    def shifts(self, people: Sequence[int], latents: Sequence[int]) -> Tensor:
        """The t of some people, ``[people, dimensions]``."""
        kept = [[Encoded.encoded[place].posteriors[index] for index in latents] for place in people]
        return torch.cat([shifts_and_ratios(q)[0] for q in kept])


def mean_of(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values) / len(values) ** 0.5:.1f}"


def exactness(union: CohortStatistics, pooled: CohortStatistics) -> Rows:
    """How far sums over sites are from those of all people, and the directions."""
    order = [pooled.columns.index(name) for name in union.columns if not name.startswith("site=")]
    mine = [place for place, name in enumerate(union.columns) if not name.startswith("site=")]

    def apart(a: Tensor, b: Tensor) -> str:
        return f"{((a - b).abs().max() / b.abs().max()).item():.1e}"

    return [
        (
            "largest difference of sums over the largest sum: covariates",
            apart(union.gram[mine][:, mine], pooled.gram[order][:, order]),
        ),
        ("covariates times shifts", apart(union.moments[mine], pooled.moments[order])),
        (
            "squares of shifts; of ratios",
            f"{apart(union.squares, pooled.squares)}; {apart(union.ratios, pooled.ratios)}",
        ),
    ]


def measure(
    ckpt: str,
    dataset_dir: str,
    output_dir: str = "output/cohorts",
    sites: Sequence[str] | None = None,
    factors: int = 64,
) -> None:
    """Measure all, and print a table."""
    cohorts = Cohorts(ckpt, dataset_dir, output_dir, sites, factors)
    parts = {site: cohorts.statistics(people, site) for site, people in cohorts.members.items()}
    everyone = [place for people in cohorts.members.values() for place in people]
    pooled = cohorts.statistics(everyone, "pooled")
    latents = sorted(set.intersection(*(set(part.grids) for part in (*parts.values(), pooled))))
    named = {site: part.of_latents(latents) for site, part in with_sites(parts).items()}
    pooled = pooled.of_latents(latents)
    prior, left_out, chosen = merge({site: part.of_latents(latents) for site, part in parts.items()})
    rank, shrinkage = prior.factors, chosen["shrinkage"]
    rows: Rows = [
        (f"{site}: people given, kept apart", f"{len(cohorts.members[site])}, {len(cohorts.apart[site])}")
        for site in parts
    ]
    rows += exactness(total(list(named.values())), pooled)
    rows.append(("factors, shrinkage", f"{rank}, {shrinkage}"))
    # the merged prior without site effects beside the same fit to the people together
    plain, alone = _Fitted.to([part.of_latents(latents) for part in parts.values()]), _Fitted.to([pooled])
    axes = [torch.linalg.qr(fitted.sketch.basis[:rank].T)[0] for fitted in (plain, alone)]
    cosines = torch.linalg.svdvals(axes[0].T @ axes[1]).clamp(max=1)
    degrees = torch.rad2deg(cosines.acos())
    rows.append(
        (
            "angles between their factors and the pooled: median, largest",
            f"{degrees.median():.1f}°, {degrees.max():.1f}°",
        )
    )
    people = [(site, place) for site, places in cohorts.apart.items() for place in places]
    for words, other in (
        ("merged, without the site", plain.prior(rank, shrinkage)),
        ("pooled", alone.prior(rank, shrinkage)),
        ("merged, with the site", prior),
    ):
        found = [cohorts.gains(other, [place], site)[0] for site, place in people]
        bits = np.mean(found) / math.log(2) / math.prod(cohorts.network.spatial_shape)
        rows.append((f"people kept apart: nats gained each, {words}", f"{mean_of(found)} ({bits:.5f} bits per dim)"))
    for site, part in parts.items():
        own = merge({site: part.of_latents(latents)})[0]
        found = cohorts.gains(own, cohorts.apart[site])
        rows.append((f"{site}'s people kept apart: under {site}'s own prior", mean_of(found)))
        rows.append(("under the merged one", mean_of(cohorts.gains(prior, cohorts.apart[site], site))))
        others = _Fitted.to([p for name, p in named.items() if name != site]).prior(rank, shrinkage)
        rows.append(
            (
                "under the others', by sums; by scans",
                f"{left_out[site].gain:.1f}; {mean_of(cohorts.gains(others, cohorts.members[site]))}",
            )
        )
        rows += membership(
            cohorts, site, part.of_latents(latents), prior, _Fitted.to([p for name, p in named.items() if name != site])
        )
    print_table(("measure", "found"), rows)


def membership(cohorts: Cohorts, site: str, part: CohortStatistics, prior: PopulationPrior, others: _Fitted) -> Rows:
    """Was a person among those of a site? By the file's mean, by its directions, by the merged prior."""
    both = cohorts.members[site], cohorts.apart[site]
    shifts = [cohorts.shifts(people, list(part.grids)) for people in both]
    away = part.moments[part.columns.index("")] / part.count - others.sketch.mean
    basis = torch.nn.functional.normalize(part.rows[:-1])
    centre = part.moments[part.columns.index("")] / part.count
    of_mean = [((t - others.sketch.mean) @ away).tolist() for t in shifts]
    of_rows = [(((t - centre) @ basis.T).square().sum(1) / (t - centre).square().sum(1)).tolist() for t in shifts]
    of_prior = [cohorts.gains(prior, people, site) for people in both]
    return [
        (f"was a person in {site}'s file? AUROC (95 %) by its mean", interval(*of_mean)),
        ("by its directions", interval(*of_rows)),
        ("by the merged prior alone", interval(*of_prior)),
    ]


if __name__ == "__main__":
    run("python -m benchmarks.cohorts", measure)
