"""The population prior: its mathematics, its fit, its file, and the jobs that use it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import fitted_scans, inference_config, informative_network, run_bundle
from groups import free_port, run_group
from monai.data import Dataset
from torch.distributions import LowRankMultivariateNormal, Normal

from scripts.check import check
from scripts.data.covariates import CovariateCoding
from scripts.inference.inferers import CoordinateDecoding, Sampling
from scripts.inference.prior_jobs import fit_prior
from scripts.inference.scoring import Scoring
from scripts.inference.tables import list_coordinates, scans_to_fit
from scripts.layers.gaussian import LatentSampler
from scripts.networks import VDVAE
from scripts.population.files import coarse_offset, find_population_prior, load_prior, offset_on, save_prior
from scripts.population.fit import PopulationFit
from scripts.population.prior import PopulationPrior, fingerprint, given_innovations, innovation
from scripts.population.sketch import FactorSketch, fit_bytes, latents_within, prior_from_sketch
from scripts.training.checkpoints import CheckpointError
from scripts.utils.names import UNUSABLE

SHAPES = {0: (3, 1, 1, 1), 2: (2, 2, 2, 2)}  # latent 1 is left out
TINY = ["configs/train.json", "tests/tiny.json", "tests/quick_start.json"]
INFERENCE = ["configs/inference.json", "tests/tiny.json"]


def random_prior(shapes=SHAPES, factors=4, distances=None) -> PopulationPrior:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return PopulationPrior(
        {i: 0.3 * randn(*shape) for i, shape in shapes.items()},
        {i: 0.5 + 0.5 * randn(*shape).abs() for i, shape in shapes.items()},
        {i: randn(factors, *shape) for i, shape in shapes.items()},
        distances,
    )


def flat(prior: PopulationPrior, name: str) -> torch.Tensor:
    parts = [getattr(prior, f"{name}_{i}") for i in prior.latents]
    return torch.cat([part.flatten(1) if name == "directions" else part.flatten()[None] for part in parts], dim=1)


def gaussian(prior: PopulationPrior) -> LowRankMultivariateNormal:
    return LowRankMultivariateNormal(flat(prior, "mean")[0], flat(prior, "directions").T, flat(prior, "variance")[0])


def test_log_ratio_is_that_of_the_two_gaussians():
    prior = random_prior()
    u = [torch.randn(5, *shape) for shape in ((3, 1, 1, 1), (4, 1, 1, 1), (2, 2, 2, 2))]
    whole = torch.cat([u[0].flatten(1), u[2].flatten(1)], dim=1)
    expected = gaussian(prior).log_prob(whole) - Normal(0, 1).log_prob(whole).sum(1)
    torch.testing.assert_close(prior.log_ratio(u), expected.double(), rtol=1e-4, atol=1e-3)


def test_coordinates_are_the_factors_expected_given_the_latents():
    prior = random_prior()
    u = {i: torch.randn(5, *shape) for i, shape in SHAPES.items()}
    whole = torch.cat([u[i].flatten(1) for i in prior.latents], dim=1) - flat(prior, "mean")
    expected = whole @ torch.linalg.solve(gaussian(prior).covariance_matrix, flat(prior, "directions").T)
    torch.testing.assert_close(prior.coordinates([u[0], None, u[2]]), expected, rtol=1e-3, atol=1e-4)


def test_coordinates_of_draws_are_typical():
    torch.manual_seed(0)
    prior = random_prior()
    drawn = prior.innovations(torch.randn(4000, prior.factors))
    coordinates = prior.coordinates([drawn[0], None, drawn[2]])
    distance, tail = prior.typicality(coordinates)
    # chi-squared with 4 degrees of freedom: its mean, and the standard error of this many
    assert distance.square().mean() == pytest.approx(4, abs=4 * math.sqrt(8 / 4000))
    assert tail.isnan().all()  # no distances of the cohort are known
    known = random_prior(distances=distance)
    _, tail = known.typicality(coordinates)
    assert tail.min() == pytest.approx(2 / 4001) and tail.max() == 1
    far = known.typicality(torch.full((1, 4), 50.0))
    assert far[0] > 50 and far[1] == pytest.approx(1 / 4001)


def test_draws_have_the_covariance_of_the_model():
    torch.manual_seed(0)
    prior = random_prior()
    drawn = prior.innovations(torch.randn(20000, prior.factors))
    whole = torch.cat([drawn[i].flatten(1) for i in prior.latents], dim=1)
    torch.testing.assert_close(whole.T.cov(), gaussian(prior).covariance_matrix, rtol=0.1, atol=0.25)
    torch.testing.assert_close(whole.mean(0), flat(prior, "mean")[0], rtol=0, atol=0.1)
    assert torch.equal(prior.innovations(torch.zeros(1, 4), 0.0)[0][0], prior.mean_0)


def test_file_keeps_what_matters(tmp_path):
    prior = random_prior(distances=torch.tensor([2.0, 1.0]))
    save_prior(prior, tmp_path / "p.pt", {"scans": 7})
    content = torch.load(tmp_path / "p.pt", weights_only=True)
    assert content["scans"] == 7
    read = load_prior(content)
    assert read.latents == prior.latents and read.distances.tolist() == [1.0, 2.0]
    u = [torch.randn(50, *shape) for shape in ((3, 1, 1, 1), (4, 1, 1, 1), (2, 2, 2, 2))]
    torch.testing.assert_close(read.log_ratio(u), prior.log_ratio(u), rtol=0.02, atol=0.1)


def blocks(count=60, dimensions=40, seed=0):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 3)) @ random.normal(size=(3, dimensions)) * 3
    vectors += random.normal(size=(count, dimensions)) + random.normal(size=dimensions)
    return torch.tensor(vectors, dtype=torch.float32)


def test_sketch_of_blocks_is_the_principal_component_analysis_of_all():
    vectors = blocks()
    sketch = FactorSketch(40)
    for block in vectors.split(7):
        sketch.add(block, torch.full_like(block, 0.5))
    values = torch.linalg.eigvalsh(vectors.T.cov()).flip(0)
    torch.testing.assert_close(sketch.mean, vectors.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sketch.eigenvalues(), values[: len(sketch.basis)], rtol=1e-3, atol=1e-3)
    mean, variance, directions, kept = sketch.factors(3, 0.0)
    covariance = directions.T @ directions + variance.diag()
    # the diagonal is that of the vectors, and what the posterior's own variance adds
    torch.testing.assert_close(covariance.diag(), vectors.var(0) + 0.25, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean, vectors.mean(0), rtol=1e-4, atol=1e-4)
    _, _, shrunk, share = sketch.factors(3, 1.0)
    assert (shrunk.square().sum(1) < directions.square().sum(1)).all() and (kept == 1).all()
    torch.testing.assert_close(shrunk / share[:, None], directions)
    prior = prior_from_sketch(sketch, 3, 1.0, {0: (shrunk.shape[1], 1, 1, 1)})
    torch.testing.assert_close(prior.spread[:, None] * prior.directions_0.flatten(1), directions)


def test_a_small_sketch_keeps_the_leading_directions():
    vectors = blocks(400)
    sketch = FactorSketch(8)
    for block in vectors.split(10):
        sketch.add(block, torch.ones_like(block))
    values, axes = torch.linalg.eigh(vectors.T.cov())
    torch.testing.assert_close(sketch.eigenvalues()[:3], values.flip(0)[:3], rtol=0.01, atol=0)
    found = torch.nn.functional.normalize(sketch.basis[:3])
    assert (found @ axes[:, -3:]).square().sum() > 2.99


def test_where_nothing_is_left_to_explain_mean_and_variance_are(network):
    dimensions = sum(math.prod(grid) for grid in network.latent_grids())
    sketch = FactorSketch(4)
    sketch.add(torch.zeros(5, dimensions), torch.full((5, dimensions), 0.5))
    prior = prior_from_sketch(sketch, 2, 0.5, dict(enumerate(network.latent_grids())))
    assert prior.latents == tuple(range(network.num_latents)) and (prior.variance_0 == 0.25).all()
    assert prior.log_ratio([torch.zeros(1, *grid) for grid in network.latent_grids()]) > 0


def merged(rank: int) -> dict:
    sketch = FactorSketch(40)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    if rank == 0:
        sketch.add(blocks()[:25], torch.ones(25, 40))
    else:
        sketch.add(blocks()[25:], torch.ones(35, 40))
    sketch.merge()
    torch.distributed.destroy_process_group()
    return vars(sketch)


def test_processes_merge_their_sketches(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    first, second = run_group(merged)
    whole = FactorSketch(40)
    whole.add(blocks(), torch.ones(60, 40))
    for name, value in vars(whole).items():
        assert torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])), name
        if name != "basis":
            torch.testing.assert_close(torch.as_tensor(first[name]), torch.as_tensor(value), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first["basis"].T @ first["basis"], whole.basis.T @ whole.basis, rtol=1e-3, atol=0.05)


@pytest.fixture(scope="module")
def network(cohort):
    return informative_network(cohort)


@pytest.fixture(scope="module")
def fitted(network, cohort, tmp_path_factory):
    """The network's weights in a folder, with the population prior of 40 mixtures of the cohort's scans."""
    folder = tmp_path_factory.mktemp("fitted")
    x, _ = fitted_scans(cohort)
    torch.manual_seed(0)
    mixed = [{"image": torch.lerp(x[i % 12], x[(i * 5 + 3) % 12], float(torch.rand(())))} for i in range(40)]
    torch.save(network.state_dict(), folder / "model.pt")
    prior = PopulationFit(network, mixed[:24], mixed[24:], folder / "population_prior.pt", factors=8).run()
    return folder, prior, torch.stack([item["image"] for item in mixed[24:]])


def test_fit_makes_held_out_scans_more_likely(network, fitted):
    _, prior, held_out = fitted
    with torch.no_grad():
        posteriors = network.infer(held_out)[1]
        gain = prior.log_ratio([innovation(q) for q in posteriors])
        scored = Scoring(prior=prior)(held_out, network)
        several = Scoring(importance_samples=4, prior=prior)(held_out, network)
    assert gain.mean() > 10
    assert scored["bits_per_dim_population"].mean() < scored["bits_per_dim"].mean()
    assert several["bits_per_dim_population"].mean() < scored["bits_per_dim_population"].mean()
    assert (scored["typicality_tail"] > 0).all() and scored["typicality"].shape == (16,)
    # a scan that is unlike the cohort lies farther out than all of it
    with torch.no_grad():
        odd = Scoring(prior=prior)(held_out[:1].flip(2, 3), network)
    assert odd["typicality"] > scored["typicality"].max()
    assert odd["typicality_tail"] == pytest.approx(1 / 17)


def fit_of_both(rank: int, folder: str, network, training, held_out) -> dict:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    prior = PopulationFit(network, training, held_out, f"{folder}/p.pt", factors=8).run()
    torch.distributed.destroy_process_group()
    return prior.state_dict()


def test_processes_fit_one_prior_together(network, fitted, tmp_path, monkeypatch):
    scans = fitted[2]
    training, held_out = ([{"image": scan} for scan in part] for part in (scans.roll(1, 0).lerp(scans, 0.3), scans))
    PopulationFit(network, training, held_out, tmp_path / "alone.pt", factors=8).run()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    first, second = run_group(fit_of_both, str(tmp_path), network, training, held_out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    together, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("p.pt", "alone.pt"))
    assert together["scans"] == len(together["distances"]) == 16
    # the noise of the latents differs between processes
    assert together["gain"] == pytest.approx(alone["gain"], rel=0.2) and alone["gain"] > 10


def test_processes_without_a_held_out_scan_fit_with_the_others(network, fitted, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    people = [{"image": scan} for scan in fitted[2][:5]]  # one of whom is held out
    first, second = run_group(fit_of_both, str(tmp_path), network, people, [])
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["distances"]) == 1 and all(part.isfinite().all() for part in first.values())


def test_the_training_scans_that_are_held_out_are_of_people_of_their_own(network, fitted, tmp_path, monkeypatch):
    """Another session of a person who is fitted to would make factors, and all that is measured, look too good."""
    items = [{"image": scan, "subject": f"sub-{place // 3}"} for place, scan in enumerate(fitted[2][:15])]
    taken, held_out = [], PopulationFit._held_out
    monkeypatch.setattr(
        PopulationFit,
        "_held_out",
        lambda fit, scans: taken.extend(scans.dataset.datasets[1].indices) or held_out(fit, scans),
    )
    for training in (items, Dataset(Dataset(items)), [{"image": item["image"]} for item in items]):
        PopulationFit(network, training, [], tmp_path / "p.pt", factors=2).run()
    assert taken == [0, 1, 2, 0, 1, 2, 0, 5, 10]


def test_a_fifth_of_the_training_scans_helps_few_held_out_ones(network, fitted, tmp_path, monkeypatch):
    items, sizes, sketch = [{"image": scan} for scan in fitted[2]], [], PopulationFit._sketch
    monkeypatch.setattr(
        PopulationFit, "_sketch", lambda fit, data, effects: sizes.append(len(data)) or sketch(fit, data, effects)
    )
    prior = PopulationFit(network, items[:12], items[12:], tmp_path / "p.pt", factors=4).run()
    assert len(prior.distances) == 3 + len(items[12:])  # scans 0, 5 and 10 beside those that are held out
    assert sizes == [9, 12]  # without them, to choose; then with them


def test_latents_are_drawn_where_the_prior_says(network):
    grids = network.latent_grids()
    prior = PopulationPrior(
        {i: torch.randn(grid) for i, grid in enumerate(grids)},
        {i: torch.ones(grid) for i, grid in enumerate(grids)},
        {i: torch.zeros(1, *grid) for i, grid in enumerate(grids)},
    )
    with torch.no_grad():
        loc = network.decode([], sampler=given_innovations(prior.innovations(torch.zeros(1, 1), 0.0)))[0]
    # the same by hand: each latent at its prior's mean plus so many deviations
    latents = []
    with torch.no_grad():
        for index in range(len(grids)):
            _, p = prior_of_next(network, latents)
            latents.append(p.mean + p.std * getattr(prior, f"mean_{index}"))
        torch.testing.assert_close(loc, network.decode(latents, temperature=0.0)[0])


def prior_of_next(network, latents):
    """The prior of the first latent that is not given."""
    seen = []

    def rule(index, p):
        seen.append((index, p))
        return p.z

    loc = network.decode(latents, temperature=0.0, sampler=LatentSampler(rule=rule))[0]
    assert [index for index, _ in seen] == list(range(len(latents), network.num_latents))
    return loc, seen[0][1]


def test_samples_need_their_temperature_and_their_noise_alone(network, fitted):
    _, prior, _ = fitted
    with torch.no_grad():
        cold = Sampling(0.0, prior=prior)(2, network)["sample"]
        mean = CoordinateDecoding(prior)(torch.zeros(1, prior.factors), network)["sample"]
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        both = Sampling(prior=prior)(2, network, sampler=LatentSampler(generators))["sample"]
        alone = Sampling(prior=prior)(1, network, sampler=LatentSampler([torch.Generator().manual_seed(2)]))["sample"]
        warm = CoordinateDecoding(prior, 1.0)(torch.zeros(1, prior.factors), network)["sample"]
    assert (Sampling(prior=prior).temperature, Sampling().temperature) == (1.0, 0.7)
    assert not torch.allclose(warm[0], mean[0])
    assert both.shape == (2, 1, 8, 8, 8)
    torch.testing.assert_close(cold[0], mean[0])
    torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_prior_must_belong_to_the_weights(network, fitted, tmp_path, caplog):
    folder, prior, _ = fitted
    found = find_population_prior(None, folder / "model.pt", network)
    assert found.factors == prior.factors and found.distances.shape == (16,)
    assert find_population_prior("network", folder / "model.pt", network) is None
    assert find_population_prior(None, tmp_path / "model.pt", network) is None
    with pytest.raises(FileNotFoundError, match="fit one by the run fit_prior"):
        find_population_prior("population", tmp_path / "model.pt", network)
    with pytest.raises(ValueError, match="set --prior to population, network or"):
        find_population_prior("own", tmp_path / "model.pt", network)
    other = inference_config().get_parsed_content("network_def")
    assert fingerprint(other) != fingerprint(network)
    assert find_population_prior(None, folder / "model.pt", other) is None
    assert "was fitted to other weights" in caplog.text
    with pytest.raises(CheckpointError, match="other weights"):
        find_population_prior("population", folder / "model.pt", other)
    (tmp_path / "population_prior.pt").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="damaged"):
        find_population_prior(None, tmp_path / "model.pt", network)
    torch.save({"a": torch.zeros(1)}, tmp_path / "population_prior.pt")
    with pytest.raises(CheckpointError, match="holds no population prior"):
        find_population_prior(None, tmp_path / "model.pt", network)


def edited(content: dict, edit: str) -> None:
    """Change one thing of a prior's file, in words of Python."""
    latent = content["latents"][min(content["latents"])]
    exec(edit, {"content": content, "latent": latent, "torch": torch, "nan": math.nan, "inf": math.inf})


def test_mean_differences_of_fine_grids_are_kept_on_a_coarse_one():
    values = torch.linspace(-1, 1, 256)
    for shape, stored in (([64, 32, 16], [64, 32, 16]), ([128, 64, 32], [64, 32, 16]), ([256, 128], [64, 32])):
        offset = values[: shape[0]].view(-1, *[1] * (len(shape) - 1)).expand(2, 1, *shape)
        kept = coarse_offset(offset)
        assert list(kept.shape) == [2, 1, *stored]
        torch.testing.assert_close(offset_on(shape, kept, "the file"), offset, atol=0.02, rtol=0)
    with pytest.raises(CheckpointError, match="of another grid"):
        offset_on([96, 64, 32], kept, "the file")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("content['population_prior'] = 99", "has format 99, and this version of the bundle reads format 1"),
        ("del latent['mean']", "is damaged: take it from where it was made"),
        ("content['latents'][99] = latent", "is damaged"),
        ("latent['mean'][..., 0] = nan", "is damaged"),
        (
            "latent.update({k: latent[k][1:] for k in ('mean', 'variance')})\n"
            "latent.update({k: latent[k][:, 1:] for k in ('directions', 'effects')})",
            "is damaged",
        ),
        ("latent['scale'][:] = 1e38", "is damaged"),
        ("latent.update(directions=latent['directions'][1:], scale=latent['scale'][1:])", "is damaged"),
        ("content['covariates'] = 5", "is damaged"),
        ("content['covariates'][0]['kind'] = 'colour'", "is damaged"),
        ("content['offset'][0] = inf", "is damaged"),
        ("content['offset'] = content['offset'][..., 1:]", "of another grid than the network"),
    ],
)
def test_a_prior_with_wrong_content_is_refused_in_a_sentence(network, tmp_path, edit, words):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    path = tmp_path / "population_prior.pt"
    grids = dict(enumerate(network.latent_grids()))
    kinds = {"age": "continuous", "sex": "categorical"}
    rows = [{"age": 40 + 3 * i, "sex": "FM"[i % 2]} for i in range(12)]
    coding = CovariateCoding.learn(kinds, rows)
    prior = random_prior(grids, distances=torch.ones(3))
    prior = PopulationPrior(
        *({i: getattr(prior, f"{name}_{i}") for i in grids} for name in ("mean", "variance", "directions")),
        distances=prior.distances,
        bits_per_dim=torch.ones(3),
        effects={i: torch.randn(coding.size, *grid) for i, grid in grids.items()},
        coding=coding,
    )
    prior.offset = torch.zeros(coding.size, 1, *network.spatial_shape)
    save_prior(prior, path, {"weights": fingerprint(network)})
    content = torch.load(path, weights_only=True)
    assert find_population_prior(None, tmp_path / "model.pt", network).features == coding.size
    edited(content, edit)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as refused:
        find_population_prior(None, tmp_path / "model.pt", network)
    assert str(path) in str(refused.value)
    assert "fit one by the run fit_prior" in str(refused.value)


@pytest.mark.parametrize("spelling", ["./p.pt", "~/p.pt", "../{name}/p.pt", "{folder}/p.pt", Path("p.pt")])
def test_the_file_of_a_prior_may_be_spelt_in_all_ways(network, fitted, tmp_path, monkeypatch, spelling):
    folder, prior, _ = fitted
    (tmp_path / "p.pt").write_bytes((folder / "population_prior.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spelling = spelling.format(name=tmp_path.name, folder=tmp_path) if isinstance(spelling, str) else spelling
    assert find_population_prior(spelling, folder / "model.pt", network).factors == prior.factors


def test_few_scans_have_no_population_prior(network, cohort, tmp_path, caplog):
    x, _ = fitted_scans(cohort)
    few = [{"image": scan} for scan in x[:4]]
    assert PopulationFit(network, few, few[:1], tmp_path / "p.pt").run() is None
    assert "too few for a population prior" in caplog.text and not (tmp_path / "p.pt").exists()
    with pytest.raises(ValueError, match="prior_factors is -1"):
        PopulationFit(network, few, few, tmp_path / "p.pt", factors=-1)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run_dir(cohort, tmp_path_factory):
    """A training run that ends with a population prior."""
    folder = tmp_path_factory.mktemp("run")
    done = run_bundle(
        "--dataset_dir", cohort, "--output_dir", folder, "--epochs", 1, "--prior_factors", 3, configs=TINY
    )
    assert done.returncode == 0, done.stderr
    assert "Population prior of" in done.stderr + done.stdout
    return folder


def infer(run_dir, job, output_dir, *arguments):
    ckpt = run_dir / "checkpoints" / "model.pt"
    return run_bundle("--output_dir", output_dir, "--ckpt", ckpt, *arguments, run_id=job, configs=INFERENCE)


def test_training_leaves_a_prior_and_every_job_uses_it(run_dir, cohort, tmp_path):
    done = infer(run_dir, "encode", tmp_path / "encoded", "--dataset_dir", cohort)
    assert done.returncode == 0, done.stderr
    coordinates, factors = (table(tmp_path / "encoded" / f"{name}.csv") for name in ("coordinates", "factors"))
    assert len(coordinates) == 12 and list(coordinates[0])[:2] == ["image", "c000"]
    assert float(factors[-1]["explained_so_far"]) == pytest.approx(1)

    done = infer(run_dir, "score", tmp_path / "scored", "--dataset_dir", cohort)
    assert done.returncode == 0, done.stderr
    scores = table(tmp_path / "scored" / "scores.csv")
    assert {"bits_per_dim_population", "typicality", "typicality_tail"} <= set(scores[0])

    edited = tmp_path / "edited.csv"
    lines = (tmp_path / "encoded" / "coordinates.csv").read_text().splitlines()
    cells = lines[1].split(",")
    edited.write_text("\n".join([lines[0], lines[1], ",".join(["older", "5", *cells[2:]])]) + "\n")
    done = infer(run_dir, "decode_coordinates", tmp_path / "decoded", "--coordinates", edited, "--figures", True)
    assert done.returncode == 0, done.stderr
    images = [nib.load(path).get_fdata() for path in sorted((tmp_path / "decoded").glob("*_decoded.nii.gz"))]
    assert [image.shape for image in images] == [(8, 8, 8)] * 2
    assert all(0 <= image.min() < image.max() <= 1 for image in images)
    assert (tmp_path / "decoded" / "decoded.png").is_file()

    drawn = {}
    for prior in ("population", "network"):
        done = infer(run_dir, "sample", tmp_path / prior, "--samples", 2, "--prior", prior)
        assert done.returncode == 0, done.stderr
        assert ("population prior '" in done.stderr) == (prior == "population")
        drawn[prior] = nib.load(tmp_path / prior / "0001_sample.nii.gz").get_fdata()
    assert json.loads((tmp_path / "network" / "sample.json").read_text())["population_prior"] is None
    assert not np.allclose(drawn["population"], drawn["network"])
    # results of the two are not mixed
    done = infer(run_dir, "sample", tmp_path / "network", "--samples", 3)
    assert done.returncode == 1 and "made with another population_prior" in done.stderr


def test_a_scan_far_outside_of_the_cohort_is_named(run_dir, cohort, tmp_path):
    scan = nib.load(sorted(cohort.glob("*.nii.gz"))[0])
    odd = np.random.default_rng(0).random(scan.shape)  # a full head, of nothing
    odd[0] = 0
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(odd.astype("float32"), scan.affine), tmp_path / "scans" / "odd.nii.gz")
    nib.save(scan, tmp_path / "scans" / "usual.nii.gz")
    for job in ("score", "reconstruct"):
        done = infer(run_dir, job, tmp_path / job, "--dataset_dir", tmp_path / "scans")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("the network does not know such scans") == 1
        assert "odd.nii.gz': the network does not know such scans" in done.stderr
    said = check(tmp_path / "scans", output_dir=tmp_path / "check", workers=1, run_dir=run_dir)
    assert {Path(scan.path).stem: scan.familiar for scan in said.scans} == {"odd.nii": "no", "usual.nii": "yes"}
    words = ("--dataset_dir", tmp_path / "scans", "--unfamiliar")
    done = infer(run_dir, "encode", tmp_path / "refused", *words, "refuse")
    assert done.returncode == 1 and "odd.nii.gz': the network does not know such scans" in done.stderr
    assert [path.name for path in (tmp_path / "refused").glob("*.npz")] == ["usual_latents.npz"]
    done = infer(run_dir, "encode", tmp_path / "refused", *words, "allow")
    assert done.returncode == 0 and "does not know such scans" not in done.stderr
    assert len(list((tmp_path / "refused").glob("*.npz"))) == 2
    done = infer(run_dir, "encode", tmp_path / "refused", *words, "warn")
    assert done.returncode == 0 and "odd.nii.gz': the network does not know such scans" in done.stderr
    done = infer(run_dir, "encode", tmp_path / "refused", *words, "refuse")
    assert done.returncode == 1 and "Of 2 scans, 1 are finished already" in done.stderr
    assert [path.name for path in (tmp_path / "refused").glob("*.npz")] == ["usual_latents.npz"]
    done = infer(run_dir, "encode", tmp_path / "refused", *words, "never")
    assert done.returncode == 1 and "unfamiliar is 'never': choose one of warn, refuse, allow" in done.stderr


def test_fit_prior_as_a_user_types_it(run_dir, tmp_path):
    before = torch.load(run_dir / "checkpoints" / "population_prior.pt", weights_only=True)
    path = tmp_path / "new" / "folder" / "population_prior.pt"
    words = ("--run_dir", run_dir, "--output_dir", path.parent, "--prior_factors", 2)
    done = run_bundle(*words, run_id="fit_prior", configs=["configs/inference.json"])
    assert done.returncode == 0, done.stderr
    after = torch.load(path, weights_only=True)
    assert after["weights"] == before["weights"] and load_prior(after).factors <= 2
    done = infer(run_dir, "sample", tmp_path / "samples", "--samples", 1, "--prior", path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "0001_sample.nii.gz").is_file()
    torch.save({**after, "weights": "of others"}, path)
    done = run_bundle(*words, run_id="fit_prior", configs=["configs/inference.json"])
    assert done.returncode == 1 and "was fitted to other weights: give another --output_dir" in done.stderr
    assert torch.load(path, weights_only=True)["weights"] == "of others"


def test_a_prior_without_factors_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="prior_factors is 0, but must be a whole number, 1 or more"):
        fit_prior(None, factors=0)


def test_all_scans_of_a_folder_are_fitted_to_and_a_datalist_says_which(cohort, run_dir):
    fitted, held_out = scans_to_fit(cohort, "*.nii*")
    assert (len(fitted), held_out) == (12, [])
    fitted, held_out = scans_to_fit(run_dir / "datalist.json", "*.nii*")
    split = json.loads((run_dir / "datalist.json").read_text())
    assert [len(fitted), len(held_out)] == [len(split["training"]), len(split["validation"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,c000\na,1\n", "its columns must be image and c000 to c003"),
        ("image,c000,c001,c002,c003,c004\na,1,2,3,4,5\n", "its columns must be image and c000 to c003"),
    ],
)
def test_coordinates_that_cannot_be_decoded(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_coordinates(tmp_path / "c.csv", tmp_path, random_prior())


def test_a_row_that_cannot_be_decoded_leaves_the_others(tmp_path):
    rows = ["\ufeffimage,c000,c001,c002,c003", "a,1,2,x,4", "b,1,2", "c,1,2,1e308,4", ",1,2,3,4", "d,1,2,3,4"]
    (tmp_path / "c.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    items = list_coordinates(tmp_path / "c.csv", tmp_path, random_prior())
    assert [Path(item["image"]).name for item in items] == ["a", "b", "c", "unnamed", "d"]
    assert ["has a cell that is no number" in item.get(UNUSABLE, "") for item in items[:3]] == [True] * 3
    assert items[4]["coordinates"] == [1, 2, 3, 4]


def test_coordinates_need_a_prior_and_a_table(tmp_path):
    with pytest.raises(ValueError, match="needs a population prior"):
        list_coordinates(tmp_path / "c.csv", tmp_path, None)
    with pytest.raises(ValueError, match="set --coordinates"):
        list_coordinates(None, tmp_path, random_prior())


def test_a_fit_takes_the_coarsest_latents_that_fit_into_memory(run_dir, caplog):
    network = VDVAE(
        3, 1, [4, 6, 8], [1, 2, 2], [2, 3, 8], [3, 3, 2], spatial_shape=[8, 8, 8]
    )  # latents of 2^3, 4^3 and 8^3, top first: 64, 64; 192, 192; 1024 dimensions
    assert latents_within(network, 1e9, 100) == [0, 1, 2, 3, 4]
    assert latents_within(network, 512 * 100, 100) == [0, 1, 2, 3]
    assert latents_within(network, 1, 100) == [0, 1]  # the coarsest in any case
    scans = Dataset([{"image": torch.rand(1, 8, 8, 8)} for _ in range(8)])
    with caplog.at_level("WARNING"):
        fit = PopulationFit(network, scans, Dataset([]), "prior.pt", 4, memory=512 * fit_bytes(4, 0, 8, 1) / 2**30)
        fit._plan()
    assert fit.latents == [0, 1, 2, 3]
    assert "takes latents of grids up to 4³, and leaves out 1 finer ones" in caplog.text
    with pytest.raises(ValueError, match="prior_memory is 0: set it to a number of GiB above 0"):
        PopulationFit(network, scans, Dataset([]), "prior.pt", memory=0)


def test_a_prior_of_the_coarse_latents_leaves_the_others_as_they_are(tmp_path):
    torch.manual_seed(0)
    network = VDVAE(3, 1, [4, 6, 8], [1, 2, 2], [2, 3, 8], [3, 3, 2], spatial_shape=[8, 8, 8], init="informative")
    scans = Dataset([{"image": torch.rand(1, 8, 8, 8)} for _ in range(12)])
    memory = 512 * fit_bytes(4, 0, 8, 2) / 2**30
    prior = PopulationFit(network, scans, Dataset([]), tmp_path / "prior.pt", 4, memory=memory).run()
    assert set(prior.latents) <= {0, 1, 2, 3}
    assert Sampling(prior=prior)(2, network)["sample"].shape == (2, 1, 8, 8, 8)


def test_a_run_that_ended_before_its_fit_gets_a_prior_when_it_is_resumed(cohort, tmp_path):
    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--epochs", 1, "--prior_factors", 2)
    assert run_bundle(*words).returncode == 0
    path = tmp_path / "checkpoints" / "population_prior.pt"
    fitted = path.read_bytes()
    done = run_bundle(*words, "--resume", True)
    assert "All 1 epochs are done" in done.stderr and path.read_bytes() == fitted  # it was there
    path.unlink()
    assert run_bundle(*words, "--resume", True).returncode == 0
    content = torch.load(path, weights_only=True)
    assert content["weights"] == torch.load(io.BytesIO(fitted), weights_only=True)["weights"]


def test_what_other_processes_send_comes_to_the_host(monkeypatch):
    """With GPUs a receiver gets it on its GPU, where the sender's own stays on the host."""
    moved = []

    class OnGPU(torch.Tensor):
        def cpu(self):
            moved.append(self.shape)
            return self.as_subclass(torch.Tensor)

    sketch = FactorSketch(2)
    sketch.add(torch.rand(6, 5), torch.rand(6, 5))
    state = sketch.__dict__.copy()
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.all_gather", lambda count: [count, count])
    names = iter(("mean", "basis", "scatter", "square") * 2)
    monkeypatch.setattr(
        "ignite.distributed.broadcast", lambda value, src, safe_mode: state[next(names)].as_subclass(OnGPU)
    )
    sketch.merge()
    assert len(moved) == 8 and sketch.count == 12
