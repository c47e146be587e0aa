"""Checking a data set: planted faults are found and named, good scans are left in peace."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import PROCESS, run_command, run_command_process

from scripts.check import check
from scripts.data.check_report import summary, table
from scripts.phantoms import brain_phantom, make_ellipsoids

SPACING = 8.0

brain_phantom = lru_cache(brain_phantom)


def save(path, image, affine, sform=4, qform=4):
    nifti = nib.Nifti1Image(image, affine)
    nifti.set_sform(affine, sform)
    nifti.set_qform(affine, qform)
    nib.save(nifti, path)
    return path


def plant(folder: Path) -> dict[str, tuple[str, str]]:
    """Twenty-odd faults, each in a brain of its own: name -> verdict, and a word of the reason."""
    planted = {}
    numbers = iter(range(1000, 1100))

    def name(fault: str, verdict: str, word: str, suffix: str = ".nii.gz"):
        planted[f"{fault}{suffix}"] = (verdict, word)
        image, affine, _ = brain_phantom(next(numbers) if verdict == "suspicious" else 999, spacing=SPACING)
        return folder / f"{fault}{suffix}", image, affine

    path, image, affine = name("truncated", "unusable", "truncated")
    save(path, image, affine)
    path.write_bytes(path.read_bytes()[:3000])
    path, image, affine = name("truncated-plain", "unusable", "truncated", ".nii")
    save(path, image, affine)
    path.write_bytes(path.read_bytes()[:3000])
    path, image, affine = name("bit-flip", "unusable", "checksum")
    save(path, image, affine)
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    name("zero-bytes", "unusable", "0 bytes")[0].touch()
    path, image, affine = name("gzip-called-nii", "unusable", "rename", ".nii")
    path.write_bytes(gzip.compress(nib.Nifti1Image(image, affine).to_bytes()))
    path, image, affine = name("nifti-called-nrrd", "suspicious", "passed over", ".nrrd")
    path.write_bytes(nib.Nifti1Image(image, affine).to_bytes())
    path, image, affine = name("plain-called-gz", "unusable", "rename")
    path.write_bytes(nib.Nifti1Image(image, affine).to_bytes())
    name("text", "unusable", "not an image")[0].write_text("Dear colleague,\n" * 100)
    path, image, affine = name("four-dimensional", "unusable", "4D")
    save(path, np.stack([image] * 3, -1), affine)
    for fault, value in (("nan", np.nan), ("infinite", np.inf)):
        path, image, affine = name(fault, "unusable", "NaN or infinite")
        image = image.astype(np.float32)
        image[9, 9, 9] = value
        save(path, image, affine)
    path, image, affine = name("constant", "unusable", "constant")
    save(path, np.full_like(image, 7), affine)
    path, image, affine = name("singular", "unusable", "singular")
    nifti = nib.Nifti1Image(image, None)
    nifti.set_sform(affine * [[0], [1], [1], [1]], 1)
    nib.save(nifti, path)
    path, image, affine = name("complex", "unusable", "complex")
    save(path, image.astype(np.complex64), affine)
    path, image, affine = name("colour", "unusable", "RGB")
    colours = np.zeros(image.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = image // 20
    save(path, colours, affine)
    path, image, affine = name("forbidden", "unusable", "permissions")
    save(path, image, affine).chmod(0)
    name("link", "unusable", "link")[0].symlink_to("nowhere.nii.gz")
    path, image, affine = name("no-slices", "unusable", "empty", ".nii")
    nib.save(nib.Nifti1Image(image[:, :, :0], affine), path)

    path, image, affine = name("no-affine", "suspicious", "neither an sform nor a qform")
    save(path, image, affine, sform=0, qform=0)
    path, image, affine = name("two-affines", "suspicious", "disagree")
    nifti = nib.Nifti1Image(image, affine)
    nifti.set_sform(affine, 4)
    nifti.set_qform(affine @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(nifti, path)
    path, image, affine = name("other-pixdim", "suspicious", "pixdim")
    nifti = nib.Nifti1Image(image, None)
    nifti.set_sform(affine, 4)
    nib.save(nifti, path)
    path, image, affine = name("thick-slices", "suspicious", "8×8×16 mm where 8×8×8 mm are usual")
    save(path, image[:, :, ::2], affine @ np.diag([1, 1, 2, 1]))
    path, image, affine = name("mirrored", "suspicious", "LAS where RAS is usual")
    save(path, image, affine @ np.diag([-1, 1, 1, 1]))
    path, image, affine = name("sub-0007_copy", "suspicious", "'sub-0007_FLAIR.nii.gz'", ".nii")
    nifti = nib.load(folder / "sub-0007_FLAIR.nii.gz")
    save(path, np.asarray(nifti.dataobj).astype(np.float64), nifti.affine)
    path, image, affine = name("upside-down", "suspicious", "unlike")
    save(path, image[:, :, ::-1], affine)
    path, image, affine = name("noise", "suspicious", "unlike")
    save(path, np.random.default_rng(0).normal(500, 100, image.shape).astype(np.int16), affine)
    path, image, affine = name("inverted", "suspicious", "unlike")
    save(path, np.where(image > 0, image.max() + 1 - image, 0), affine)
    path, image, affine = name("z-scored", "unusable", "that is not its lowest value")
    save(path, ((image - image[image > 0].mean()) / image[image > 0].std() * (image > 0)).astype(np.float32), affine)
    path, image, affine = name("mask", "suspicious", "two values")
    save(path, (image > 0).astype(np.uint8), affine)
    return planted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """200 good brains, the planted faults, and what stands beside scans in any data set."""
    folder = tmp_path_factory.mktemp("data") / "scans"
    folder.mkdir()
    for index in range(100):
        image, affine, _ = brain_phantom(index, spacing=SPACING)
        save(folder / f"sub-{2 * index:04d}_FLAIR.nii.gz", image, affine)
        # The mirror image of a brain, on another contrast, is another good brain at no cost.
        other = np.rint(image[::-1].astype(float) ** 1.05).astype(np.int16)
        save(folder / f"sub-{2 * index + 1:04d}_FLAIR.nii.gz", other, affine)
    planted = plant(folder)
    (folder / "participants.tsv").write_text("participant_id\tage\n")
    (folder / "sub-0000_FLAIR.json").write_text("{}")
    (folder / "._sub-0000_FLAIR.nii.gz").write_bytes(b"what macOS leaves")
    yield folder, planted
    (folder / "forbidden.nii.gz").chmod(0o600)


@pytest.fixture(scope="module")
def report(dataset, tmp_path_factory):
    return check(dataset[0], output_dir=tmp_path_factory.mktemp("report"), workers=1)


def rows_of(report) -> dict:
    return {scan.path: scan for scan in [*report.scans, *report.passed_over]}


def test_every_fault_is_found_and_named(dataset, report):
    rows = rows_of(report)
    for name, (verdict, word) in dataset[1].items():
        assert rows[name].verdict == verdict, (name, rows[name].reasons)
        assert word in "; ".join(rows[name].reasons), name
    assert not report.passed


def test_no_good_scan_is_accused(dataset, report):
    accused = {path: scan.reasons for path, scan in rows_of(report).items() if scan.verdict != "good"}
    assert set(accused) == set(dataset[1]), accused


def test_every_file_is_accounted_for(dataset, report):
    names = {path.name for path in dataset[0].iterdir() if not path.name.startswith(".")}
    assert len(report.scans) + report.suffixes.total() == len(names - {"participants.tsv"})  # which is read
    assert report.suffixes == {".json": 1, ".nrrd": 1}


def test_the_csv_has_a_row_a_scan_and_the_sheet_shows_the_suspicious(dataset, report):
    with (report.folder / "report.csv").open(encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(rows_of(report))
    good = rows["sub-0007_FLAIR.nii.gz"]
    assert (good["subject"], good["verdict"], good["reasons"]) == ("sub-0007", "good", "")
    assert (good["shape"], good["spacing"], good["orientation"], good["dtype"]) == ("25x30x24", "8x8x8", "RAS", "int16")
    image = np.asarray(nib.load(dataset[0] / "sub-0007_FLAIR.nii.gz").dataobj)
    assert [float(good[name]) for name in ("minimum", "median", "maximum", "finite")] == [0, 0, image.max(), 1]
    assert float(good["percentile_99"]) == pytest.approx(np.percentile(image, 99), rel=1e-5)
    assert float(good["background"]) == pytest.approx(np.mean(image <= 0.05 * np.percentile(image, 99)), rel=1e-5)
    assert float(good["similarity"]) > float(rows["inverted.nii.gz"]["similarity"])
    assert rows["sub-0007_copy.nii"]["duplicate_of"] == "sub-0007_FLAIR.nii.gz"
    assert (report.folder / "contact_sheet.png").stat().st_size > 100_000


def test_a_parallel_run_gives_the_same_report(dataset, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in [*sorted(dataset[0].glob("sub-000*_FLAIR*")), *(dataset[0] / name for name in dataset[1])]:
        (folder / path.name).symlink_to(path)
    for workers in (1, 2):
        check(folder, output_dir=tmp_path / str(workers), workers=workers)
    for name in ("report.csv", "contact_sheet.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_ellipsoids_differ_from_each_other_and_are_all_good(tmp_path):
    folder = make_ellipsoids(tmp_path / "ellipsoids", 20, size=16, workers=1)
    report = check(folder, output_dir=tmp_path / "report", workers=1, strict=True)
    assert report.passed, [scan.reasons for scan in report.scans]


def test_two_kinds_of_scan_in_one_cohort_are_both_good(dataset, tmp_path):
    for index in range(30):
        nifti = nib.load(dataset[0] / f"sub-{2 * index:04d}_FLAIR.nii.gz")
        image, affine = np.asarray(nifti.dataobj), nifti.affine
        if index % 3 == 0:  # another contrast, voxel size and orientation
            image, affine = (image.max() + 1 - image) * (image > 0), affine @ np.diag([-1, 1, 1, 1])
            image = image[:, :-4]
        save(tmp_path / f"{index}.nii", image, affine)
    report = check(tmp_path, output_dir=tmp_path / "report", workers=1, strict=True)
    assert report.passed, [scan.reasons for scan in report.scans]


def test_another_field_of_view_among_equal_ones_is_named(dataset, tmp_path):
    for index in range(12):
        shutil.copy(dataset[0] / f"sub-{index:04d}_FLAIR.nii.gz", tmp_path)
    nifti = nib.load(dataset[0] / "sub-0012_FLAIR.nii.gz")
    save(tmp_path / "padded.nii", np.pad(np.asarray(nifti.dataobj), [(0, 0), (0, 4), (0, 0)]), nifti.affine)
    report = check(tmp_path, output_dir=tmp_path / "report", workers=1)
    (found,) = (scan for scan in report.scans if scan.verdict != "good")
    assert found.path == "padded.nii"
    assert any("field of view" in reason and "are usual" in reason for reason in found.reasons), found.reasons


def test_two_scans_are_not_compared_with_each_other(dataset, tmp_path):
    shutil.copy(dataset[0] / "noise.nii.gz", tmp_path)
    shutil.copy(dataset[0] / "inverted.nii.gz", tmp_path)
    report = check(tmp_path, output_dir=tmp_path / "report", workers=1)
    assert [(scan.verdict, scan.similarity) for scan in report.scans] == [("good", None)] * 2


def test_geometry_that_is_asked_for(dataset, tmp_path):
    shutil.copy(dataset[0] / "sub-0000_FLAIR.nii.gz", tmp_path)
    options = {"output_dir": tmp_path / "report", "workers": 1, "strict": True}
    good = check(tmp_path, spacing=8, field_of_view=(200, 240, 192), orientation="RAS", **options)
    assert good.passed
    bad = check(tmp_path, spacing=(8, 8, 1), field_of_view=100, orientation="LPS", **options)
    assert not bad.passed
    assert [reason.split(" where ")[1] for reason in bad.scans[0].reasons] == [
        "8×8×1 mm are expected",
        "100×100×100 mm are expected",
        "LPS is expected",
    ]


def test_converted_copies_are_duplicates(dataset, tmp_path):
    image = SimpleITK.ReadImage(str(dataset[0] / "sub-0003_FLAIR.nii.gz"))
    for name in ("a.nii.gz", "b.nrrd", "c.mha"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, "PIL"), str(tmp_path / "d.nii"))
    report = check(tmp_path, "[a-d].*", output_dir=tmp_path / "report", workers=1)
    assert [scan.duplicate_of for scan in report.scans] == [None, "a.nii.gz", "a.nii.gz", "a.nii.gz"]
    assert [scan.dtype for scan in report.scans] == ["int16"] * 4


def test_channels_of_several_files(dataset, tmp_path):
    for subject in ("sub-0000", "sub-0001"):
        for channel in ("T1w", "FLAIR"):
            shutil.copy(dataset[0] / f"{subject}_FLAIR.nii.gz", tmp_path / f"{subject}_{channel}.nii.gz")
    patterns = ["*_T1w.nii.gz", "*_FLAIR.nii.gz"]
    report = check(tmp_path, patterns, tmp_path / "report", workers=1)
    assert [scan.path for scan in report.scans] == [
        "sub-0000_T1w.nii.gz;sub-0000_FLAIR.nii.gz",
        "sub-0001_T1w.nii.gz;sub-0001_FLAIR.nii.gz",
    ]
    assert report.passed and not report.suffixes
    (tmp_path / "sub-0001_T1w.nii.gz").write_text("no scan")
    report = check(tmp_path, patterns, tmp_path / "report", workers=1)
    lines = table(report.scans).splitlines()
    assert lines[:2] == ["unusable    sub-0001_T1w.nii.gz", "            sub-0001_FLAIR.nii.gz"]
    assert lines[2].startswith("              'sub-0001_T1w.nii.gz' cannot be read as an image (")
    assert "--scan_policy skip" in summary(report)
    assert "scripts.prepare" not in summary(report)  # they are aligned already
    with pytest.raises(ValueError, match="scan_pattern gives 2 channels, but channels is 3"):
        check(tmp_path, patterns, tmp_path / "report", channels=3)


def test_two_dimensions(dataset, tmp_path):
    for index in range(12):
        nifti = nib.load(dataset[0] / f"sub-{2 * index:04d}_FLAIR.nii.gz")
        save(tmp_path / f"{index}.nii", np.asarray(nifti.dataobj)[:, :, 12], nifti.affine)
    report = check(tmp_path, output_dir=tmp_path / "report", workers=1, spatial_dims=2, strict=True)
    assert report.passed, [scan.reasons for scan in report.scans]
    assert (report.folder / "contact_sheet.png").is_file()


def test_results_that_are_left_out_are_named_once(tmp_path, caplog):
    image, affine, _ = brain_phantom(0, spacing=SPACING)
    for name in ("a.nii.gz", "a_recon.nii.gz"):
        save(tmp_path / name, image, affine)
    report = check(tmp_path, output_dir=tmp_path / "report", workers=1)
    assert caplog.text.count("are left out, since they are named as results") == 1 and not report.passed_over


def test_images_that_the_pattern_passes_over_are_listed_but_not_accused(dataset, tmp_path):
    for name in ("sub-0000_FLAIR.nii.gz", "sub-0000_T1w.nii.gz"):
        shutil.copy(dataset[0] / "sub-0000_FLAIR.nii.gz", tmp_path / name)
    report = check(tmp_path, "*_FLAIR.nii.gz", tmp_path / "report", workers=1, strict=True)
    assert [(row.path, row.verdict) for row in report.passed_over] == [("sub-0000_T1w.nii.gz", "passed over")]
    assert report.passed


def test_the_command_line_prints_the_worst_first_and_fails(dataset, tmp_path):
    for name in ("text.nii.gz", "sub-0007_copy.nii", "sub-0007_FLAIR.nii.gz"):
        shutil.copy(dataset[0] / name, tmp_path)
    done = run_command_process("scripts.check", tmp_path, "--output_dir", tmp_path / "report", timeout=60)
    assert done.returncode == 1, done.stderr
    verdicts = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("unusable", "suspicious"))]
    assert verdicts == [["unusable", "text.nii.gz"], ["suspicious", "sub-0007_copy.nii"]]
    assert "3 scan(s): 1 unusable, 1 suspicious, 1 good." in done.stdout


def test_a_misspelt_option_is_another_exit_code(tmp_path):
    done = run_command("scripts.check", tmp_path, "--strikt", True, "--output_dir", tmp_path / "report")
    assert done.returncode == 2 and done.stderr == "Error: there is no option --strikt: did you mean --strict?\n"
    assert not (tmp_path / "report").exists()


def test_a_datalist_may_name_the_scans(dataset, tmp_path):
    listed = [str(dataset[0] / "mask.nii.gz"), "sub-1_T1w.nii.gz"]
    shutil.copy(dataset[0] / "sub-0000_FLAIR.nii.gz", tmp_path / listed[1])
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": listed[0], "subject": "x"}], "testing": [{"image": listed[1]}]}))
    report = check(path, output_dir=tmp_path / "report", workers=1)
    assert [scan.path for scan in report.scans] == [os.path.relpath(listed[0], tmp_path), listed[1]]
    assert [scan.subject for scan in report.scans] == ["x", "sub-1"] and not report.suffixes


def test_suspicious_scans_fail_only_a_strict_check(dataset, tmp_path):
    shutil.copy(dataset[0] / "mask.nii.gz", tmp_path)
    assert check(tmp_path, output_dir=tmp_path / "report", workers=1).passed
    assert not check(tmp_path, output_dir=tmp_path / "report", workers=1, strict=True).passed


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"channels": 1.5},
        {"spatial_dims": 4},
        {"spacing": -1},
        {"spacing": (1, 1)},
        {"field_of_view": "large"},
        {"orientation": "RAR"},
        {"orientation": 3},
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(tmp_path, options):
    (tmp_path / "a.nii").touch()
    with pytest.raises(ValueError, match=next(iter(options))):
        check(tmp_path, output_dir=tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_the_report_goes_into_the_data_set_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / "a.nii").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="set --output_dir"):
        check(tmp_path)
    assert not check(tmp_path, output_dir="inside").passed
    assert (tmp_path / "inside" / "report.csv").is_file()


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "a.nii").touch()
    with pytest.raises(NotADirectoryError, match="output_dir"):
        check(tmp_path, output_dir=tmp_path / "a.nii")


def test_ctrl_c_ends_at_once(dataset, tmp_path):
    scan, scans = dataset[0] / "sub-0000_FLAIR.nii.gz", tmp_path / "scans"
    scans.mkdir()
    for index in range(4000):  # more than are read before the signal comes, on any machine
        os.link(scan, scans / f"sub-{index:04d}.nii.gz")
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.check", scans, "--output_dir", tmp_path / "report", "--workers", "1"],
        env=os.environ | PROCESS,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        # a shell that runs the tests in the background lets its children ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.stderr.read(1) != "s":  # of the progress bar, which has no line ends
        pass
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Stopped" in error and "100%" not in error
    assert not (tmp_path / "report").exists() or not list((tmp_path / "report").iterdir())
