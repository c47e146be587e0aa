"""Whatever one scan does is that scan's: it is named in failed.csv, and all others are done."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import inference_config, informative_network, run_bundle
from monai.transforms import Compose

from scripts.data.scan_grid import Fit
from scripts.inference import jobs
from scripts.inference.common import Cohort
from scripts.inference.engine import ScanEvaluator, read_item
from scripts.inference.inferers import Reconstruction
from scripts.inference.latent_files import LoadLatentsd
from scripts.utils.errors import ResourceError, root_cause


@pytest.fixture(scope="module")
def network(cohort):
    return informative_network(cohort)


@pytest.fixture
def scans(cohort, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in sorted(cohort.glob("*.nii.gz"))[:3]:
        shutil.copy(path, folder)
    return folder


def evaluator(scans, network, output, **changes) -> ScanEvaluator:
    config = inference_config(network=network, dataset_dir=str(scans), output_dir=str(output), **changes)
    return config.get_parsed_content("evaluator")


def failed(job: ScanEvaluator) -> dict[str, str]:
    return {failure.image: failure.reason for failure in job.common.failures.gather()}


def test_an_error_that_nobody_foresaw_is_the_scans(scans, network, tmp_path):
    """While a scan is read, computed, and written."""
    job = evaluator(scans, network, tmp_path / "out", batch_size=3)
    first, second, third = sorted(path.name for path in scans.iterdir())
    job.dataset.transform = Raises(job.dataset.transform, first, KeyError("read"))
    job.inferer = RaisesOnce(Reconstruction(), job.dataset[1]["image"])
    job.results_of = Compose([Raises(lambda item: item, third, MemoryError("written")), job.results_of])
    job.run()
    assert failed(job) == {first: "KeyError: 'read'", second: "RuntimeError: computed", third: "MemoryError: written"}


def test_the_others_of_a_batch_are_computed(scans, network, tmp_path):
    job = evaluator(scans, network, tmp_path / "out", batch_size=3)
    job.inferer = RaisesOnce(Reconstruction(), job.dataset[1]["image"])
    job.run()
    assert list(failed(job).values()) == ["RuntimeError: computed"]
    assert len(list((tmp_path / "out").glob("*_recon.nii.gz"))) == 2


@pytest.mark.parametrize("message", ["CUDA error: device lost", "DefaultCPUAllocator: not enough memory"])
def test_what_the_machine_lacks_ends_the_job(scans, network, tmp_path, message):
    job = evaluator(scans, network, tmp_path / "out")
    job.inferer = RaisesOnce(Reconstruction(), None, RuntimeError(message))
    with pytest.raises(RuntimeError, match=message):
        job.run()


def test_a_full_disk_ends_the_job(scans, network, tmp_path):
    job = evaluator(scans, network, tmp_path / "out")
    job.results_of = Compose([Raises(lambda item: item, "", ResourceError(28, "the disk is full")), job.results_of])
    with pytest.raises(RuntimeError) as error:
        job.run()
    assert isinstance(root_cause(error.value), ResourceError)


class Raises:
    """A transform, which raises an error for scans of this name."""

    def __init__(self, transform, name, error):
        self.transform, self.name, self.error = transform, name, error

    def __call__(self, item):
        if self.name in str(item.get("name", item["image"])):
            raise self.error
        return self.transform(item)


class RaisesOnce:
    """An inferer, which raises an error where a scan is in the batch; None: always."""

    def __init__(self, inferer, scan, error=None):
        self.inferer, self.scan, self.error = inferer, scan, error or RuntimeError("computed")
        self.images = inferer.images

    def __call__(self, inputs, network, **arguments):
        if self.scan is None or any(torch.equal(scan, self.scan.as_tensor()) for scan in inputs):
            raise self.error
        return self.inferer(inputs, network, **arguments)


# Latents that were edited


def edit(content, name, value):
    return {**content, name: np.asarray(value)}


EDITS = {
    "z00 is text": lambda c: edit(c, "z00", np.full(c["z00"].shape, "a")),
    "z00 is NaN": lambda c: edit(c, "z00", c["z00"] * np.nan),
    "z00 is complex": lambda c: edit(c, "z00", c["z00"] + 1j),
    "z00 is flat": lambda c: edit(c, "z00", c["z00"].ravel()),
    "affine is NaN": lambda c: edit(c, "affine", c["affine"] * np.nan),
    "affine is singular": lambda c: edit(c, "scan_affine", c["scan_affine"] * 0),
    "affine is small": lambda c: edit(c, "affine", np.eye(3)),
    "shape is negative": lambda c: edit(c, "scan_shape", [-1, 4, 4]),
    "shape is huge": lambda c: edit(c, "scan_shape", [20000] * 3),
    "shape is flat": lambda c: edit(c, "scan_shape", [4, 4]),
    "gain is 0": lambda c: edit(c, "gain", [0.0]),
    "gain is text": lambda c: edit(c, "gain", ["1"]),
    "gain is of two channels": lambda c: edit(c, "gain", [1.0, 1.0]),
    "offset is infinite": lambda c: edit(c, "offset", [np.inf]),
    "b_min is a list": lambda c: edit(c, "b_min", [1.0]),
    "background is missing of one channel": lambda c: edit(c, "background", []),
}


@pytest.fixture(scope="module")
def latents(cohort, network, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents")
    config = inference_config(network=network, dataset_dir=str(cohort), output_dir=str(output))
    jobs.encode(config.get_parsed_content("common")).run()
    with np.load(sorted(output.glob("*_latents.npz"))[0]) as content:
        return dict(content)


@pytest.mark.parametrize("kind", EDITS)
def test_latents_that_make_no_sense_are_named(kind, latents, network, tmp_path):
    np.savez(tmp_path / "a_latents.npz", **EDITS[kind](latents))
    np.savez(tmp_path / "b_latents.npz", **latents)
    config = inference_config(network=network, output_dir=str(tmp_path / "out"))
    job = jobs.decode(config.get_parsed_content("common"), tmp_path)
    job.run()
    ((name, reason),) = failed(job).items()
    assert name == "a_latents.npz" and reason.startswith("it") and kind.split()[0] in reason.replace("scan_", "")
    assert (tmp_path / "out" / "b_recon.nii.gz").is_file()


@pytest.mark.parametrize("name", ["overwrite", "figures"])
def test_a_word_is_no_truth_value(network, tmp_path, name):
    """As Python callers may write it: a text that is not empty would count as true."""
    config = inference_config(network=network, output_dir=str(tmp_path / "out"), **{name: "false"})
    with pytest.raises(RuntimeError) as error:  # MONAI's, of what it could not make
        config.get_parsed_content("common")
    assert str(root_cause(error.value)).startswith(f"{name} is 'false': it must be True or False")


def test_latents_of_earlier_versions_lack_a_background(latents, network, tmp_path):
    np.savez(tmp_path / "a_latents.npz", **{name: value for name, value in latents.items() if name != "background"})
    read = LoadLatentsd("image", network.latent_grids())({"image": str(tmp_path / "a_latents.npz")})
    assert isinstance(read["fit"], Fit) and read["fit"].background == latents["offset"]


# Covariates


@pytest.fixture(scope="module")
def prior(network):
    from test_covariates import KINDS, prior_with_effects

    from scripts.data.covariates import CovariateCoding

    rows = [{"age": str(40 + k), "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    return prior_with_effects(network, CovariateCoding.learn(KINDS, rows))


def people(scans, **ages):
    rows = [f"{path.name.split('_')[0]}\t{ages.get(path.name[4:8], 50)}\tF\tA" for path in sorted(scans.iterdir())]
    (scans / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex\tsite", *rows]) + "\n")


def score(scans, network, prior, output, **changes) -> ScanEvaluator:
    changes |= {"population_prior": prior, "dataset_dir": str(scans), "output_dir": str(output)}
    config = inference_config(network=network, **changes)
    job = jobs.score(config.get_parsed_content("common"))
    job.run()
    return job


def ages(output) -> list[str]:
    with (output / "scores.csv").open() as file:
        return [row["age"] for row in csv.DictReader(file)]


def test_a_row_that_makes_no_sense_is_the_scans(scans, network, prior, tmp_path):
    names = sorted(path.name for path in scans.iterdir())
    people(scans, **{names[1][4:8]: "89+"})
    job = score(scans, network, prior, tmp_path / "out")
    ((name, reason),) = failed(job).items()
    assert name == names[1] and "age is '89+'" in reason and "participants.tsv" in reason
    assert len(ages(tmp_path / "out")) == 2


def test_results_under_covariates_that_were_corrected_are_made_again(scans, network, prior, tmp_path, caplog):
    number = sorted(path.name for path in scans.iterdir())[0][4:8]
    people(scans)
    score(scans, network, prior, tmp_path / "out")
    people(scans, **{number: 60})
    with caplog.at_level("INFO"):
        job = score(scans, network, prior, tmp_path / "out")
    assert "Of 3 scans, 2 are finished already" in caplog.text
    assert ages(tmp_path / "out") == ["60", "50", "50"] and not failed(job)
    caplog.clear()
    with caplog.at_level("INFO"):
        score(scans, network, prior, tmp_path / "out")
    assert "Of 3 scans, 3 are finished already" in caplog.text


def test_scans_without_a_row_and_ages_beyond_the_priors_are_said(scans, network, prior, tmp_path, caplog):
    people(scans, **{sorted(path.name for path in scans.iterdir())[0][4:8]: 5})
    table = (scans / "participants.tsv").read_text().splitlines()
    (scans / "participants.tsv").write_text("\n".join(table[:-1]) + "\n")
    score(scans, network, prior, tmp_path / "out")
    assert "1 of 3 scan(s) have no row in" in caplog.text
    assert "covariates outside of the range of the training scans, such as" in caplog.text
    with (tmp_path / "out" / "scores.csv").open() as file:
        assert [row["outside_training_range"] for row in csv.DictReader(file)] == ["yes", "no", "no"]


# What earlier results are worth


def images(output) -> list[str]:
    with (output / "scores.csv").open(encoding="utf-8") as file:
        return [row["image"] for row in csv.DictReader(file)]


def test_results_of_another_data_set_with_the_same_names_are_made_again(cohort, network, tmp_path):
    """Whose files may be older than the results."""
    for folder, path in zip("ab", sorted(cohort.glob("*.nii.gz")), strict=False):
        (tmp_path / folder).mkdir()
        shutil.copy2(path, tmp_path / folder / "sub-01_T1w.nii.gz")
    for folder, output in (("a", "shared"), ("b", "shared"), ("b", "own")):
        evaluator(tmp_path / folder, network, tmp_path / output).run()
    name = "sub-01_T1w_recon.nii.gz"
    assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_a_scan_that_fails_now_keeps_no_result_of_an_earlier_run(scans, network, prior, tmp_path):
    """Neither one that became unreadable nor one whose covariates are refused has a row."""
    output, (first, second, third) = tmp_path / "out", sorted(path.name for path in scans.iterdir())
    people(scans)
    score(scans, network, prior, output, figures=True)
    assert images(output) == [first, second, third]
    (scans / first).write_bytes(b"broken")
    people(scans, **{second[4:8]: "89+"})
    job = score(scans, network, prior, output)
    assert images(output) == [third] and set(failed(job)) == {first, second}
    assert {path.name for path in output.glob("*_anomaly.nii.gz")} == {third.replace(".nii", "_anomaly.nii")}
    (picture,) = output.glob("*_anomaly.png")
    assert picture.name == third.replace(".nii.gz", "_anomaly.png")
    picture.unlink()
    score(scans, network, prior, output, figures=True)
    assert picture.is_file()


def test_failures_of_another_job_stay_in_the_list(scans, network, tmp_path):
    broken = sorted(scans.iterdir())[0]
    content = broken.read_bytes()
    broken.write_bytes(b"broken")
    output, listed = tmp_path / "out", []
    for word in ("score", "encode"):
        config = inference_config(network=network, dataset_dir=str(scans), output_dir=str(output))
        job = getattr(jobs, word)(config.get_parsed_content("common"))
        job.run()
        with contextlib.suppress(SystemExit):
            job.common.failures.finish()
        broken.write_bytes(content)
        with (output / "failed.csv").open(encoding="utf-8") as file:
            listed.append([(row["image"], row["job"]) for row in csv.DictReader(file)])
    assert listed == [[(broken.name, "score")]] * 2
    job = jobs.score(config.get_parsed_content("common"))
    job.run()
    job.common.failures.finish()
    assert not (output / "failed.csv").exists()


def test_a_job_that_was_stopped_while_it_wrote_over_others_leaves_none_of_these(scans, network, tmp_path):
    """The next one would take them for finished."""
    output, stopped = (
        tmp_path / "out",
        evaluator(scans, network, tmp_path / "out", seed=1, overwrite=True, batch_size=1),
    )
    evaluator(scans, network, output).run()
    stopped.inferer = RaisesOnce(Reconstruction(), None, RuntimeError("CUDA error: device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        stopped.run()
    assert not list(output.glob("*_recon.nii.gz"))


def test_jobs_that_call_results_alike_do_not_share_a_folder(scans, network, prior, tmp_path):
    config = inference_config(network=network, population_prior=prior, dataset_dir=str(scans))
    common = config.get_parsed_content("common").replace(output_dir=tmp_path / "out")
    common.cohort.unseen = "unknown"
    people(scans)
    jobs.counterfactual(common, {"age": 60}).run()
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*_difference.nii.gz")}
    with pytest.raises(
        FileExistsError, match="holds results of 'counterfactual', some of which are called as those of"
    ):
        jobs.harmonise(common, {"site": "B"}).run()
    assert len(before) == 3 and all(path.read_bytes() == data for path, data in before.items())
    jobs.harmonise(common.replace(overwrite=True), {"site": "B"}).run()
    assert all(path.read_bytes() != data for path, data in before.items())
    with pytest.raises(FileExistsError, match="holds results of 'harmonise'"):
        jobs.counterfactual(common, {"age": 60}).run()


def test_a_result_is_not_written_over_a_scan(scans, network, prior, tmp_path):
    first = sorted(scans.iterdir())[0]
    other = first.with_name(first.name.replace(".nii", "_spread.nii"))
    shutil.copy(first, other)
    config = inference_config(network=network, population_prior=prior, dataset_dir=str(scans), output_dir=str(scans))
    items = [{"image": str(path)} for path in (first, other)]  # as a datalist names them
    job = jobs.deviation(config.get_parsed_content("common").replace(cohort=Cohort(scans, items=items)), 2)
    with pytest.raises(ValueError, match="is one of the scans, and a result of"):
        job.run()
    assert other.read_bytes() == first.read_bytes()


# Names and files


def test_a_datalist_of_a_run_that_is_damaged_is_named(tmp_path):
    from scripts.inference.training_run import TrainedScans

    items = ('{"image": ""}', '{"image": 3}', '{"image": "a.nii", "subject": []}', "null")
    for content in ("{", "[]", '{"training": 3}', '{"training": []}', *(f'{{"training": [{i}]}}' for i in items)):
        (tmp_path / "datalist.json").write_text(content)
        with pytest.raises(ValueError, match=r"datalist\.json'"):
            TrainedScans(tmp_path / "datalist.json")


def test_an_earlier_record_that_is_damaged_is_named(scans, network, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reconstruct.json").write_text("{")
    with pytest.raises(ValueError, match="is not the record of a job"):
        evaluator(scans, network, tmp_path / "out").run()


def test_the_earlier_name_of_a_job_leads_to_the_new_one():
    result = run_bundle(run_id="covariates", configs=["configs/inference.json"])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: The job 'covariates' has another name since version 0.10.0: run predict_covariates."
    )


def test_an_option_has_the_same_effect_however_it_is_given(scans, network, prior, tmp_path):
    """`covariates` on the command line, in an overlay and from Python: all are the config's key."""
    config = inference_config(network=network, population_prior=prior, dataset_dir=str(scans), covariates={"age": 70})
    common = config.get_parsed_content("common").replace(output_dir=tmp_path)
    job = jobs.sample(common, 1, covariates=config.get_parsed_content("covariates"))
    older = jobs.sample(common, 1, covariates={"age": 45})
    samples = [made.compute([read_item(made.dataset, 0)])["sample"] for made in (job, older)]
    assert not torch.equal(*samples)
    assert job.settings["covariates"] == {"age": 70}


ODD = (b"sub-1_T1_$\\alpha_{$.nii.gz", b"sub-\xe9_T1w.nii.gz", b"s" * 238 + b".nii.gz", b"s" * 248 + b".nii.gz")


@pytest.mark.parametrize("name", ODD, ids=["mathtext", "Latin-1", "245 bytes", "255 bytes"])
def test_whatever_a_scan_is_called_the_others_are_done(name, scans, network, tmp_path):
    """A result's name is longer than its scan's, which then has no place: its row says so."""
    usual = sorted(scans.iterdir())[0]
    usual.rename(scans / os.fsdecode(name))
    config = inference_config(network=network, dataset_dir=str(scans), output_dir=str(tmp_path / "out"), batch_size=2)
    job = jobs.score(config.get_parsed_content("common"))
    job.run()
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3 - len(failed(job))
    assert all("would have a name of more than 255 bytes" in reason for reason in failed(job).values())
    assert len(failed(job)) == (len(name) == 255)
    with contextlib.suppress(SystemExit):
        job.common.failures.finish()
    assert (tmp_path / "out" / "failed.csv").exists() == (len(name) == 255)
    assert (tmp_path / "out" / "report_score.html").is_file()
