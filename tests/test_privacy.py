"""The job privacy: a model that gives back what it was trained on is found out, one that does not is not."""

from __future__ import annotations

import csv
import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import inference_config, run_bundle
from monai.inferers import Inferer

from scripts.inference import jobs
from scripts.inference.privacy import measure, privacy_sides

SIZE = 8


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A datalist of twelve people who were trained on and eight who were not; one of those has two scans."""
    folder = tmp_path_factory.mktemp("people")
    generator = np.random.default_rng(0)
    sides = {"training": [], "validation": []}
    for number in range(21):
        path = folder / f"sub-{min(number, 19):02d}_ses-{number}_T1w.nii.gz"
        scan = generator.uniform(1, 2, (SIZE, SIZE, SIZE)).astype(np.float32)
        nib.save(nib.Nifti1Image(scan, np.eye(4)), path)
        side = "training" if number < 12 else "validation"
        sides[side].append({"image": str(path), "subject": f"sub-{min(number, 19):02d}"})
    (folder / "list.json").write_text(json.dumps(sides))
    return folder / "list.json"


class Copies(Inferer):
    """Draws what it is given."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __call__(self, inputs, network, *args, **kwargs):
        return {"sample": self.images[:inputs]}


def config(people, folder):
    return inference_config(dataset_dir=str(people), output_dir=str(folder), batch_size=4, population_prior=None)


def test_a_person_is_taken_once_and_on_one_side(people):
    training, held_out = privacy_sides(people, "*.nii*", 256, 0)
    assert (len(training), len(held_out)) == (12, 8)
    assert len(privacy_sides(people, "*.nii*", 5, 0)[0]) == 5
    with pytest.raises(ValueError, match="does not say which scans were trained on and which were not: set --run_dir"):
        privacy_sides(people.parent, "*.nii*", 256, 0)


def test_copies_of_training_scans_are_found(people, tmp_path, caplog):
    parser = config(people, tmp_path)
    parser["network"] = parser.get_parsed_content("architecture").eval()
    job = jobs.privacy(parser.get_parsed_content("common"), samples=4)
    job.run()
    honest = json.loads((tmp_path / "privacy.json").read_text())
    assert (honest["training_scans"], honest["held_out_scans"], honest["samples"]) == (12, 8, 4)
    job.sampling.inferer = Copies(measure(job.training, "scans").images[3:])
    with caplog.at_level(logging.INFO):
        job.run()
    copied = json.loads((tmp_path / "privacy.json").read_text())
    assert copied["nearest_training_ratio"] < 1e-3 < honest["nearest_training_ratio"]
    # the network saw none of them
    assert copied["membership_auroc_low"] < 0.5 < copied["membership_auroc_high"]
    rows = list(csv.DictReader((tmp_path / "privacy.csv").open()))
    trained = [item["image"] for item in job.training.dataset.data]
    assert [row["nearest_training"] for row in rows if row["kind"] == "sample"] == trained[3:7]
    assert sum(row["kind"] == "held-out scan" for row in rows) == 8
    assert "is likelier than a held-out one in" in caplog.text


def test_a_scan_that_cannot_be_read_is_left_out(people, tmp_path, caplog):
    parser = config(people, tmp_path)
    parser["network"] = parser.get_parsed_content("architecture").eval()
    common = parser.get_parsed_content("common")
    items = [*json.loads(people.read_text())["validation"][:2], {"image": str(tmp_path / "none.nii.gz")}]
    found = measure(jobs.score(common.replace(cohort=common.cohort.of(items)), restore=None), "scoring")
    assert len(found.items) == len(found.numbers) == len(found.images) == 2
    assert "1 scan(s) can't be read and are left out, such as" in caplog.text
    assert measure(jobs.score(common.replace(cohort=common.cohort.of(items[2:])), restore=None), "scoring") is None


def test_as_a_user_runs_it(people, tmp_path):
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    words = ("--ckpt", tmp_path / "model.pt", "--dataset_dir", people, "--output_dir", tmp_path, "--samples", 3)
    configs = ["configs/inference.json", "tests/tiny.json"]
    result = run_bundle(*words, run_id="privacy", configs=configs)
    assert result.returncode == 0, result.stderr
    assert {"privacy.csv", "privacy.json"} <= {path.name for path in tmp_path.iterdir()}
