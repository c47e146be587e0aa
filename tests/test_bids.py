"""Results named by BIDS, and the description of the data set that they make."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import pytest
import torch
from conftest import ROOT

from scripts.data.find import find_scans
from scripts.inference.layouts import DatasetDescription, SampleLayout, ScanLayout, derivative_path

NAMES = [
    ("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz", "recon", "sub-01/ses-1/anat/sub-01_ses-1_desc-recon_FLAIR.nii.gz"),
    ("sub-01/anat/sub-01_T1w.nii.gz", "imputed_00", "sub-01/anat/sub-01_desc-imputed00_T1w.nii.gz"),
    ("sub-01/pet/sub-01_pet.nii", "recon_to1x2x1", "sub-01/pet/sub-01_desc-reconto1x2x1_pet.nii.gz"),
    # whatever its folders: the name says whose it is
    ("sub-01_T1w.nrrd", "scale", "sub-01/anat/sub-01_desc-scale_T1w.nii.gz"),
    (
        "derivatives/x/sub-01_space-MNI152_desc-preproc_T1w.nii.gz",
        "recon",
        "sub-01/anat/sub-01_space-MNI152_desc-recon_T1w.nii.gz",
    ),
    # latents, by the names that encode gives them
    (
        "sub-01/ses-1/anat/sub-01_ses-1_desc-latents_T1w.npz",
        "recon",
        "sub-01/ses-1/anat/sub-01_ses-1_desc-recon_T1w.nii.gz",
    ),
    ("sub-01/anat/sub-01_T1w_latents.npz", "recon", "sub-01/anat/sub-01_desc-recon_T1w.nii.gz"),
]


@pytest.mark.parametrize(("scan", "result", "expected"), NAMES)
def test_results_are_named_by_bids(tmp_path, scan, result, expected):
    layout = ScanLayout(tmp_path / "scans", tmp_path / "out", result, bids=True)
    assert layout.path(tmp_path / "scans" / scan) == tmp_path / "out" / expected


def test_results_of_every_kind_are_named_so(tmp_path):
    for extension in (".png", ".json", ".npz"):
        layout = ScanLayout(tmp_path, tmp_path, "score", extension, bids=True)
        assert layout.path(tmp_path / "sub-01_T1w.nii.gz").name == f"sub-01_desc-score_T1w{extension}"


@pytest.mark.parametrize(
    "stem", ["brain_0001", "sub-01", "1234567_20253_2_0", "sub-01_T1w_recon", "sub-01_run-1-2_T1w"]
)
def test_a_scan_without_a_bids_name_is_refused(stem):
    with pytest.raises(ValueError, match=f"'{stem}' has no BIDS name .* leave out --bids_derivatives"):
        derivative_path("", stem, "recon", ".nii.gz")


def test_samples_have_no_scan_to_be_named_after(tmp_path):
    with pytest.raises(ValueError, match="a 'sample' comes from the model alone"):
        SampleLayout(tmp_path, "sample", "*.nii*", channels=1, bids=True)


def test_results_among_scans_are_not_taken_for_scans(tmp_path):
    scans = ["sub-01_T1w.nii.gz", "sub-01_desc-preproc_T1w.nii.gz"]
    labels = (
        "recon",
        "reconto4",
        "reconto2x4x2",
        "scale",
        "zscore",
        "anomaly",
        "imputed00",
        "imputedmean",
        "imputedstd",
    )
    results = [f"sub-01_desc-{label}_T1w.nii.gz" for label in (*labels, "tosub02T1wstep00")]
    for name in [*scans, *results]:
        (tmp_path / name).touch()
    assert sorted(path.name for path in find_scans(tmp_path)) == scans
    assert len(find_scans(tmp_path, "*_desc-recon_*.nii.gz")) == 1  # unless they are asked for


def describe(output: Path, scans: Path, job: str) -> dict:
    ckpt = output.parent / "model.pt"
    ckpt.write_bytes(b"weights")
    DatasetDescription(output, scans, ckpt, ROOT / "configs" / "metadata.json")(job)
    return json.loads((output / "dataset_description.json").read_text())


def test_the_data_set_is_described(tmp_path):
    output, scans = tmp_path / "derivatives", tmp_path / "scans"
    output.mkdir()
    for job in ("encode", "score", "encode"):
        content = describe(output, scans, job)
    assert content["DatasetType"] == "derivative" and content["BIDSVersion"] and content["Name"]
    assert content["SourceDatasets"] == [{"URL": scans.as_uri()}]
    items = [{"image": str(scans / name / f"{name}_T1w.nii.gz")} for name in ("sub-01", "sub-02")]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items[:1], "validation": items[1:]}))
    content = describe(output, tmp_path / "datalist.json", "score")  # what its scans share is the source
    assert content["SourceDatasets"] == [{"URL": scans.as_uri()}]
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    found = [entry["Description"].split(",")[0] for entry in content["GeneratedBy"]]
    assert found == ["encode", "score"]
    for entry in content["GeneratedBy"]:
        assert (entry["Name"], entry["Version"]) == (metadata["name"], metadata["version"])
        assert hashlib.sha256(b"weights").hexdigest() in entry["Description"]
        assert str(tmp_path / "model.pt") in entry["Description"]


def test_a_volume_says_what_it_was_made_of_and_by_what(tmp_path):
    scans = tmp_path / "my scans"
    first, second, elsewhere = (
        folder / "sub-01" / "anat" / f"sub-01_{end}.nii.gz"
        for folder, end in ((scans, "T1w"), (scans, "FLAIR"), (tmp_path, "T2w"))
    )
    for file in (first, second, elsewhere):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    output, ckpt = tmp_path / "out", tmp_path / "model.pt"
    ckpt.write_bytes(b"weights")
    description = DatasetDescription(output, scans, ckpt, ROOT / "configs" / "metadata.json")
    layout = ScanLayout(scans, output, "recon", bids=True, description=description)
    files = [*map(str, (first, second, elsewhere)), str(scans / "none.nii.gz")]
    layout.save(str(first), torch.zeros(1, 2, 2, 2), torch.eye(4), files)
    volume = output / "sub-01" / "anat" / "sub-01_desc-recon_T1w.nii.gz"
    sidecar = json.loads(volume.with_name("sub-01_desc-recon_T1w.json").read_text())
    assert nib.load(volume).shape == (2, 2, 2)
    description("reconstruct")
    about = json.loads((output / "dataset_description.json").read_text())
    (link,) = about["DatasetLinks"]
    assert about["DatasetLinks"][link] == scans.as_uri() and link.isalnum()
    assert sidecar["Sources"] == [
        *(f"bids:{link}:sub-01/anat/sub-01_{end}.nii.gz" for end in ("T1w", "FLAIR")),
        elsewhere.as_uri(),
    ]
    (made_by,) = sidecar["GeneratedBy"]
    assert made_by["Weights"]["Digest"] == {"SHA-256": hashlib.sha256(b"weights").hexdigest()}
    assert made_by.items() <= about["GeneratedBy"][0].items()


def test_another_data_set_keeps_its_description(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    with pytest.raises(FileExistsError, match="set --output_dir to a folder for them alone"):
        describe(scans, scans, "encode")
    assert not list(scans.iterdir())
    other = tmp_path / "fmriprep"
    other.mkdir()
    text = '{"Name": "fMRIPrep", "BIDSVersion": "1.4.0", "GeneratedBy": [{"Name": "fMRIPrep"}]}'
    (other / "dataset_description.json").write_text(text)
    with pytest.raises(FileExistsError, match="is another data set"):
        describe(other, scans, "encode")
    assert (other / "dataset_description.json").read_text() == text
