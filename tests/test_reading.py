"""What is wrong with a file is said by its name, before it costs memory, and what can be read rightly is."""

from __future__ import annotations

import gzip
import logging
import math
import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import brain, save
from test_formats import write_dicom

from scripts.data.find import find_by_wildcards, find_scans
from scripts.data.transforms import CheckScand, FitShaped, LoadScand, RobustScaled, ScanError
from scripts.utils.errors import sentence
from scripts.utils.files import write_csv, write_text
from scripts.utils.formats import save_nifti

SCANS = Path(__file__).parent / "scans"  # as people have them


def read(path):
    return CheckScand("image")(LoadScand("image")({"image": str(path)}))["image"]


def huge_header(path, shape, dtype=np.float32):
    """A file whose header claims far more voxels than it holds."""
    header = nib.Nifti2Header() if max(shape) > 32767 else nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.eye(4), 1)
    data = header.binaryblock + bytes(4096)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_claims_terabytes_is_refused_with_its_size(tmp_path, suffix):
    path = huge_header(tmp_path / f"scan{suffix}", (20000, 20000, 20000))
    with pytest.raises(ScanError, match=rf"scan{suffix}' has 20000×20000×20000 voxels by its header, 29,802 GiB"):
        LoadScand("image")({"image": str(path)})
    with pytest.raises(ScanError, match=r"scan2.nii' has 900"):  # of several channels the one that is
        LoadScand("image")({"image": [save(tmp_path / "a.nii", np.ones((4, 4, 4))), str(_named(tmp_path))]})


def _named(folder):
    return huge_header(folder / "scan2.nii", (900, 900, 900), np.float64)


def test_the_limit_is_a_setting(tmp_path):
    path = save(tmp_path / "scan.nii", np.random.rand(64, 64, 64))
    assert LoadScand("image")({"image": path})["image"].shape == (1, 64, 64, 64)
    with pytest.raises(ScanError, match=r"more than the 0.0001 GiB that a scan may take \(max_gib of LoadScand\)"):
        LoadScand("image", max_gib=0.0001)({"image": path})


def test_gzip_that_unpacks_to_more_than_its_header_says_is_refused(tmp_path):
    path = Path(save(tmp_path / "scan.nii", np.random.rand(8, 8, 8)))
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(1 << 23)))
    with pytest.raises(ScanError, match=r"unpacks to more than 0.001 GiB"):
        LoadScand("image", max_gib=0.001)({"image": str(tmp_path / "scan.nii.gz")})


def test_a_wrong_checksum_of_gzip_is_refused_wherever_a_scan_is_read(tmp_path):
    path = Path(save(tmp_path / "scan.nii.gz", np.random.rand(8, 8, 8)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum, behind the last voxel
    path.write_bytes(data)
    with pytest.raises(ScanError, match=r"scan.nii.gz' can be read, but its gzip checksum is wrong"):
        read(path)


@pytest.mark.parametrize(("name", "unit"), [("metres", "meters"), ("microns", "microns")])
def test_sizes_are_read_in_their_unit_and_that_is_noted(name, unit):
    image = read(SCANS / f"{name}.nii.gz")
    assert image.meta["geometry"]["spacing"] == pytest.approx([6, 6, 6])
    np.testing.assert_allclose(image.affine[:3, 3], [-98, -134, -72], rtol=1e-5)
    assert image.meta["differences"] == [f"its header gives sizes in {unit}, which are read as such"]


def test_voxels_far_smaller_than_the_grids_are_refused_by_name(tmp_path):
    path = save(tmp_path / "tiny.nii", np.random.rand(8, 8, 8), np.diag([1e-3, 1e-3, 1e-3, 1]))
    fit = FitShaped("image", 8, box=[[0.0] * 3, [200.0] * 3])
    with pytest.raises(ScanError, match=r"tiny.nii' has voxels far smaller than the network's"):
        fit({"image": read(path)})


def test_a_range_of_values_that_cannot_be_scaled_is_refused_by_name(tmp_path):
    values = np.random.default_rng(0).integers(0, 200, (8, 8, 8)) * np.float32(1e-45)
    data = {"image": read(save(tmp_path / "faint.nii", values))}
    with pytest.raises(ScanError, match=r"faint.nii' has values that differ by \S+ only"):
        RobustScaled("image")(data)


def test_dicom_slices_that_are_missing_are_named(tmp_path):
    with zipfile.ZipFile(SCANS / "dicom_missing_slices.zip") as archive:
        archive.extractall(tmp_path)
    folder = next(tmp_path.rglob("*.dcm")).parent
    with pytest.raises(ScanError, match=r"not evenly spaced: 6 DICOM slice\(s\) of 6 mm are missing between 0 and 42"):
        read(folder)


def test_dicom_slices_at_one_place_and_several_series_are_refused(tmp_path):
    image, affine = np.random.default_rng(0).integers(1, 900, (12, 12, 10)).astype(np.int16), np.diag([2.0, 2, 2, 1])
    folder = write_dicom(tmp_path / "series", image, affine)
    assert read(folder).shape == (1, 12, 12, 10)
    twice = write_dicom(tmp_path / "echo", image, affine)
    for path in sorted(twice.iterdir())[:3]:
        shutil.copy(path, twice / f"again_{path.name}")
    with pytest.raises(ScanError, match=r"holds 3 DICOM slice\(s\) where another one lies, such as at"):
        read(twice)
    for path in folder.iterdir():
        data = path.read_bytes().replace(b"3680043.2.1125.1", b"3680043.2.1126.1")
        (tmp_path / "echo" / f"other_{path.name}").write_bytes(data)
    with pytest.raises(ScanError, match=r"holds 2 DICOM series \(1.2.826\S+, 1.2.826\S+\)"):
        read(twice)


@pytest.mark.parametrize("name", ["scan.NII.GZ", "scan.hdr"])
def test_headers_are_judged_whatever_the_suffix(tmp_path, name):
    image = (nib.Nifti1Pair if name.endswith(".hdr") else nib.Nifti1Image)(np.random.rand(8, 8, 8), None)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / ("scan.img" if name.endswith(".hdr") else "scan.nii.gz"))
    if name.endswith(".GZ"):
        (tmp_path / "scan.nii.gz").rename(tmp_path / name)
    assert any("neither an sform nor a qform" in problem for problem in read(tmp_path / name).meta["differences"])


def test_nan_around_the_brain_is_background_and_within_it_is_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    values = brain(16)[0].numpy() + 1
    values[values == 1] = np.nan
    values[0, 0, 0], values[0, 0, 1], values[0, 1, 0], values[1, 0, 0] = np.nan, 2, 2, 2
    values[1, 1, 1], values[:2, :2, 2], values[:2, 2, :2], values[2, :2, :2] = np.nan, 2, 2, 2  # joined by a corner
    image = read(save(tmp_path / "spm.nii", values))
    assert np.isfinite(image).all() and float(image.min()) == pytest.approx(np.nanmin(values))
    assert f"'{tmp_path / 'spm.nii'}': NaN in" in caplog.text and "is taken for background" in caplog.text
    values[8, 8, 8] = np.nan
    with pytest.raises(ScanError, match=r"has 1 NaN or infinite voxel\(s\) .* within the brain"):
        read(save(tmp_path / "hole.nii", values))


def test_pointers_and_other_formats_are_said_by_name(tmp_path):
    (tmp_path / "lfs.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/aa/bb/SHA256E-s3--c.nii.gz")
    (tmp_path / "unlocked.nii.gz").write_bytes(b"/annex/objects/MD5E-s3--c.nii.gz\n")
    nib.save(nib.MGHImage(np.random.rand(8, 8, 8).astype(np.float32), np.eye(4)), tmp_path / "t1.mgz")
    for name, message in (
        ("lfs.nii.gz", "pointer of Git LFS, not the scan itself: fetch that by `git lfs pull`"),
        ("annex.nii.gz", "has not been fetched by git-annex: fetch it by `git annex get`"),
        ("unlocked.nii.gz", "has not been fetched by git-annex: fetch it by `git annex get`"),
        ("t1.mgz", "is in FreeSurfer's format: convert it by `mri_convert t1.mgz t1.nii.gz`"),
    ):
        with pytest.raises(ScanError, match=message):
            read(tmp_path / name)


def test_what_a_bids_data_set_holds_beside_its_scans_is_no_scan(tmp_path):
    names = [f"{folder}sub-1/anat/sub-1_T1w.nii.gz" for folder in ("", "derivatives/prep/", "sourcedata/", "code/")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert find_scans(tmp_path, "*_T1w.nii.gz") == [tmp_path / names[0]]
    assert find_scans(tmp_path, "derivatives/prep/sub-*/anat/*.nii.gz") == [tmp_path / names[1]]
    assert len(find_scans(tmp_path / "derivatives", "*_T1w.nii.gz")) == 1
    assert len(find_by_wildcards(tmp_path, "*_T1w.nii.gz", "mask_dir", "mask_pattern")) == 4


def test_a_pattern_of_nifti_matches_nifti_alone(tmp_path):
    for name in ("a.nii.gz", "a.nii.gz.md5", "b.nii.gz.part", "c.nii.gz~", "d.nii", "E.NII.GZ"):
        (tmp_path / name).touch()
    assert [path.name for path in find_scans(tmp_path)] == ["a.nii.gz", "d.nii"]


def test_names_of_any_bytes_and_lengths_are_written(tmp_path):
    name = os.fsdecode("Köln.nii".encode("latin-1"))
    write_csv(tmp_path / "t.csv", ["image"], [[name]])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "image\nK\\udcf6ln.nii\n"
    write_text(tmp_path / ("x" * 255), "text")
    with pytest.raises(OSError, match="name too long") as error:
        write_text(tmp_path / ("x" * 256), "text")
    assert "has a longer name than its file system allows: give it a shorter one" in sentence(error.value)


def test_what_is_written_says_its_unit(tmp_path):
    save_nifti(tmp_path / "scan.nii.gz", brain(8).as_tensor(), np.eye(4))
    assert nib.load(tmp_path / "scan.nii.gz").header.get_xyzt_units()[0] == "mm"
    assert math.isfinite(float(read(tmp_path / "scan.nii.gz").max()))
