"""Raw heads with a known truth: phantoms' brains within a simulated head, moved, in all kinds of files.

``PYTHONPATH=tests python -m test_prepare phantoms`` measures how well ten of them are aligned, and the same with
``people HEADS MASKS`` how well the masks of real heads are found.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import run_command_process
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scripts import prepare as module
from scripts.data import registration
from scripts.data.preparation import flag_alignments
from scripts.data.registration import ON_SCALP, Alignment, align_head, brain_mask, foreground, scalp_inside, to_sitk
from scripts.phantoms import brain_phantom
from scripts.phantoms.anatomy import brain_anatomy
from scripts.phantoms.fields import EXTENT, ORIGIN
from scripts.prepare import prepare

SPACING = 3.0
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


class Head(NamedTuple):
    """A raw scan and its truth."""

    image: np.ndarray  # float32
    affine: np.ndarray  # voxels to the scanner's world, RAS mm
    brain: np.ndarray  # bool, the brain mask on the scan's grid
    points: np.ndarray  # [N, 3] where the atlas points behind the phantom's brain lie in the template, RAS mm
    moved: np.ndarray  # [4, 4] the affine that takes these points best to where they lie in the scan


def noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | np.ndarray) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    return field / field.std()


def head(rng: np.random.Generator, index: int, contrast: str, stripped: bool) -> tuple[np.ndarray, ...]:
    """Image, brain mask and affine of a phantom within CSF, skull, scalp, face and neck, not moved yet."""
    image, affine, _ = brain_phantom(index, spacing=SPACING)
    brain, image = image > 0, image.astype(np.float32)
    if contrast == "T1w":
        image[brain] = np.array([250, 650, 1000], np.float32) @ brain_anatomy(index, spacing=SPACING).tissues
    padding = [(round(below / SPACING), round(30 / SPACING)) for below in (30, 30, 80)]
    image, brain = np.pad(image, padding), np.pad(brain, padding)
    affine = affine.copy()
    affine[:3, 3] -= SPACING * np.array(padding)[:, 0]
    if stripped:
        return image, brain, affine
    x, y, z = np.indices(brain.shape, np.float32) * SPACING + affine[:3, 3, None, None, None].astype(np.float32)
    outside = ndimage.distance_transform_edt(~ndimage.binary_closing(brain, iterations=3)) * SPACING
    wobble = noise(rng, brain.shape, 20 / SPACING)
    skull, scalp, skin = 3 + wobble, 9 + 1.5 * wobble, 15 + 3 * noise(rng, brain.shape, 25 / SPACING)
    face = (x / 62) ** 2 + ((y - 45) / 52) ** 2 + ((z + 65) / 75) ** 2 < 1
    neck = ((x / 58) ** 2 + ((y + 30) / 62) ** 2 < 1) & (z < -40)
    body = (face | neck) & (outside > skin)
    depth = ndimage.distance_transform_edt(body | (outside <= skin)) * SPACING
    eyes = (np.abs(x) - 32) ** 2 + (y - 68) ** 2 + (z + 38) ** 2 < 13**2
    white = np.percentile(image[brain], 75)
    fat, muscle, fluid = (1.5, 0.6, 0.25) if contrast == "T1w" else (1.2, 0.45, 0.15)
    texture = 1 + 0.25 * noise(rng, brain.shape, 4 / SPACING)
    parts = [
        (outside <= skull, fluid),
        ((outside > skull) & (outside <= scalp), 0.08),
        ((outside > scalp) & (outside <= skin), fat * texture),
        (body, muscle * texture),
        (body & (depth < 5), fat),
        (eyes, fluid),
    ]
    for where, signal in parts:
        image = np.where(where & ~brain, white * signal, image)
    return image, brain, affine


def raw_head(
    index: int,
    contrast: str = "FLAIR",
    axes: str = "RAS",
    voxel: tuple[float, float, float] = (SPACING,) * 3,
    oblique: bool = False,
    stripped: bool = False,
    still: bool = False,
) -> Head:
    """A head turned by up to 20 degrees about each axis, moved by up to 30 mm, 0.85 to 1.02 of the template's size,
    with noise and a bias field of 35 %, on a scanner's grid. ``still`` leaves out all of this."""
    rng = np.random.default_rng([3, index])
    image, brain, affine = head(rng, index, contrast, stripped)
    moved = np.eye(4)
    if not still:
        turn = Rotation.from_euler("xyz", rng.uniform(-20, 20, 3), degrees=True).as_matrix()
        stretch = np.diag(rng.uniform(0.85, 1.02) * np.exp(rng.normal(0, 0.03, 3)))
        moved[:3, :3] = turn @ stretch @ (np.eye(3) + np.triu(rng.normal(0, 0.02, (3, 3)), 1))
        moved[:3, 3] = rng.uniform(-30, 30, 3)
    direction = np.linalg.inv(nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axes), (1, 1, 1)))[:3, :3].T
    shape = np.ceil(np.abs(direction).T @ [230, 256, 290] / voxel).astype(int)
    if oblique:
        direction = Rotation.from_euler("xyz", [12, -8, 15], degrees=True).as_matrix() @ direction
    grid = np.eye(4)
    grid[:3, :3] = direction * voxel
    centre = nib.affines.apply_affine(moved, [0, -18, -30]) + (0 if still else rng.uniform(-8, 8, 3))
    grid[:3, 3] = centre - grid[:3, :3] @ ((shape - 1) / 2)

    back = np.linalg.inv(moved @ affine) @ grid
    scan = ndimage.affine_transform(image, back[:3, :3], back[:3, 3], shape, order=1)
    mask = ndimage.affine_transform(brain.astype(np.float32), back[:3, :3], back[:3, 3], shape, order=1) > 0.5
    if not still:
        scan = scan * np.exp(0.35 * noise(rng, tuple(shape), 70 / np.array(voxel)))
    if not stripped:
        level = 0.03 * np.percentile(scan[mask], 75)
        scan = np.hypot(scan + level * rng.standard_normal(shape), level * rng.standard_normal(shape))

    # A phantom is the atlas warped, by more than an affine can say: the best affine is the truth.
    anatomy = brain_anatomy(index, spacing=SPACING)
    points = (anatomy.atlas_points.numpy() + 1) * EXTENT / 2 + ORIGIN
    warped = np.argwhere(anatomy.brain) * SPACING + ORIGIN
    fit = np.eye(4)
    fit[:3] = np.linalg.lstsq(np.c_[points, np.ones(len(points))], warped, rcond=None)[0].T
    return Head(scan.astype(np.float32), grid, mask, points, moved @ fit)


def transform_of(path: Path) -> np.ndarray:
    """A .tfm as ``[4, 4]``, points of the template to points of the scan, RAS."""
    transform = sitk.AffineTransform(sitk.ReadTransform(str(path)))
    origin = np.array(transform.TransformPoint((0, 0, 0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([np.array(transform.TransformPoint(e)) - origin for e in np.eye(3)]).T
    matrix[:3, 3] = origin
    return FLIP @ matrix @ FLIP


def error(truth: Head, found: np.ndarray) -> float:
    """How far from their true place the brain's points are put, mean, mm."""
    difference = found - truth.moved
    return float(np.linalg.norm(truth.points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())


def mask_dice(truth: Head, prepared: Path, ours: np.ndarray | None = None) -> float:
    """Dice of the true brain, taken to the template by the transform that was found, with a mask; or what is not 0."""
    result = nib.load(prepared)
    found = transform_of(Path(str(prepared).replace(".nii.gz", ".tfm")))
    back = np.linalg.inv(truth.affine) @ found @ result.affine
    true = ndimage.affine_transform(
        truth.brain.astype(np.float32), back[:3, :3], back[:3, 3], result.shape, order=1, prefilter=False
    )
    ours, theirs = np.asarray(result.dataobj) != 0 if ours is None else ours, true > 0.5
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())


def save(path: Path, image: np.ndarray, affine: np.ndarray) -> Path:
    """Write a scan in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nib.save(nib.Nifti1Image(image, affine), path)
        return path
    affine = FLIP @ affine
    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    scan = sitk.GetImageFromArray(np.ascontiguousarray(image.T))
    scan.SetSpacing(voxel)
    scan.SetDirection((affine[:3, :3] / voxel).ravel())
    scan.SetOrigin(affine[:3, 3])
    sitk.WriteImage(scan, str(path))
    return path


HEADS = {
    "sub-01/sub-01_FLAIR.nii.gz": {"index": 1, "axes": "PIR"},
    "sub-02/sub-02_T1w.mha": {"index": 2, "contrast": "T1w", "oblique": True, "voxel": (2.0, 2.0, 5.0)},
    "sub-03/sub-03_FLAIR.nrrd": {"index": 3, "stripped": True, "still": True},
}


# half as many of the starts are optimised, on coarser voxels
FASTER = {"TURNED": 2, "GROWN": 1, "ROUGH": 6.0, "FINE": 4.0, "BIAS_SPACING": 12.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three raw scans of people, one of noise and one file that is no scan: the truths, the folder, what was done."""
    raw, out = tmp_path_factory.mktemp("study") / "raw", tmp_path_factory.mktemp("study") / "prepared"
    truths = {name: raw_head(**arguments) for name, arguments in HEADS.items()}
    for name, truth in truths.items():
        save(raw / name, truth.image, truth.affine)
    rng = np.random.default_rng(0)
    save(raw / "noise.nii.gz", rng.uniform(1, 2, (60, 70, 60)).astype(np.float32), np.diag([3.0, 3.0, 3.0, 1.0]))
    (raw / "broken.nii.gz").write_bytes(b"no scan")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FASTER.items():
            patch.setattr(registration, name, value)
        return truths, out, prepare(raw, out, scan_pattern="*", spacing=3.0, workers=1)


# few starts and coarse samples: enough for brains that lie right already
QUICK = {"PITCHES": (0.0,), "ROLLS": (0.0,), "YAWS": (0.0,), "SCALES": (1.0,), "TURNED": 1, "GROWN": 1}
QUICK |= {"ROUGH": 8.0, "FINE": 8.0, "BIAS_SPACING": 12.0}


@pytest.fixture
def quick(monkeypatch):
    for name, value in QUICK.items():
        monkeypatch.setattr(registration, name, value)


def save_brain(path: Path, index: int = 1) -> Path:
    image, affine, _ = brain_phantom(index, spacing=8.0)
    return save(path, image, affine)


# --------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_aligned(study, name):
    truths, out, _ = study
    stem = name.split(".")[0]
    assert error(truths[name], transform_of(out / f"{stem}.tfm")) < 5
    assert mask_dice(truths[name], out / f"{stem}.nii.gz") > (0.95 if HEADS[name].get("stripped") else 0.85)


def test_results_lie_in_the_template(study):
    for name in HEADS:
        scan = nib.load(study[1] / f"{name.split('.')[0]}.nii.gz")
        assert scan.shape == (66, 78, 63)
        np.testing.assert_allclose(scan.affine, [[3, 0, 0, -98], [0, 3, 0, -134], [0, 0, 3, -72], [0, 0, 0, 1]])
        assert int(scan.header["sform_code"]) == 4
        assert scan.get_data_dtype() == np.float32


def test_intensities_keep_their_units(study):
    truths, out, _ = study
    for name, truth in truths.items():
        prepared = np.asarray(nib.load(out / f"{name.split('.')[0]}.nii.gz").dataobj)
        assert np.median(prepared[prepared > 0]) == pytest.approx(np.median(truth.image[truth.brain]), rel=0.25)


def test_the_bias_field_is_found(monkeypatch):
    monkeypatch.setattr(registration, "BIAS_SPACING", 8.0)  # as the scan has it
    image = np.ascontiguousarray(brain_phantom(1, spacing=8.0).image.T, np.float32)
    brain = image > 0
    field = 0.35 * noise(np.random.default_rng(0), image.shape, 9.0)
    scan = sitk.GetImageFromArray(image * np.exp(field, dtype=np.float32))
    scan.SetSpacing([8.0] * 3)
    found = sitk.GetArrayFromImage(registration.log_bias_field(scan, registration.foreground(scan)))
    assert np.corrcoef(found[brain], field[brain])[0, 1] > 0.8
    assert np.std(found[brain] - field[brain]) < 0.6 * np.std(field[brain])


def test_what_is_aligned_stays_aligned(study):
    (row,) = (row for row in study[2].rows if row["scan"].startswith("sub-03"))
    assert row["skull_stripped"]
    assert max(abs(row[f"rotation_{axis}"]) for axis in "xyz") < 5
    assert max(abs(row[f"translation_{axis}"]) for axis in "xyz") < 8


def test_noise_is_flagged_and_listed_first(study):
    _, out, done = study
    assert [row["verdict"] for row in done.rows] == ["check", "ok", "ok", "ok"]
    assert done.rows[0]["scan"] == "noise.nii.gz"
    assert "similarity" in done.rows[0]["reasons"]
    with (out / "alignment.csv").open() as file:
        assert [row["scan"] for row in csv.DictReader(file)] == [row["scan"] for row in done.rows]
    listed = [item["image"] for item in json.loads((out / "datalist.json").read_text())["training"]]
    assert listed == [f"sub-0{i}/sub-0{i}_{kind}.nii.gz" for i, kind in ((1, "FLAIR"), (2, "T1w"), (3, "FLAIR"))]
    assert (out / "contact_sheet.png").stat().st_size > 50_000


def test_a_broken_file_stops_nothing(study):
    _, out, done = study
    assert list(done.failures) == ["broken.nii.gz"]
    with (out / "failed.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["scan"] == "broken.nii.gz"
    assert "cannot be read" in row["reason"]


# ------------------------------------------------------------------------------------------------- brain and scalp


def placed(truth: Head, larger: float = 1.0) -> sitk.AffineTransform:
    """Where a head truly lies in the template; or so that its scalp, which is larger, lies on the template's brain."""
    matrix = FLIP @ truth.moved @ FLIP
    transform = sitk.AffineTransform(3)
    centre = np.array(registration.brain_centre())
    transform.SetCenter(centre.tolist())
    transform.SetMatrix((larger * matrix[:3, :3]).ravel().tolist())
    transform.SetTranslation((matrix[:3, :3] @ centre + matrix[:3, 3] - centre).tolist())
    return transform


@pytest.mark.parametrize("contrast", ["FLAIR", "T1w"])
def test_a_template_on_the_scalp_is_told_from_one_on_the_brain(contrast):
    truth = raw_head(4, contrast=contrast)
    scan = to_sitk(truth.image, truth.affine)
    assert scalp_inside(scan, placed(truth)) < ON_SCALP / 2
    assert scalp_inside(scan, placed(truth, 1.3)) > 1.5 * ON_SCALP
    stripped = to_sitk(np.where(truth.brain, truth.image, 0), truth.affine)
    assert scalp_inside(stripped, placed(truth)) < ON_SCALP / 2
    assert scalp_inside(to_sitk(np.zeros_like(truth.image), truth.affine), placed(truth)) == 0


def test_a_head_whose_scalp_was_taken_for_the_brain_is_aligned_again_without_it(monkeypatch):
    truth = raw_head(4)
    scan, asked = to_sitk(truth.image, truth.affine), []

    def found(image, head):
        asked.append(sitk.GetArrayFromImage(head).sum())
        return Alignment(placed(truth, 1.3 if len(asked) == 1 else 1.0), 0.3)

    monkeypatch.setattr(registration, "align", found)
    alignment, share = align_head(scan, foreground(scan))
    assert share < ON_SCALP / 2
    assert np.linalg.det(np.reshape(alignment.transform.GetMatrix(), (3, 3))) < 1.2 * np.linalg.det(truth.moved[:3, :3])
    assert asked[1] < 0.8 * asked[0]  # the scalp was taken away


@pytest.mark.parametrize("contrast", ["FLAIR", "T1w"])
def test_the_mask_follows_the_brain_where_the_template_does_not(contrast):
    truth = raw_head(4, contrast=contrast)
    transform = placed(truth, 0.94)  # as if the template's brain were smaller than this one
    mask = brain_mask(to_sitk(truth.image, truth.affine), transform)
    true = sitk.Resample(to_sitk(truth.brain, truth.affine), mask, transform, sitk.sitkLinear) > 0.5
    outline = sitk.Resample(registration.template_brain(), mask, sitk.Transform(), sitk.sitkNearestNeighbor)
    dice = sitk.LabelOverlapMeasuresImageFilter()
    dice.Execute(outline, true)
    of_outline = dice.GetDiceCoefficient()
    dice.Execute(mask, true)
    assert dice.GetDiceCoefficient() > max(0.93, of_outline + 0.02)


# --------------------------------------------------------------------------------------------------------- workings


def test_only_what_is_missing_or_changed_is_made(tmp_path, quick):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for index in (1, 2, 3):
        save_brain(raw / f"sub-{index}.nii.gz", index)
    prepare(raw, out, spacing=8.0, bias_correction=False, workers=1)
    first = {path: path.stat().st_mtime_ns for path in out.glob("sub-*.nii.gz")}
    (out / "sub-2.json").unlink()
    save_brain(raw / "sub-3.nii.gz", 4)
    assert [row["scan"] for row in prepare(raw, out, spacing=8.0, bias_correction=False, workers=1).rows].count(
        "sub-1.nii.gz"
    ) == 1
    changed = {path.name for path, time in first.items() if path.stat().st_mtime_ns != time}
    assert changed == {"sub-2.nii.gz", "sub-3.nii.gz"}
    prepare(raw, out, spacing=8.0, keep_skull=True, bias_correction=False, workers=1)
    assert json.loads((out / "sub-1.json").read_text())["settings"]["keep_skull"]


def test_a_scan_that_changes_meanwhile_fails_alone(tmp_path, quick, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    save_brain(raw / "a.nii.gz")
    save_brain(raw / "b.nii.gz")
    run_jobs = module._run

    def run_and_change(*arguments):
        failures = run_jobs(*arguments)
        save_brain(raw / "b.nii.gz", 2)
        return failures

    monkeypatch.setattr(module, "_run", run_and_change)
    done = prepare(raw, out, spacing=8.0, bias_correction=False, workers=1)
    assert [row["scan"] for row in done.rows] == ["a.nii.gz"]
    assert done.failures == {"b.nii.gz": "it changed while it was prepared: run this again"}


def test_a_scan_that_breaks_later_leaves_no_old_result(tmp_path, quick):
    raw, out = tmp_path / "raw", tmp_path / "out"
    save_brain(raw / "a.nii.gz")
    save_brain(raw / "b.nii.gz")
    prepare(raw, out, spacing=8.0, bias_correction=False, workers=1)
    (raw / "b.nii.gz").write_bytes(b"")
    assert list(prepare(raw, out, spacing=8.0, bias_correction=False, workers=1).failures) == ["b.nii.gz"]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz"]
    save_brain(raw / "b.nii.gz")
    assert not prepare(raw, out, spacing=8.0, bias_correction=False, workers=1).failures
    assert not (out / "failed.csv").exists()


def test_the_same_scan_gives_the_same_bytes(tmp_path, quick):
    save_brain(tmp_path / "raw/a.nii.gz")
    for out in ("first", "second"):
        prepare(tmp_path / "raw", tmp_path / out, spacing=8.0, workers=1)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("first", "second")]
    assert sorted(contents[0]) == [
        *("a.json", "a.nii.gz", "a.png", "a.tfm"),
        *("alignment.csv", "contact_sheet.png", "datalist.json", "report.html"),
    ]
    assert contents[0] == contents[1]


def test_own_masks_say_what_is_brain(tmp_path, quick):
    image, affine, _ = brain_phantom(1, spacing=8.0)
    brain = image > 0
    shell = ndimage.binary_dilation(brain, iterations=2) & ~brain
    image[shell] = 3 * image.max()
    save(tmp_path / "raw/sub-1/a.nii.gz", image, affine)
    save(tmp_path / "raw/sub-2/b.nii.gz", image, affine)
    (tmp_path / "raw/sub-2/b.nii").touch()
    save(tmp_path / "masks/sub-1/a.mha", brain.astype(np.uint8), affine)
    done = prepare(
        tmp_path / "raw", tmp_path / "out", spacing=4.0, mask_dir=tmp_path / "masks", bias_correction=False, workers=1
    )
    assert sorted(done.failures) == ["sub-2/b.nii", "sub-2/b.nii.gz"]
    assert "no mask for it, or several: 'sub-2/b' with an" in done.failures["sub-2/b.nii.gz"]
    prepared = np.asarray(nib.load(tmp_path / "out/sub-1/a.nii.gz").dataobj)
    litres = np.count_nonzero(prepared) * 4**3 / 1e6 / done.rows[0]["volume_ratio"]
    assert litres == pytest.approx(brain.sum() * 8**3 / 1e6, rel=0.03)
    prepare(
        tmp_path / "raw", tmp_path / "skull", "*.nii.gz", spacing=4.0, keep_skull=True, bias_correction=False, workers=1
    )
    assert np.count_nonzero(nib.load(tmp_path / "skull/sub-1/a.nii.gz").dataobj) > 1.3 * np.count_nonzero(prepared)


def test_a_header_without_sense_is_refused(tmp_path):
    save(tmp_path / "raw/thin.nii.gz", np.random.default_rng(0).random((32, 32, 3)), np.diag([3.0, 3, 3, 1]))
    save(tmp_path / "raw/4d.nii.gz", np.random.default_rng(0).random((32, 32, 32, 2)), np.diag([3.0, 3, 3, 1]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").touch()
    failures = prepare(tmp_path / "raw", tmp_path / "out", workers=1).failures
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failed.csv"]
    assert "no scan of a whole brain" in failures["thin.nii.gz"]
    assert "2 channels" in failures["4d.nii.gz"]


def test_names_never_collide():
    names = ["s/a.nii", "s/a.nii.gz", "s/b.nrrd", "s/FLAIR.v2.mha", "s/1.2.840"]
    assert module._stems(names) == ["s/a_nii", "s/a_niigz", "s/b", "s/FLAIR.v2", "s/1.2.840"]
    with pytest.raises(ValueError, match="rename one"):
        module._stems(["a.nii", "a.mha", "a_nii.mha"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": 0}, "spacing"),
        ({"workers": 0}, "workers"),
        ({"output_dir": "raw/out"}, "within each other"),
        ({"mask_dir": "nowhere"}, "mask_dir"),
        ({"scan_pattern": "*.mgz"}, "scan_pattern"),
        ({"scan_pattern": ["*_T1w.nii.gz", "*_FLAIR.nii.gz"]}, "scan_pattern is .* name one pattern"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_brain(Path("raw/a.nii.gz"))
    with pytest.raises((ValueError, OSError), match=message):
        prepare(**{"dataset_dir": "raw", "output_dir": "out"} | arguments)
    assert [path.name for path in Path().iterdir()] == ["raw"]


def test_outliers_of_a_cohort_are_flagged():
    rng = np.random.default_rng(0)
    rows = [
        {"scan": f"{i}", "similarity": rng.normal(0.5, 0.02), "overlap": 0.99, "volume_ratio": rng.normal(1.2, 0.05)}
        | {"stretch": 1.08, "rotation_x": 5.0, "rotation_y": 1.0, "rotation_z": 0.0, "scalp_inside": 0.02}
        for i in range(20)
    ]
    assert {row["verdict"] for row in flag_alignments(rows)} == {"ok"}
    rows[7]["similarity"] = 0.3
    rows[11]["volume_ratio"] = 1.9
    rows[13]["rotation_z"] = 170.0
    rows[17]["scalp_inside"] = 0.4
    judged = flag_alignments(rows)
    assert {row["scan"] for row in judged if row["verdict"] == "check"} == {"7", "11", "13", "17"}
    assert {row["scan"] for row in judged[:4]} == {"7", "11", "13", "17"}


def test_command_line(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/broken.nii.gz").write_bytes(b"no scan")
    words = (tmp_path / "raw", "--output_dir", tmp_path / "out", "--workers", 2)
    done = run_command_process("scripts.prepare", *words)
    assert done.returncode == 1
    assert "broken.nii.gz" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/failed.csv").exists()


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(folder: str = "output/heads", count: int = 10, spacing: float = 3.0) -> None:
    """Print how well raw heads of all kinds are aligned, and keep what was prepared in ``folder``."""
    kinds = [
        {},
        {"contrast": "T1w", "oblique": True},
        {"axes": "LPS", "voxel": (1.5, 1.5, 5.0)},
        {"axes": "PIR", "contrast": "T1w"},
        {"stripped": True},
    ]
    raw, out = Path(folder) / "raw", Path(folder) / "prepared"
    truths = {}
    for index in range(1, count + 1):
        truth = raw_head(index, **kinds[(index - 1) % len(kinds)])
        truths[f"head-{index:02d}"] = truth
        if not (raw / f"head-{index:02d}.nii.gz").exists():
            save(raw / f"head-{index:02d}.nii.gz", truth.image, truth.affine)
    rows = {row["scan"].split(".")[0]: row for row in prepare(raw, out, spacing=spacing, workers=1).rows}
    print("scan     mean error (mm)  Dice   similarity  verdict")
    errors, dices = [], []
    for name, truth in truths.items():
        errors.append(error(truth, transform_of(out / f"{name}.tfm")))
        dices.append(mask_dice(truth, out / f"{name}.nii.gz"))
        row = rows[name]
        print(f"{name}  {errors[-1]:15.2f}  {dices[-1]:.3f}  {row['similarity']:10.3f}  {row['verdict']}")
    print(f"median error {np.median(errors):.2f} mm, largest {max(errors):.2f} mm")
    print(f"median Dice {np.median(dices):.3f}, lowest {min(dices):.3f}")


def people(heads: str, masks: str, folder: str = "output/people") -> None:
    """Print the Dice of brain masks of real heads, and of the template's outline, with masks made otherwise."""
    rows = {row["scan"]: row for row in prepare(heads, folder).rows}
    template = sitk.GetArrayFromImage(registration.template_brain()).T > 0
    found = []
    for name in sorted(rows):
        true = nib.load(Path(masks) / name)
        truth = Head(np.zeros(0), true.affine, np.asarray(true.dataobj) > 0, np.zeros(0), np.zeros(0))
        prepared = Path(folder) / f"{name.split('.')[0]}.nii.gz"
        found.append((mask_dice(truth, prepared), mask_dice(truth, prepared, template)))
        print(f"{name}: mask {found[-1][0]:.3f}, outline {found[-1][1]:.3f}, scalp {rows[name]['scalp_inside']:.2f}")
    for what, values in zip(("mask", "outline"), zip(*found, strict=True), strict=True):
        print(f"{what}: mean {np.mean(values):.3f}, lowest {min(values):.3f}")


if __name__ == "__main__":
    import fire

    fire.Fire({"phantoms": measure, "people": people})
