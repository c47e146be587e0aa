"""Preprocessed scans on disk: computed once, never stale, never torn; and what a run does about unusable scans."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import brain, save
from joblib import delayed
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd

from scripts.data.cache import ScanCache, read_cohort
from scripts.data.transforms import CheckScand, FitShaped, LoadScand, RobustScaled, ScanError
from scripts.utils.files import write_whole
from scripts.utils.parallel import run_parallel


def preprocessing(size=8, upper=99.95, **expected):
    return Compose(
        [
            LoadScand("image"),
            CheckScand("image", **expected),
            Orientationd("image", axcodes="RAS", labels=None),
            FitShaped("image", size),
            RobustScaled("image", upper=upper),
        ]
    )


@pytest.fixture
def items(tmp_path):
    (tmp_path / "scans").mkdir()
    return [{"image": save(tmp_path / f"scans/{i}.nii", (100 + i) * brain(12)[0].numpy())} for i in range(3)]


def cache(items, tmp_path, **settings):
    half = settings.pop("half_precision", False)
    return ScanCache(items, preprocessing(**settings), tmp_path / "cache", half)


def test_a_scan_is_computed_once(items, tmp_path, monkeypatch):
    first = cache(items, tmp_path)[1]["image"]
    direct = preprocessing()(items[1])["image"]
    assert isinstance(first, MetaTensor)
    assert torch.equal(first.as_tensor(), direct.as_tensor())
    assert torch.equal(first.affine, direct.affine)
    assert first.meta["filename_or_obj"] == items[1]["image"]
    monkeypatch.setattr(LoadScand, "__call__", lambda *_: pytest.fail("it was read again"))
    again = cache(items, tmp_path)[1]["image"]
    assert torch.equal(again.as_tensor(), first.as_tensor())
    assert cache(items, tmp_path).notes(1)["geometry"]["spacing"] == [1, 1, 1]


def test_a_changed_file_is_read_again_even_at_the_same_size_and_time(items, tmp_path):
    before, path = cache(items, tmp_path)[0]["image"], items[0]["image"]
    status = Path(path).stat()
    save(path, 100 * brain(12)[0].numpy()[::-1, :, ::-1].copy())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Path(path).stat().st_size == status.st_size
    assert not torch.equal(cache(items, tmp_path)[0]["image"].as_tensor(), before.as_tensor())


def test_a_changed_slice_of_a_series_and_changed_voxels_beside_a_header_are_seen(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for name in ("series/1.dcm", "series/2.dcm", "scan[1].mhd", "scan[1].raw"):
        (tmp_path / name).write_text(name)
    items = [{"image": str(series)}, {"image": str(tmp_path / "scan[1].mhd")}]
    before = [cache(items, tmp_path).path(i) for i in range(2)]
    assert [cache(items, tmp_path).path(i) for i in range(2)] == before
    (series / "2.dcm").write_text("another")
    (tmp_path / "scan[1].raw").write_text("another")
    assert not set(before) & {cache(items, tmp_path).path(i) for i in range(2)}


@pytest.mark.parametrize("settings", [{"size": 10}, {"upper": 99.0}, {"spacing": 1.0}, {"half_precision": True}])
def test_another_setting_is_another_file(items, tmp_path, settings):
    assert cache(items, tmp_path).path(0) != cache(items, tmp_path, **settings).path(0)


def test_reading_changes_no_name(items, tmp_path):
    """What a reader remembers of the last file is no setting."""
    transform = preprocessing()
    before = ScanCache(items, transform, tmp_path / "cache")
    name = before.path(0)
    before[0], before[1]
    assert ScanCache(items, transform, tmp_path / "cache").path(0) == name


def name_of_the_first(items, folder):
    return cache(items, folder).path(0)


def test_every_process_finds_the_same_file(items, tmp_path):
    """Each of joblib's processes has a seed of its own for the hashes of strings."""
    names = list(run_parallel([delayed(name_of_the_first)(items, tmp_path)] * 2, 2, "naming"))
    assert names == [name_of_the_first(items, tmp_path)] * 2


def test_half_precision_halves_the_file_and_keeps_the_image(items, tmp_path):
    full, half = cache(items, tmp_path, size=24), cache(items, tmp_path, size=24, half_precision=True)
    assert (half[0]["image"] - full[0]["image"]).abs().max() < 0.00025
    assert half[0]["image"].dtype == torch.float32
    assert half.path(0).stat().st_size < 0.55 * full.path(0).stat().st_size


def flip_a_byte(data):
    """In the middle, where the voxels are: PyTorch itself would not see it."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


DAMAGES = [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"not a tensor" * 99, flip_a_byte]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_anew(items, tmp_path, damage):
    dataset = cache(items, tmp_path)
    before = dataset[0]["image"]
    dataset.path(0).write_bytes(damage(dataset.path(0).read_bytes()))
    with pytest.warns(UserWarning, match="is damaged; it is computed again"):
        after = dataset[0]["image"]
    assert torch.equal(after.as_tensor(), before.as_tensor())
    assert torch.equal(dataset[0]["image"].as_tensor(), before.as_tensor())


def write_half_and_die(items, tmp_path):
    """What a killed process leaves: half of the bytes of a file that it was writing."""

    def save_half(entry, file):
        whole(entry, file)
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    whole, torch.save = torch.save, save_half
    cache(items, tmp_path)[0]


def test_what_a_killed_process_left_is_never_served(items, tmp_path):
    process = os.fork()
    if process == 0:
        write_half_and_die(items, tmp_path)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    dataset = cache(items, tmp_path)
    assert left != dataset.path(0)
    assert not dataset.path(0).exists()
    assert torch.equal(dataset[0]["image"].as_tensor(), preprocessing()(items[0])["image"].as_tensor())


def test_several_processes_may_fill_one_cache(items, tmp_path):
    dataset = cache(items, tmp_path)
    jobs = [delayed(dataset.__getitem__)(index) for index in [0, 1, 2, 0, 1, 2]]
    read = list(run_parallel(jobs, 2, "reading"))
    for index in range(3):
        assert torch.equal(read[index]["image"], read[index + 3]["image"])
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_without_a_folder_nothing_is_kept(items, tmp_path):
    dataset = ScanCache(items, preprocessing(), None)
    assert dataset.path(0) is None
    assert torch.equal(dataset[0]["image"].as_tensor(), preprocessing()(items[0])["image"].as_tensor())


# The cohort


@pytest.fixture
def cohort(items, tmp_path):
    """Three good scans, one with thick slices, one that is empty."""
    thick = save(tmp_path / "scans/thick.nii", brain(12)[0].numpy()[..., ::4], np.diag([1.0, 1.0, 4.0, 1.0]))
    (tmp_path / "scans/void.nii").touch()
    bad = [{"image": thick}, {"image": str(tmp_path / "scans/void.nii")}]
    return {"training": items[:2] + bad, "validation": items[2:]}


def read(datalist, tmp_path, policy, **expected):
    return read_cohort(
        datalist, preprocessing(**expected), tmp_path / "cache", policy=policy, skipped_file=tmp_path / "skipped.csv"
    )


def test_skip_leaves_out_what_cannot_be_used_and_says_why(cohort, tmp_path, caplog):
    with caplog.at_level("INFO"):
        kept = read(cohort, tmp_path, "skip", spacing=1.0)
    assert kept == {"training": cohort["training"][:2], "validation": cohort["validation"]}
    with (tmp_path / "skipped.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [item["image"] for item in cohort["training"][2:]]
    assert "has voxels of 1×1×4 mm where 1×1×1 mm are expected" in rows[0]["reason"]
    assert rows[1]["reason"] == "it is an empty file (0 bytes)"
    assert "2 scan(s) are left out" in caplog.text
    assert "void.nii': it is an empty file (0 bytes)." in caplog.text
    assert "leave it out" not in caplog.text
    assert caplog.messages[-2:] == ["Training: 2 scans.", f"Validation: {len(cohort['validation'])} scan."]


@pytest.mark.parametrize("policy", ["warn", "fail"])
def test_a_scan_that_cannot_be_used_ends_the_run_by_its_sentence(cohort, tmp_path, policy):
    with pytest.raises(ScanError, match=r"void.nii' is an empty file"):
        read(cohort, tmp_path, policy)


def test_warn_keeps_odd_scans_and_names_them(cohort, tmp_path, caplog):
    cohort["training"].pop()
    assert read(cohort, tmp_path, "warn", spacing=1.0) == cohort
    assert "1 scan(s) differ from what is expected" in caplog.text
    caplog.clear()
    assert read(cohort, tmp_path, "warn") == cohort  # nothing is expected: the cohort is its own measure
    assert "1 scan(s) of 4 have other voxel sizes than most" in caplog.text
    assert "thick.nii': it has voxels of 1×1×4 mm" in caplog.text


def test_fail_ends_the_run_for_odd_scans(cohort, tmp_path):
    cohort["training"].pop()
    with pytest.raises(ScanError, match=r"thick.nii': it has voxels of .* scan_policy is 'fail'"):
        read(cohort, tmp_path, "fail", spacing=1.0)
    assert read(cohort, tmp_path, "fail") == cohort


def test_a_side_of_which_nothing_is_left(cohort, tmp_path):
    cohort["validation"] = cohort["training"][-1:]
    with pytest.raises(ScanError, match=r"No scan of the validation side can be used. The first, '.*void"):
        read(cohort, tmp_path, "skip")
    assert not (tmp_path / "skipped.csv").exists()


def test_unknown_policy(cohort, tmp_path):
    with pytest.raises(ValueError, match="scan_policy is 'ignore': it must be one of warn, skip, fail"):
        read(cohort, tmp_path, "ignore")


def test_processes_read_what_one_reads(tmp_path):
    paths = [save(tmp_path / f"{i:02d}.nii", np.random.rand(6, 6, 6)) for i in range(30)]
    (tmp_path / "07.nii").write_bytes(b"")
    datalist = {"training": [{"image": path} for path in paths]}
    kept = [
        read_cohort(datalist, preprocessing(), tmp_path / f"cache{workers}", policy="skip", workers=workers)
        for workers in (1, 2)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]["training"]) == 29
    names = [sorted(p.name for p in (tmp_path / f"cache{workers}").iterdir()) for workers in (1, 2)]
    assert names[0] == names[1]
    assert len(names[0]) == 29


def test_writers_with_one_process_number_do_not_write_to_one_file(tmp_path):
    """Two containers that share a folder: the second writes while the first does."""

    def write_first(temporary):
        Path(temporary).write_text("first")
        write_whole(tmp_path / "entry.pt", lambda other: Path(other).write_text("second"))
        assert Path(temporary).read_text() == "first"

    write_whole(tmp_path / "entry.pt", write_first)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.pt"]
    assert (tmp_path / "entry.pt").read_text() == "first"
