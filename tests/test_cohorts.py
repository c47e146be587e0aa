"""Cohorts that add up: sums of several sites, which no scan leaves, become the prior of all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import informative_network, run_bundle, run_command
from monai.data import Dataset

from scripts.data.covariate_tables import CohortCovariates
from scripts.data.covariates import CovariateCoding
from scripts.networks import VDVAE
from scripts.population.familiarity import Familiarity, look
from scripts.population.files import load_prior, save_prior
from scripts.population.merging import _Fitted, _known, _pooled_coding, expectation, merge, refuse_shared_people, total
from scripts.population.prior import innovation
from scripts.population.statistics import (
    CohortStatistics,
    StatisticsFit,
    coefficients,
    independent,
    most_leverage,
    raw_numbers,
)
from scripts.training.checkpoints import CheckpointError

KINDS = {"age": "continuous", "sex": "categorical"}
SITES = {"A": range(0, 24), "B": range(24, 50), "C": range(50, 72)}
INFERENCE = ["configs/inference.json", "tests/tiny.json"]


@pytest.fixture(scope="module")
def network() -> VDVAE:
    torch.manual_seed(0)
    return VDVAE(3, 1, [4, 6, 8], [1, 1, 1], [2, 3, 8], [3, 3, 2], spatial_shape=[8, 8, 8], init="informative").eval()


def person(index: int) -> dict:
    return {"age": 30.0 + (index * 7) % 50, "sex": "FM"[index % 2]}


def scan(index: int) -> dict:
    """A person's scan: what age and three factors make of it, and noise."""
    own = torch.Generator().manual_seed(index)
    shapes = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1000))
    weights = torch.cat([torch.tensor([person(index)["age"] / 25 - 2]), torch.randn(3, generator=own)])
    image = torch.einsum("k,k...->...", weights, shapes) * 0.2 + 0.05 * torch.randn(1, 8, 8, 8, generator=own)
    return {"image": image.clamp(-1, 1)}


def statistics_of(network, people, path, **settings) -> CohortStatistics:
    values = [person(index) for index in people]
    covariates = CohortCovariates.coded(CovariateCoding.learn(KINDS, values), values, [])
    StatisticsFit(
        *(network, Dataset([scan(index) for index in people]), Dataset([]), path, 4),
        **{"covariates": covariates, "kinds": KINDS, "batch_size": 5, **settings},
    ).run()
    return CohortStatistics.load(path)


@pytest.fixture(scope="module")
def cohorts(network, tmp_path_factory) -> dict[str, CohortStatistics]:
    folder = tmp_path_factory.mktemp("sites")
    return {site: statistics_of(network, people, folder / f"{site}.pt") for site, people in SITES.items()}


@pytest.fixture(scope="module")
def pooled(network, tmp_path_factory) -> CohortStatistics:
    return statistics_of(network, range(72), tmp_path_factory.mktemp("pooled") / "all.pt")


def test_what_is_a_sum_is_that_of_the_pooled_cohort(cohorts, pooled):
    union = total(list(cohorts.values()))
    assert union.count == pooled.count == 72 and union.columns == sorted(pooled.columns)
    order = [pooled.columns.index(name) for name in union.columns]
    torch.testing.assert_close(union.gram, pooled.gram[order][:, order], rtol=1e-12, atol=0)
    shared = pooled.of_latents(list(union.grids))
    for name in ("squares", "ratios"):
        torch.testing.assert_close(getattr(union, name), getattr(shared, name), rtol=1e-6, atol=1e-6)
    scale = shared.moments.abs().amax(1, keepdim=True)
    torch.testing.assert_close(union.moments / scale, shared.moments[order] / scale, rtol=0, atol=1e-6)


def test_the_merged_prior_is_nearly_that_of_the_pooled_cohort(cohorts, pooled):
    merged, alone = _Fitted.to(list(cohorts.values())), _Fitted.to([pooled.of_latents(list(cohorts["A"].grids))])
    torch.testing.assert_close(merged.effects, alone.effects, rtol=1e-3, atol=1e-5)
    axes = [torch.nn.functional.normalize(fitted.sketch.basis[:3]) for fitted in (merged, alone)]
    assert torch.linalg.svdvals(axes[0] @ axes[1].T).min() > 0.95  # cosine of the largest angle between the factors
    people = [fitted.prior(3, 0.5) for fitted in (merged, alone)]
    gains = [expectation(prior, pooled).gain for prior in people]
    assert gains[0] == pytest.approx(gains[1], abs=0.02 * abs(gains[1]))


def test_expectation_is_the_mean_likelihood_of_the_people(network, cohorts, pooled):
    prior = _Fitted.to([cohorts["A"], cohorts["B"]]).prior(3, 0.5)
    people = SITES["C"]
    gains = []
    for index in people:
        posteriors = network.infer(scan(index)["image"][None], 1.0)[1]
        u = [innovation(q) for q in posteriors]
        gains.append(prior.log_ratio(u, prior.coding.numbers(person(index))[None]).item())
    found = expectation(prior, cohorts["C"])
    assert found.people == len(people)
    standard_error = torch.tensor(gains).std().item() / len(people) ** 0.5
    assert found.gain == pytest.approx(sum(gains) / len(people), abs=3 * standard_error)
    assert found.mean < 1 and 0.7 < found.spread < 1.4


def test_order_does_not_matter_and_a_site_can_be_taken_out(cohorts):
    there, left_out, _ = merge(cohorts)
    back = merge(dict(reversed(cohorts.items())))[0]
    assert all(torch.equal(a, b) for a, b in zip(there.buffers(), back.buffers(), strict=True))
    assert set(left_out) == {"A", "B", "C"} and left_out["A"].people == 24
    assert there.coding.variables["site"].categories == ("A", "B", "C")
    assert len(there.bits_per_dim) == len(there.distances) == sum(len(people[::5]) for people in SITES.values())
    without = merge({name: cohorts[name] for name in ("A", "B")})[0]
    assert without.coding.variables["site"].categories == ("A", "B")


@torch.no_grad()
def test_a_merged_prior_says_which_scans_are_usual(network, cohorts, tmp_path):
    """Each cohort is a kind of its own, by what it tells of its held-out people but their coordinates."""
    save_prior(merge(cohorts)[0], tmp_path / "prior.pt")
    prior = load_prior(torch.load(tmp_path / "prior.pt", weights_only=True))
    known = Familiarity.of(prior)
    assert "population" not in known.names and len(known.added) == 2 and known.people == (6, 26)
    people = torch.stack([scan(index)["image"] for index in range(100, 120)])
    usual, strange = (look(network, scans, prior).statistics for scans in (people, people.sign()))
    assert (known.unfamiliarity(usual) > 1).sum() <= 1 and known.alike(usual).sum() >= 19
    assert (known.unfamiliarity(strange) > 1).all()
    assert "what is familiar: mean and covariance of " in "\n".join(cohorts["A"].described())
    few = replace(cohorts["A"], calibration={**cohorts["A"].calibration, "familiarity": []})
    assert len(Familiarity.of(merge({**cohorts, "A": few})[0]).added) == 1


def test_samples_of_a_merged_prior_have_the_ages_of_its_people(cohorts):
    age = merge(cohorts)[0].coding.variables["age"]
    ages = torch.tensor([person(index)["age"] for index in range(72)])
    drawn = torch.tensor([age.quantile(share / 100) for share in range(101)])
    assert drawn.mean().item() == pytest.approx(ages.mean().item(), abs=1)
    assert drawn.std().item() == pytest.approx(ages.std().item(), rel=0.15)


def test_columns_become_the_features_of_any_coding(pooled):
    coding = _Fitted.to([pooled]).coding
    values = [person(3), {"age": 71.0, "sex": None}, {"age": None, "sex": "M"}, {}]
    like = CovariateCoding.learn({"age": [20, 40, 60, 80], "sex": "categorical"}, [person(i) for i in range(72)])
    columns = torch.tensor([list(raw_numbers(like, known).values()) for known in values], dtype=torch.float64)
    some = replace(pooled, columns=list(raw_numbers(like, {})), gram=columns.T @ columns)
    assert _known(some, coding).tolist() == [[2, 1], [1, 2]]
    for known in values:
        columns = torch.tensor(list(raw_numbers(like, known).values()), dtype=torch.float64)
        features = columns @ coefficients(coding, list(raw_numbers(like, known)))
        torch.testing.assert_close(features.float(), coding.numbers(known), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(like.numbers(known), coding.numbers(known), rtol=1e-4, atol=1e-4)


def test_people_of_one_age_have_a_coding_whatever_rounding_leaves(pooled):
    """The mean square of ten 64.7 is less than the square of their mean, and their standard deviation is not 0."""
    kinds, person = {"age": [20, 50, 80]}, {"age": 64.7}
    own = CovariateCoding.learn(kinds, [person] * 10)
    numbers = raw_numbers(own, person)
    design = torch.tensor([list(numbers.values())] * 10, dtype=torch.float64)
    about = {"variables": kinds, "ranges": {"age": (60.0, 65.0)}, "columns": list(numbers)}
    union = _pooled_coding(replace(pooled, **about, gram=design.T @ design))
    assert own.variables["age"].std == union.variables["age"].std == 1.0
    assert own.parse({"age": 65}) == {"age": 65}


def test_columns_that_follow_from_others_are_left_out():
    design = torch.tensor([[1.0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.float64)
    kept, combination = independent(design.T @ design)
    assert kept == [0, 1]
    torch.testing.assert_close(design[:, kept] @ combination.T, design)


def test_what_would_tell_one_person_is_left_out(network, tmp_path, caplog):
    values = [{"age": 50.0 + i, "sex": "M" if i == 3 else "F"} for i in range(12)]
    covariates = CohortCovariates.coded(CovariateCoding.learn(KINDS, values), values, [])
    found = statistics_of(network, range(12), tmp_path / "s.pt", covariates=covariates)
    assert "sex" not in found.variables and not [c for c in found.columns if "sex" in c]
    assert "one person would have 100 % of what the sums say of sex" in caplog.text
    with pytest.raises(ValueError, match="a cohort needs 10 people or more"):
        statistics_of(network, range(9), tmp_path / "few.pt", covariates=None)


def test_files_that_do_not_belong_together_are_refused(cohorts, tmp_path):
    path = tmp_path / "B.pt"
    other = CohortStatistics(**{**vars(cohorts["B"]), "weights": "another"})
    with pytest.raises(ValueError, match=r"different weights .* with the same --ckpt at each site"):
        total([cohorts["A"], other])
    other = CohortStatistics(**{**vars(cohorts["B"]), "variables": {"age": [1, 2, 3]}})
    with pytest.raises(ValueError, match=r"age has the knots or the kind \[1, 2, 3\] in one file"):
        total([cohorts["A"], other])
    apart = {index: cohorts["A"].of_latents([index]) for index in cohorts["A"].grids}
    refuse_shared_people(apart)  # nothing says that their people are the same
    with pytest.raises(ValueError, match="no latent in common"):
        total(list(apart.values()))
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        CohortStatistics.load(path)
    torch.save({"statistics": 1, "count": 3}, path)
    with pytest.raises(CheckpointError, match="is damaged: take it from where it was made"):
        CohortStatistics.load(path)


def test_a_persons_scans_are_one_person(network, tmp_path):
    """Twelve scans of six people are fewer than ten people; what two scans of one person say alone is one person's."""
    items = [{**scan(index), "subject": f"sub-{index // 2}"} for index in range(12)]
    with pytest.raises(ValueError, match=r"statistics of 12 scan\(s\) of 6 people would tell too much of each"):
        StatisticsFit(network, Dataset(items), Dataset([]), tmp_path / "x.pt", 2)
    items = [{**scan(index), "subject": f"sub-{index // 2}"} for index in range(32)]
    fit = StatisticsFit(network, Dataset(items[:24]), Dataset(items[24:]), tmp_path / "x.pt", 10, covariates=None)
    fit.run()
    found = CohortStatistics.load(tmp_path / "x.pt")
    assert found.described()[0].startswith("24 scans of 12 people: ") and len(found.rows) == 12 // 2 + 1
    assert found.calibration["familiarity"] == []  # eight held-out scans are of four people
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    del content["people"]
    torch.save(content | {"statistics": 1}, tmp_path / "x.pt")
    assert CohortStatistics.load(tmp_path / "x.pt").people == 24
    only_man = torch.tensor([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 2)
    assert most_leverage(only_man, [[row] for row in range(12)]) == pytest.approx(0.5)
    assert most_leverage(only_man, [*([row] for row in range(10)), [10, 11]]) == pytest.approx(1.0)


def test_sites_merge_as_users_type_it(cohort, tmp_path):
    from scripts.phantoms import make_brains

    files = []
    for site in "AB":
        make_brains(tmp_path / site, 12, spacing=8.0, workers=1, seed=ord(site), covariates=True, site=site)
        words = ("--dataset_dir", tmp_path / site, "--output_dir", tmp_path / "out" / site, "--ckpt", tmp_path / "m.pt")
        if not files:
            torch.save(informative_network(cohort).state_dict(), tmp_path / "m.pt")
        words = (*words, "--statistics_only", True, "--covariates", str({**KINDS, "site": "categorical"}))
        done = run_bundle(*words, "--prior_factors", 2, run_id="fit_prior", configs=INFERENCE)
        assert done.returncode == 0, done.stderr
        files.append(tmp_path / "out" / site / "statistics.pt")
    said = run_command("scripts.merge_priors", "--describe", *files)
    assert said.returncode == 0 and said.stdout.count("12 scans of 12 people: sums over") == 2
    output = tmp_path / "merged" / "population_prior.pt"
    done = run_command("scripts.merge_priors", *files, "--output", output)
    assert done.returncode == 0, done.stderr
    content = torch.load(output, weights_only=True)
    assert content["cohorts"] == {"A": 12, "B": 12}
    prior = load_prior(content)
    assert prior.coding.variables["site"].categories == ("A", "B")
    assert (tmp_path / "merged" / "left_out.csv").read_text(encoding="utf-8").count("\n") == 3
    words = ("--ckpt", tmp_path / "m.pt", "--prior", output, "--output_dir", tmp_path / "samples")
    done = run_bundle(*words, "--samples", 1, run_id="sample", configs=INFERENCE)
    assert done.returncode == 0, done.stderr
    (files[0].parent / "x").mkdir()
    twice = run_command(
        "scripts.merge_priors", files[0], "../statistics.pt", "--output", output, cwd=files[0].parent / "x"
    )
    assert twice.returncode == 1 and "two files are of a cohort 'A'" in twice.stderr


def test_people_are_not_counted_twice(cohorts, tmp_path):
    """Neither those of one file, whose sums were made anew, nor those of an earlier file of a site."""
    a, b = cohorts["A"], cohorts["B"]
    anew = replace(a, squares=a.squares * (1 + 1e-5 * torch.randn(len(a.squares), generator=torch.manual_seed(0))))
    later = replace(a, count=a.count + 1, squares=a.squares + b.squares / b.count)
    for name, found in (("anew", anew), ("later", later)):
        with pytest.raises(ValueError, match=rf"all people of 'A' seem to be in '{name}', too") as error:
            refuse_shared_people({"A": a, name: found})
        assert "\n" not in str(error.value)
    refuse_shared_people(cohorts)
    # of large cohorts, each dimension of half as many more people has more: they are others all the same
    many = replace(a, count=1000, squares=1000 * torch.ones_like(a.squares))
    refuse_shared_people({"A": many, "B": replace(many, count=1500, squares=1500 * torch.ones_like(a.squares))})
