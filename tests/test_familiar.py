"""Does a network know such scans: the limit's false alarms, and faults that are found and named."""

from __future__ import annotations

import csv
import json
import re
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, brain, inference_config, informative_network, run_bundle
from monai.data import Dataset, MetaTensor
from torch.nn.functional import max_pool3d

import benchmarks.familiar
from benchmarks.familiar import FAULTS
from scripts.check import check
from scripts.data.scan_grid import ScanGrid
from scripts.inference.explanations import _movement_words
from scripts.inference.familiar import Examiner, Finding, Step, mended_scan
from scripts.layers.output import foreground
from scripts.networks import VDVAE
from scripts.phantoms import make_brains
from scripts.population.familiarity import (
    LEAST_SPREAD,
    Familiarity,
    fit_familiarity,
    least_spread,
    look,
    masked_otherwise,
)
from scripts.population.files import load_prior, prior_path
from scripts.population.fit import PopulationFit
from scripts.population.prior import PopulationPrior
from scripts.prepare import prepare

REASONS = ("orientation", "skull", "alignment", "contrast", "voxel_size", "crop", "resolution", "range", "unknown")
TINY = str(ROOT / "tests" / "tiny.json")


def test_as_many_false_alarms_as_it_says():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rates = []
    for _ in range(40):
        people = torch.randn(80, 6, generator=generator, dtype=torch.float64) @ mixing
        held_out = people[:20]
        apart = torch.cat([part - part.mean(0) for part in (held_out, people[20:])])
        names = [str(number) for number in range(6)]
        known = Familiarity(names, held_out.mean(0), apart.T @ apart / 78, (20, 79), -4.0, torch.zeros(1, 2))
        others = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixing
        rates.append(float((known.distance(others) > known.limit(0.05)).double().mean()))
    assert np.mean(rates) == pytest.approx(0.05, abs=0.01)


def a_cohort(held_out: int = 20) -> Familiarity:
    """Six numbers that vary by 1 about 0."""
    zeros, ones = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    return Familiarity([*"abcdef"], zeros, ones, (held_out, 200), -4.0, torch.zeros(1, 2))


def test_scans_of_an_added_kind_are_usual_too():
    known, generator = a_cohort(), torch.Generator().manual_seed(0)
    shift = 6 * torch.ones(6, dtype=torch.float64)
    others = shift + 1.3 * torch.randn(400, 6, generator=generator, dtype=torch.float64)
    both = known.also(others[:20])
    assert (known.unfamiliarity(others[20:]) > 1).double().mean() > 0.95
    assert (both.unfamiliarity(others[20:]) > 1).double().mean() < 0.03
    assert torch.equal(both.distance(others - shift), known.distance(others - shift))  # of the nearest kind
    assert (both.unfamiliarity(torch.stack([2 * shift, -shift])) > 1).all()
    likewise = (others - shift) / 1.3 + shift
    few = known.also(likewise[:2])  # of so few the mean is less sure
    assert (few.unfamiliarity(likewise[20:]) > 1).double().mean() < 0.03


def test_scans_that_nothing_explains_are_held_against_each_other(examiner):
    """Of one scanner they are unlike the cohort in the same way; scans of six kinds of faults are not."""
    network, _ = examiner
    numbers = len(network.familiarity.names)
    spread = network.familiarity.covariance.diagonal().sqrt()

    def found(statistics: torch.Tensor, familiar: bool = False) -> Finding:
        return Finding(familiar, 9.0, 5.0, -4.0, statistics=network.familiarity.mean + spread * statistics)

    alike = 20 * torch.ones(6, numbers) + 0.1 * torch.eye(numbers)[:6]
    strangers = [found(row) for row in alike]
    seen = network.compared([*strangers, found(torch.zeros(numbers), familiar=True)])
    assert [finding.alike for finding in seen] == [6] * 6 + [0]
    assert "6 of these scans are unlike those in the same way" in seen[0].sentence() and seen[0].reason == "unknown"
    various = network.compared([found(20 * row) for row in torch.eye(numbers)[:6]])
    assert [finding.alike for finding in various] == [0] * 6
    assert "no fault that is known explains it" in various[0].sentence()
    assert not any(finding.alike for finding in network.compared(strangers[:4]))  # they are too few to tell


def test_another_scanner_is_told_from_a_disease_by_where_a_scan_is_unlikely():
    """All over the brain, or in places; what is unlikely as usual is neither."""
    surprise = torch.stack([torch.linspace(-2, 0, 60), torch.full((60,), 0.1)])
    known, generator = a_cohort()._replace(surprise=surprise), torch.Generator().manual_seed(0)
    usual = surprise[0] + 0.1 * torch.randn(50, 60, generator=generator)
    places = torch.cat([torch.full((4,), 5.0), torch.full((56,), 0.15)])
    assert known.everywhere(usual + 0.3).all()
    assert not known.everywhere(usual).any() and not known.everywhere(usual + places).any()
    assert not a_cohort().everywhere(usual + 0.3).any()  # files of earlier versions do not tell
    pooled = Familiarity.together([known, known._replace(surprise=surprise + torch.tensor([[0.4], [0.0]]))])
    torch.testing.assert_close(pooled.surprise[0], surprise[0].double() + 0.2)
    torch.testing.assert_close(pooled.surprise[1], torch.full((60,), 0.05, dtype=torch.float64).sqrt())
    step = Step("contrast", "its contrast is another", 0.1, np.eye(4))
    said = Finding(False, 9.0, 5.0, -4.0, steps=(step,), scanner=True).sentence()
    assert "its contrast is another (0.1 bits per dim better); that is so all over the brain" in said
    assert "another scanner or protocol, which the job adapt learns" in said


def test_a_gain_is_said_where_there_is_one():
    """A reason may bring a scan nearer to usual ones by its other numbers alone."""
    steps = [Step("contrast", "its contrast is another", gain, np.eye(4)) for gain in (0.25, -0.014)]
    said, silent = (Finding(False, 9.0, 5.0, -4.0, steps=(step,)).sentence() for step in steps)
    assert "its contrast is another (0.25 bits per dim better); weights" in said
    assert "its contrast is another; weights" in silent and "better" not in silent


def test_a_header_of_larger_voxels_is_called_so():
    """A header whose voxels are 1.25 times too large maps the world of the cohort to one that is as much larger."""
    words = _movement_words(np.diag([1.25, 1.25, 1.25, 1.0]), np.zeros(3), stretches=True)
    assert "its header says voxels 1.25 x 1.25 x 1.25 times as large as they are" in words
    assert "0° and 0 mm off" in words


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Weights whose prior says what is usual of 40 phantoms, and the folder of these."""
    folder = tmp_path_factory.mktemp("known")
    make_brains(folder / "brains", 40, spacing=8, workers=1)
    network = informative_network(folder / "brains")
    torch.save(network.state_dict(), folder / "model.pt")
    preprocess = inference_config().get_parsed_content("preprocessing")
    scans = [preprocess({"image": str(path)}) for path in sorted((folder / "brains").glob("*.nii.gz"))]
    PopulationFit(network, Dataset(scans[:24]), Dataset(scans[24:]), prior_path(folder / "model.pt"), factors=4).run()
    return folder


def test_a_nat_more_or_less_of_a_grid_is_as_usual():
    """Whether its latents cost a hundredth of a nat or thousands; other statistics have no such unit."""
    cost = torch.tensor([0.01, 150.0, 7000.0], dtype=torch.float64)
    least = least_spread(["brain", "4³", "8³", "16³"], torch.cat([torch.zeros(1), cost.log1p()]), ["4³", "8³", "16³"])
    assert least[0] == pytest.approx(LEAST_SPREAD)
    assert ((cost + 1).log1p() - cost.log1p() <= least[1:]).all()
    torch.testing.assert_close((cost[1:] + 1).log1p() - cost[1:].log1p(), least[2:], rtol=0.01, atol=0)


def test_what_a_file_compares_is_compared_by_name(known):
    """Files of earlier versions have fewer numbers; merged ones those that all have, but for coordinates."""
    config = inference_config(ckpt=str(known / "model.pt"))
    network, prior = config.get_parsed_content("network"), config.get_parsed_content("population_prior")
    familiarity = Familiarity.of(prior)
    scans = torch.rand(3, 1, 8, 8, 8) * 2 - 1
    everything = look(network.eval(), scans, prior).statistics
    kept = [place for place, name in enumerate(familiarity.names) if name != "missing"]
    names = [familiarity.names[place] for place in kept]
    assert everything.shape[1] == len(names) + 1 and names[-1] == "population"
    earlier = familiarity._replace(
        names=names, mean=familiarity.mean[kept], covariance=familiarity.covariance[kept][:, kept]
    )
    prior.familiarity = earlier._asdict()
    assert torch.equal(look(network, scans, prior).statistics, everything[:, kept])
    merged = Familiarity.together([familiarity, earlier])
    assert merged.names == names[:-1] and len(merged.mean) == len(names) - 1
    (mean, covariance, people), *others = merged.added
    assert torch.equal(mean, merged.mean) and torch.equal(covariance, merged.covariance) and not others
    assert people == familiarity.people[0]


def test_the_network_draws_what_is_usual_once_for_many_scans():
    network = VDVAE(3, 1, [4, 6, 8], [1, 1, 1], [2, 3, 8], [3, 3, 2], spatial_shape=[8, 8, 8]).eval()
    ones = torch.ones(network.latent_grids()[0])
    prior = PopulationPrior({0: 0 * ones}, {0: ones}, {0: ones[None]})
    people = Dataset([{"image": torch.rand(1, 8, 8, 8), "subject": f"sub-{k // 2}"} for k in range(4)])
    with mock.patch.object(network, "decode", wraps=network.decode) as decode:
        look(network, people[0]["image"][None], prior)
        assert decode.call_count == 1
        found = fit_familiarity(network, prior, people, people, batch_size=1)
        assert decode.call_count == 1 + 3  # of those held out, of the others, and of the former masked otherwise
    assert found["people"] == (2, 4)  # of each person one scan


def test_it_is_seen_how_much_of_a_brain_is_missing(known):
    """Whatever the network says of it; dark is not missing."""
    config = inference_config(ckpt=str(known / "model.pt"))
    network, prior = config.get_parsed_content("network").eval(), config.get_parsed_content("population_prior")
    place = Familiarity.of(prior).names.index("missing")
    scan = config.get_parsed_content("preprocessing")({"image": str(min((known / "brains").glob("*.nii.gz")))})
    whole = scan["image"].as_tensor()
    darker, cut = (whole + 1) * 0.5 - 1, whole.clone()
    cut[..., 4:] = -1
    usual, dark, missing = look(network, torch.stack([whole, darker, cut]), prior).statistics[:, place]
    assert dark == usual and 3 < missing - usual < np.log(101)


@pytest.mark.parametrize("held_out", [0, 3])
def test_new_people_are_usual_where_few_are_held_out(known, tmp_path, held_out):
    """The coordinates of those whom the prior was fitted to are larger than those of others, who are no strangers."""
    config = inference_config(ckpt=str(known / "model.pt"))
    network, preprocess = config.get_parsed_content("network"), config.get_parsed_content("preprocessing")
    scans = [preprocess({"image": str(path)}) for path in sorted((known / "brains").glob("*.nii.gz"))]
    training, validation, new = scans[: 27 - held_out], scans[27 - held_out : 27], scans[27:]
    PopulationFit(network, Dataset(training), Dataset(validation), tmp_path / "prior.pt", factors=12).run()
    prior = load_prior(torch.load(tmp_path / "prior.pt", weights_only=True))
    familiarity = Familiarity.of(prior)
    assert familiarity.people == ((3, 27) if held_out else (6, 27))
    statistics = look(network.eval(), torch.stack([item["image"].as_tensor() for item in new]), prior).statistics
    assert (familiarity.unfamiliarity(statistics) > 1).sum() <= 1
    apart = (statistics - familiarity.mean) / familiarity.covariance.diagonal().sqrt()
    assert apart[:, familiarity.names.index("population")].mean().abs() < 1.2


def damaged(known, number: int, fault: str) -> nib.Nifti1Image:
    scan = nib.load(known / "brains" / f"sub-{number:04d}_FLAIR.nii.gz")
    image = scan.get_fdata(dtype=np.float32)
    if fault == "orientation":
        image = image[:, ::-1]
    elif fault == "contrast":
        image[image > 0] = image.max() + 1 - image[image > 0]
    made = nib.Nifti1Image(image, scan.affine)
    made.set_sform(scan.affine, 4)
    return made


def test_check_asks_the_network_and_says_why_not(known, tmp_path):
    (tmp_path / "scans").mkdir()
    for number, fault in enumerate(("", "orientation", "contrast"), start=30):
        nib.save(damaged(known, number, fault), tmp_path / "scans" / f"{fault or 'fine'}.nii.gz")
    check(tmp_path / "scans", output_dir=tmp_path / "out", workers=1, ckpt=str(known / "model.pt"), config_file=TINY)
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        rows = {row["path"].removesuffix(".nii.gz"): row for row in csv.DictReader(file)}
    assert (rows["fine"]["familiar"], rows["fine"]["reason"], rows["fine"]["gain"]) == ("yes", "", "")
    for fault in ("orientation", "contrast"):
        assert rows[fault]["familiar"] == "no" and rows[fault]["reason"] in REASONS, rows[fault]
        assert rows[fault]["verdict"] == "suspicious" and "does not know such scans" in rows[fault]["reasons"]
    # 8 voxels are too few to tell contrast from alignment
    assert (tmp_path / "out" / "unfamiliar.png").is_file() and "unfamiliar.png" in (
        tmp_path / "out" / "report.html"
    ).read_text(encoding="utf-8")
    assert rows["orientation"]["reason"] == "orientation" and float(rows["orientation"]["gain"]) > 0


def test_prepare_mends_what_the_network_finds(known, tmp_path):
    for number, fault in enumerate(("", "orientation", "contrast"), start=30):
        (tmp_path / "scans" / fault).mkdir(parents=True, exist_ok=True)
        nib.save(damaged(known, number, fault), tmp_path / "scans" / fault / "scan.nii.gz")
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"no scan")
    words = {"like": known / "model.pt", "config_file": TINY}
    done = prepare(tmp_path / "scans", tmp_path / "out", **words)
    rows = {row["scan"]: row for row in done.rows}
    assert rows["scan.nii.gz"]["verdict"] == "ok" and rows["scan.nii.gz"]["mended"] == ""
    turned = rows["orientation/scan.nii.gz"]
    assert turned["mended"] == "orientation" and turned["after"] < 1 < turned["distance"] and turned["gain"] > 0
    assert list(done.failures) == ["broken.nii.gz"]
    wrong, right = (nib.load(tmp_path / name / "orientation" / "scan.nii.gz") for name in ("scans", "out"))
    assert np.array_equal(right.get_fdata(), wrong.get_fdata()[:, ::-1])  # turned, and moved by the header alone
    listed = json.loads((tmp_path / "out" / "datalist.json").read_text(encoding="utf-8"))["training"]
    assert {"image": "orientation/scan.nii.gz"} in listed and {"image": "contrast/scan.nii.gz"} not in listed
    assert [int(image.header["sform_code"]) for image in (wrong, right)] == [4, 4]
    for more in ({"keep_skull": True}, {"workers": 1}):
        with pytest.raises(ValueError, match="like mends scans on their own grid"):
            prepare(tmp_path / "scans", tmp_path / "out", **more, **words)
    done = prepare(tmp_path / "scans", tmp_path / "none" / "out", scan_pattern="broken*", **words)
    assert not done.rows and (tmp_path / "none" / "out" / "failed.csv").is_file()


@pytest.mark.parametrize("background", [-3.0, 0.0, 100.0])
def test_what_is_no_brain_becomes_background(background):
    """Whatever the scan has there."""
    image = brain(16)
    with_rim = image.clone()
    with_rim[:, 0] = 0.5
    step = Step("skull", "it has more than a brain", 1.0, np.eye(4))
    mended = mended_scan(with_rim + background, Finding(False, 2.0, 1.0, -1.0, (step,)))
    assert (mended[:, 0] == background).all() and mended.min() == background
    torch.testing.assert_close(mended[:, 6:10, 6:10, 6:10], with_rim[:, 6:10, 6:10, 6:10] + background)


@pytest.fixture(scope="module")
def examiner(tmp_path_factory):
    """An untrained network of 16³ with the template of 44 phantoms that lie in one box of the world, and one more."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_brains(folder, 45, spacing=4, workers=1, contrast="T1w")
    *paths, other = sorted(folder.glob("*.nii.gz"))
    scan = nib.load(other)
    ends = np.array(
        [scan.affine[:3, :3] @ corner + scan.affine[:3, 3] for corner in ([-0.5] * 3, np.array(scan.shape) - 0.5)]
    )
    grid = ScanGrid([ends.mean(0).tolist(), np.ptp(ends, axis=0).tolist()])
    torch.manual_seed(0)  # of the network
    config = inference_config(grid=grid, spatial_shape=[16] * 3, **{"network_def#init": "informative"})
    network, preprocessing = config.get_parsed_content("network_def"), config.get_parsed_content("preprocessing")
    scans = [preprocessing({"image": str(path)}) for path in paths]
    images = torch.stack([item["image"].as_tensor() for item in scans])
    network.set_voxel_gaussian(images.mean(0), images.std(0), scans[0]["image"].affine)
    PopulationFit(network, Dataset(scans[:26]), Dataset(scans[26:]), folder / "prior.pt", factors=4).run()
    prior = load_prior(torch.load(folder / "prior.pt", weights_only=True))
    return Examiner(network.eval(), prior, preprocessing), scan


def test_another_brain_mask_changes_the_edge_alone(examiner):
    """What the other mask adds lies around the brain, what it takes away at the brain's surface; no scan is alike."""
    network, scan = examiner
    image = network.scale(network.fit({"image": MetaTensor(scan.get_fdata()[None], scan.affine)}))["image"].as_tensor()
    scans = image.float()[None].expand(8, *image.shape)
    changed = masked_otherwise(network.network, scans, range(8))
    inside = foreground(scans, network.network)
    near = max_pool3d(inside.any(1, keepdim=True).float(), 3, 1, 1) > 0
    deep = max_pool3d((~inside).any(1, keepdim=True).float(), 3, 1, 1) == 0
    assert (near & ~inside).any() and deep.any()
    assert torch.equal(changed[deep | ~near], scans[deep | ~near])
    grown, shrunk = ((changed - scans)[part].reshape(-1) for part in (near & ~inside, inside & ~deep))
    assert grown.max() > 0 and grown.min() == 0 and shrunk.min() < 0 and shrunk.max() == 0
    assert len({float(one.sum()) for one in changed}) == 8
    again = masked_otherwise(network.network, scans[:3], range(5, 8))
    assert torch.equal(again, changed[5:])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("axes exchanged", "top where it says front"),
        ("turned, °", "it is not aligned, 3[0-9]°"),
        ("voxel size, times", "header says voxels 1.4"),
        ("inverted", "inverted it is usual"),
        ("clipped, share", "50 % of its tissue have the highest value"),
        ("a bright blot, times", "something outshines its brain"),
        ("top cut, share", "it is cut at its top"),
        ("scalp, mm", "it shows more than a brain"),
        ("thick slices, mm", "it is blurred, by .* along z"),
    ],
)
def test_a_fault_is_named(examiner, tmp_path, fault, words):
    network, scan = examiner
    reason, change, _ = FAULTS[fault]
    image = benchmarks.familiar.damaged(scan, (fault, "strong"))
    if reason == "resolution":  # strong enough for voxels of 12 mm
        image = nib.Nifti1Image(*change(scan.get_fdata(dtype=np.float32), scan.affine, 25))
    nib.save(image, tmp_path / "scan.nii.gz")
    found = network.examine(network.load(str(tmp_path / "scan.nii.gz")))
    assert found.reason == reason, found.sentence()
    assert re.search(words, found.sentence())


def test_a_scan_without_a_fault_is_familiar(examiner, tmp_path):
    network, scan = examiner
    nib.save(scan, tmp_path / "fine.nii.gz")
    assert network.examine(network.load(str(tmp_path / "fine.nii.gz"))).familiar


def test_scores_say_whether_a_scan_is_familiar(known, tmp_path):
    (tmp_path / "scans").mkdir()
    for number, fault in ((30, ""), (31, "contrast")):
        nib.save(damaged(known, number, fault), tmp_path / "scans" / f"{fault or 'fine'}.nii.gz")
    words = ("--ckpt", known / "model.pt", "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out")
    done = run_bundle(*words, run_id="score", configs=["configs/inference.json", "tests/tiny.json"])
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert [rows[f"{name}.nii.gz"]["familiar"] for name in ("fine", "contrast")] == ["yes", "no"]
    assert float(rows["fine.nii.gz"]["unfamiliarity"]) < 1 < float(rows["contrast.nii.gz"]["unfamiliarity"])


@pytest.mark.parametrize("even", [False, True])
def test_another_scanner_is_told_and_not_refused(known, tmp_path, caplog, even):
    """The same darker scan, by a prior for which it is unlikely in places, and by one of likelier brains."""
    scan = nib.load(known / "brains" / "sub-0031_FLAIR.nii.gz")
    image = scan.get_fdata(dtype=np.float32)
    (tmp_path / "scans").mkdir()
    darker = image.max() * (image / image.max()) ** 1.7
    nib.save(nib.Nifti1Image(darker, scan.affine), tmp_path / "scans" / "dark.nii.gz")
    content = torch.load(prior_path(known / "model.pt"), weights_only=True)
    if even:
        content["familiarity"]["surprise"][0] -= 5
    torch.save(content, tmp_path / "prior.pt")
    paths = {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "out"), "figures": False}
    config = inference_config(
        ckpt=str(known / "model.pt"), prior=str(tmp_path / "prior.pt"), unfamiliar="refuse", **paths
    )
    config.get_parsed_content("reconstruct")
    assert any((tmp_path / "out").rglob("*dark*.nii.gz")) == even
    assert ("it may be of another scanner or protocol" in caplog.text) == even
    if not even:
        with pytest.raises(SystemExit):
            config.get_parsed_content("failures").finish()
        assert "the network does not know such scans" in (tmp_path / "out" / "failed.csv").read_text(encoding="utf-8")


def test_weights_that_cannot_tell_say_what_they_need(known):
    config = inference_config(ckpt=str(known / "model.pt"))
    network, preprocessing = config.get_parsed_content("network"), config.get_parsed_content("preprocessing")
    with pytest.raises(ValueError, match="There is no population prior, which would say which scans are usual"):
        Examiner(network, None, preprocessing)
    prior = config.get_parsed_content("population_prior")
    prior.familiarity = None
    with pytest.raises(ValueError, match=r"population_prior.pt' does not say which scans are usual"):
        Examiner(network, prior, preprocessing)


def test_the_benchmark_counts_what_was_found_and_named(known, tmp_path, capsys):
    items = [{"image": path.name} for path in sorted((known / "brains").glob("*.nii.gz"))]
    datalist = {"training": items[:24], "validation": items[24:26]}
    (known / "brains" / "datalist.json").write_text(json.dumps(datalist), encoding="utf-8")
    words = {"ckpt": str(known / "model.pt"), "config_file": ["configs/inference.json", TINY]}
    sides = {"dataset_dir": str(known / "brains" / "datalist.json"), "testing": "validation"}
    table = benchmarks.familiar.main(output_dir=str(tmp_path), each=2, pairs=1, **sides, **words)
    assert table.faults.value_counts().to_dict() == {0: 2, 1: 4, 2: 2}
    assert (table.reason[~table.familiar] != "").all() and (table.reason[table.familiar] == "").all()
    assert list(tmp_path.iterdir()) == [tmp_path / "faults.csv"]
    printed = capsys.readouterr().out
    assert "2 untouched: " in printed and "all named" in printed
    rows = {"familiar": False, "forest": True, "strength": "weak"}
    two = [{"expected": "skull crop", "reasons": said} for said in ("crop", "crop skull", "")]
    one = {"expected": "unknown skull", "reasons": "skull"}
    benchmarks.familiar.show_pairs(pd.DataFrame([row | rows for row in (*two, one)]))
    weak = next(line for line in capsys.readouterr().out.splitlines() if "weak" in line)
    assert [cell.strip() for cell in weak.strip("| ").split("|")] == ["weak", "4", "100 %", "0 %", "75 %", "50 %"]
