"""Phantom cohorts, at a coarse 8 mm to be quick."""

import csv
import json
import shutil
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import run_command, run_command_process
from scipy import ndimage

from scripts.phantoms import brain_phantom, ellipsoid_phantom, make_brains, make_ellipsoids
from scripts.phantoms.anatomy import brain_anatomy, random_streams
from scripts.phantoms.images import KINDS
from scripts.phantoms.people import Cohort

SPACING = 8.0


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four brains with lesions, made by two processes."""
    folder = tmp_path_factory.mktemp("cohort") / "brains"
    assert make_brains(folder, count=4, seed=7, spacing=SPACING, lesions=1.0, workers=2) == str(folder)
    return folder


def test_names_and_masks_folder(cohort):
    scans = [f"sub-000{i}_FLAIR.nii.gz" for i in (1, 2, 3, 4)]
    assert sorted(contents(cohort)) == ["phantoms.json", *scans]
    masks = cohort.with_name("brains_masks")
    assert sorted(contents(masks)) == ["kinds.csv", *(f"sub-000{i}_lesions.nii.gz" for i in (1, 2, 3, 4))]


def test_any_subset_is_reproducible(cohort, tmp_path):
    make_brains(tmp_path / "third", count=1, start=3, seed=7, spacing=SPACING, lesions=1.0, workers=1)
    name = "sub-0003_FLAIR.nii.gz"
    assert (tmp_path / "third" / name).read_bytes() == (cohort / name).read_bytes()
    in_memory = brain_phantom(3, seed=7, spacing=SPACING, lesions=1.0)
    np.testing.assert_array_equal(in_memory.image, np.asarray(nib.load(cohort / name).dataobj))


def test_seed_and_index_each_give_another_brain():
    first = brain_phantom(1, seed=0, spacing=SPACING).image > 0
    for index, seed in ((2, 0), (1, 1)):
        other = brain_phantom(index, seed=seed, spacing=SPACING).image > 0
        overlap = 2 * (first & other).sum() / (first.sum() + other.sum())
        assert 0.7 < overlap < 0.97  # both in ICBM152 space, yet of other shapes


def test_affine_is_true(cohort):
    scan = nib.load(cohort / "sub-0001_FLAIR.nii.gz")
    assert scan.get_data_dtype() == np.int16
    assert (int(scan.header["sform_code"]), int(scan.header["qform_code"])) == (4, 4)
    np.testing.assert_allclose(scan.get_qform(), scan.get_sform(), atol=1e-4)
    np.testing.assert_allclose(scan.header.get_zooms(), SPACING)
    thalamus = np.rint(nib.affines.apply_affine(np.linalg.inv(scan.affine), (-10, -20, 5))).astype(int)
    image = np.asarray(scan.dataobj)
    assert image[tuple(thalamus)] > 0
    assert image[0, 0, 0] == image[-1, -1, -1] == 0


@pytest.mark.parametrize(("spacing", "shape"), [(7.3, (27, 32, 26)), (4.0, (50, 59, 48))])
def test_spacing_changes_the_grid_and_not_the_anatomy(spacing, shape):
    image, affine, _ = brain_phantom(1, spacing=spacing)
    assert image.shape == shape
    np.testing.assert_array_equal(affine[:3, 3], (-98, -134, -72))
    litres = (image > 0).sum() * spacing**3 / 1e6
    assert litres == pytest.approx((brain_phantom(1, spacing=SPACING).image > 0).sum() * SPACING**3 / 1e6, rel=0.03)
    assert 1.2 < litres < 2.6


def test_contrast_is_that_of_flair():
    for index in (1, 2):
        anatomy = brain_anatomy(index, spacing=4.0)
        np.testing.assert_allclose(anatomy.tissues.sum(axis=0), 1, atol=1e-3)
        image = brain_phantom(index, spacing=4.0).image[anatomy.brain]
        fluid, gray, white = (image[fraction > 0.85].mean() for fraction in anatomy.tissues)
        assert fluid < 0.75 * white < white < gray < 1.6 * white


def test_the_same_person_has_two_contrasts(tmp_path):
    flair, t1w = (brain_phantom(1, spacing=4, cohort=Cohort(age=50), contrast=kind).image for kind in ("FLAIR", "T1w"))
    assert np.array_equal(flair > 0, t1w > 0)
    inside = flair > 0
    # gray matter, the brightest of FLAIR, is between CSF and white matter in T1w
    bright = t1w[inside][flair[inside] > np.percentile(flair[inside], 80)].mean()
    assert np.percentile(t1w[inside], 5) < bright < np.percentile(t1w[inside], 80)
    make_brains(tmp_path, 1, spacing=8, contrast="T1w")
    assert (tmp_path / "sub-0001_T1w.nii.gz").is_file()
    with pytest.raises(ValueError, match="contrast is 'T2w': choose one of FLAIR, T1w"):
        brain_phantom(1, contrast="T2w")


def test_lesions_are_bright_and_in_the_brain():
    without, _, nothing = brain_phantom(1, spacing=2.0)
    image, _, mask = brain_phantom(1, spacing=2.0, lesions=1.0)
    assert not nothing.any()
    assert 0.05 < mask.sum() * 2.0**3 / 1e3 < 50  # millilitres
    assert (image[mask > 0] > 0).all()
    assert np.median(image[mask > 0]) > 1.1 * np.median(image[image > 0])
    # The same person and scanner: what isn't lesion or its rim didn't change.
    assert ((image != without) & (mask == 0)).sum() < 30 * mask.sum()


@cache
def with_and_without(kind):
    """A phantom's healthy image, the one with lesions, and their mask, at 4 mm."""
    image, _, mask = brain_phantom(1, seed=3, spacing=4.0, lesions=1.0, lesion_kinds=kind)
    return healthy_phantom(), image.astype(float), mask > 0


@cache
def healthy_phantom():
    return brain_phantom(1, seed=3, spacing=4.0).image.astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lesion_of_any_kind_is_within_the_same_brain(kind):
    healthy, image, mask = with_and_without(kind)
    assert ((healthy > 0) == (image > 0)).all() and (image[mask] > 0).all()
    assert 0.2 < mask.sum() * 4.0**3 / 1e3 < 60  # millilitres
    changed = np.abs(image - healthy) > 0.25 * np.median(healthy[healthy > 0])
    # what changed most is outlined, or a rim of what is
    assert (changed & ~ndimage.binary_dilation(mask, iterations=2)).sum() < 0.05 * mask.sum()


@pytest.mark.parametrize("kind", ["dark", "mass", "atrophy"])
def test_intensity_does_not_show_lesions_of_other_kinds(kind):
    healthy, image, mask = with_and_without(kind)
    ordinary = np.quantile(healthy[healthy > 0], [0.0005, 0.99])
    assert (ordinary[0] < image[mask]).mean() > 0.9 and (image[mask] < ordinary[1]).mean() > 0.9
    if kind != "mass":  # it is darker than what was there
        assert np.median(image[mask] / healthy[mask]) < 0.75


def test_a_mass_is_one_piece_as_bright_as_tissue_and_displaces_what_is_around():
    healthy, image, mask = with_and_without("mass")
    mass = ndimage.binary_opening(mask, iterations=2)
    assert ndimage.label(mass)[1] == 1
    assert np.median(image[mass]) == pytest.approx(np.median(healthy[healthy > 0]), rel=0.2)
    # a shell beside it is as it was before, but elsewhere
    shell = ndimage.binary_dilation(mass, iterations=3) & ~ndimage.binary_dilation(mass) & (healthy > 0)
    far = ~ndimage.binary_dilation(mass, iterations=12) & (healthy > 0)
    assert np.abs(image - healthy)[shell].mean() > 3 * np.abs(image - healthy)[far].mean()
    assert np.quantile(image[shell], [0.2, 0.8]) == pytest.approx(np.quantile(healthy[shell], [0.2, 0.8]), rel=0.25)


def test_each_phantom_has_lesions_of_one_kind_and_a_table_says_of_which(tmp_path):
    words = {"count": 12, "seed": 3, "spacing": 16.0, "lesions": 0.8, "workers": 1}
    make_brains(tmp_path / "brains", lesion_kinds=["atrophy", "dark", "mass", "bright"], **words)
    with (tmp_path / "brains_masks" / "kinds.csv").open() as file:
        kinds = {row["scan"]: row["kind"] for row in csv.DictReader(file)}
    assert set(kinds.values()) == {*KINDS, "none"} and len(kinds) == 12
    for scan, kind in kinds.items():
        mask = np.asarray(nib.load(tmp_path / "brains_masks" / f"{scan}_lesions.nii.gz").dataobj)
        assert mask.any() == (kind != "none")
        of_its_kind = kind if kind in KINDS else KINDS
        alone = brain_phantom(int(scan[-4:]), seed=3, spacing=16.0, lesions=0.8, lesion_kinds=of_its_kind)
        np.testing.assert_array_equal(mask, alone.mask)
    with pytest.raises(FileExistsError, match="another cohort"):
        make_brains(tmp_path / "brains", **words)  # of bright ones alone


def test_a_cohort_from_before_there_were_kinds_has_bright_lesions(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "brains")
    path = tmp_path / "brains" / "phantoms.json"
    recipe = json.loads(path.read_text())
    assert recipe.pop("lesion_kinds") == ["bright"]
    path.write_text(json.dumps(recipe))
    words = {"count": 4, "seed": 7, "spacing": SPACING, "lesions": 1.0, "mask_dir": cohort.with_name("brains_masks")}
    with pytest.raises(FileExistsError, match="another cohort"):
        make_brains(tmp_path / "brains", lesion_kinds="dark", **words)
    make_brains(tmp_path / "brains", **words)


def test_the_log_says_how_masks_are_used(cohort, caplog):
    with caplog.at_level("INFO"):
        make_brains(cohort, count=4, seed=7, spacing=SPACING, lesions=1.0)
    assert f'--mask_dir {cohort.with_name("brains_masks")} --mask_pattern "*_lesions.nii.gz"' in caplog.messages[-1]


def test_lesions_is_a_probability():
    some = [brain_phantom(index, spacing=16.0, lesions=0.5).mask.any() for index in range(1, 13)]
    assert 2 < sum(some) < 10


def test_a_finished_cohort_is_reused(cohort):
    before = {path: path.stat().st_mtime_ns for path in cohort.iterdir()}
    make_brains(cohort, count=4, seed=7, spacing=SPACING, lesions=1.0)
    assert {path: path.stat().st_mtime_ns for path in cohort.iterdir()} == before


def test_an_interrupted_cohort_is_continued_and_a_finished_one_grows(tmp_path):
    make_brains(tmp_path / "whole", count=4, spacing=SPACING, workers=1)
    make_brains(tmp_path / "parts", count=3, spacing=SPACING, workers=1)
    (tmp_path / "parts" / "sub-0002_FLAIR.nii.gz").unlink()
    kept = (tmp_path / "parts" / "sub-0001_FLAIR.nii.gz").stat().st_mtime_ns
    make_brains(tmp_path / "parts", count=4, spacing=SPACING, workers=1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert (tmp_path / "parts" / "sub-0001_FLAIR.nii.gz").stat().st_mtime_ns == kept


def test_a_lost_mask_comes_back(cohort):
    mask = cohort.with_name("brains_masks") / "sub-0002_lesions.nii.gz"
    before = mask.read_bytes()
    mask.unlink()
    make_brains(cohort, count=4, seed=7, spacing=SPACING, lesions=1.0)
    assert mask.read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 8}, {"spacing": 7.0}, {"lesions": 0.5}, {"count": 3}, {"start": 2}])
def test_another_cohort_is_not_overwritten(cohort, change):
    arguments = {"count": 4, "seed": 7, "spacing": SPACING, "lesions": 1.0} | change
    with pytest.raises(FileExistsError, match="another cohort"):
        make_brains(cohort, **arguments)


def test_a_folder_of_other_scans_is_refused(tmp_path):
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "T1.nii.gz").touch()
    with pytest.raises(FileExistsError, match="folder of its own"):
        make_brains(tmp_path, count=1, spacing=SPACING)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 0}, "count is 0, but must be a whole number, 1 or more"),
        ({"count": 2.5}, "count is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "start is -1"),
        ({"spacing": 0}, "spacing .* is 0"),
        ({"spacing": "two"}, "spacing .* is 'two'"),
        ({"lesions": 1.5}, "lesions .* is 1.5"),
        ({"lesion_kinds": ["bright", "soft"]}, "lesion_kinds is .*'soft'.*: give one or more of bright, dark"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_brains(**({"output_dir": tmp_path / "brains", "count": 1} | change))
    assert not list(tmp_path.iterdir())


def test_output_dir_must_be_a_folder_and_masks_must_be_apart(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"output_dir is .*file"):
        make_brains(tmp_path / "file", count=1)
    with pytest.raises(ValueError, match="mask_dir"):
        make_brains(tmp_path / "brains", count=1, lesions=0.5, mask_dir=tmp_path / "brains")


def test_ellipsoids(tmp_path):
    image, affine, mask = ellipsoid_phantom(1, size=(24, 32, 20), spacing=3.0)
    assert image.shape == mask.shape == (24, 32, 20)
    np.testing.assert_allclose(nib.affines.apply_affine(affine, (11.5, 15.5, 9.5)), 0)  # world zero is the centre
    assert image[mask > 0].mean() > 1.5 * image[mask == 0].mean()
    assert (ellipsoid_phantom(2, size=(24, 32, 20)).mask != mask).any()

    make_ellipsoids(tmp_path / "e", count=2, size=16, mask_dir=tmp_path / "m", workers=1)
    assert nib.load(tmp_path / "e" / "sub-0002_ellipsoid.nii.gz").shape == (16, 16, 16)
    assert sorted(contents(tmp_path / "m")) == ["sub-0001_mask.nii.gz", "sub-0002_mask.nii.gz"]
    with pytest.raises(ValueError, match="size is"):
        make_ellipsoids(tmp_path / "f", count=2, size=(16, 16))


def test_command_line(tmp_path):
    words = ("ellipsoids", "--output_dir", tmp_path / "e", "--count", 2, "--size", "8,8,12", "--seed", 5)
    done = run_command_process("scripts.phantoms", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "e")
    assert json.loads((tmp_path / "e" / "phantoms.json").read_text())["seed"] == 5
    assert nib.load(tmp_path / "e" / "sub-0001_ellipsoid.nii.gz").shape == (8, 8, 12)


def test_command_line_makes_nothing_when_an_option_is_misspelt(tmp_path):
    failed = run_command("scripts.phantoms", "brains", "--output_dir", tmp_path / "b", "--count", 2, "--sede", 5)
    assert failed.returncode != 0 and "--sede" in failed.stderr
    assert not (tmp_path / "b").exists()


def test_covariates_are_drawn_and_written(tmp_path):
    make_brains(tmp_path / "people", count=3, seed=4, spacing=16.0, covariates=True, workers=1)
    lines = (tmp_path / "people" / "participants.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["participant_id", "age", "sex", "site"]
    assert [line.split("\t")[0] for line in lines[1:]] == ["sub-0001", "sub-0002", "sub-0003"]
    assert all(45 <= float(line.split("\t")[1]) <= 85 for line in lines[1:])
    with pytest.raises(FileExistsError, match="another cohort"):
        make_brains(tmp_path / "people", count=3, seed=4, spacing=16.0, workers=1)


def test_the_same_person_at_another_age_of_the_other_sex_and_at_another_site():
    def phantom(**fixed):
        return brain_phantom(3, seed=1, spacing=4.0, cohort=Cohort(**{"age": 50, "sex": "F", "site": "A", **fixed}))

    young, old, man, elsewhere = phantom(), phantom(age=80), phantom(sex="M"), phantom(site="B")
    stranger = brain_phantom(4, seed=1, spacing=4.0, cohort=Cohort(50, "F", "A"))
    np.testing.assert_array_equal(elsewhere.image > 0, young.image > 0)  # one anatomy in two scanners

    def fluid(index, age):
        person = Cohort(age, "F", "A").person(random_streams(index, 1).person)
        return brain_anatomy(index, 1, 4.0, person).tissues[0].sum()

    assert fluid(3, 50) < fluid(3, 65) < fluid(3, 80)  # ventricles and sulci widen
    assert (man.image > 0).sum() > 1.05 * (young.image > 0).sum()

    def difference(other):
        return np.abs(other.image.astype(float) - young.image).mean()

    assert difference(old) < difference(stranger)


@pytest.mark.parametrize(("name", "value"), [("age", 101), ("age", "old"), ("sex", "W"), ("site", "D")])
def test_people_that_there_are_not_are_refused(tmp_path, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        make_brains(tmp_path / "people", count=1, spacing=16.0, **{name: value})
    assert not (tmp_path / "people").exists()
