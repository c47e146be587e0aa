"""One brain in every way that scanners and archives store it, and what preprocessing makes of each."""

import nibabel as nib
import nilearn
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from scripts.data.scan_grid import Fit, ScanGrid, to_scan
from scripts.phantoms import brain_phantom


@pytest.fixture(scope="module")
def phantom():
    return brain_phantom(1, spacing=4.0)


def preprocessing(size=32):
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.json")
    return ConfigParser(config | {"spatial_shape": [size] * 3, "grid": ScanGrid()}).get_parsed_content("preprocessing")


def reoriented(image, affine, codes):
    """The same brain, its axes stored in another order and direction."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return nib.orientations.apply_orientation(image, turn), affine @ inv_ornt_aff(turn, image.shape)


def write_nifti(path, image, affine, dtype=np.int16, slope=None, order="<"):
    nifti = nib.Nifti1Image(np.asarray(image, dtype), affine, header=nib.Nifti1Header(endianness=order))
    nifti.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    if slope is not None:
        nifti.header.set_slope_inter(slope, 100)
    nib.save(nifti, path)
    return path


def to_sitk(image, affine):
    """ITK's axes run to the left and the back."""
    affine = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    itk = sitk.GetImageFromArray(image.transpose())
    itk.SetSpacing(spacing.tolist())
    itk.SetOrigin(affine[:3, 3].tolist())
    itk.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return itk


def write_itk(path, image, affine):
    sitk.WriteImage(to_sitk(image, affine), str(path), useCompression=True)
    return path


def write_dicom(folder, image, affine):
    """A series as a scanner exports it: one file a slice, named in no particular order."""
    folder.mkdir()
    volume = to_sitk(image, affine)
    direction = np.array(volume.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(volume.GetDepth()):
        section = volume[:, :, index]
        tags = {
            "0008|0060": "MR",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1.1",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.1.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(map(str, volume.TransformIndexToPhysicalPoint((0, 0, index)))),
            "0020|0037": "\\".join(map(str, [*direction[:, 0], *direction[:, 1]])),
            "0018|0050": str(volume.GetSpacing()[2]),
        }
        for tag, value in tags.items():
            section.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(index * 7) % 101:03d}.dcm"))
        writer.Execute(section)
    return folder


WRITERS = {
    "ras.nii": write_nifti,
    "gzip.nii.gz": write_nifti,
    "lps.nii": lambda path, image, affine: write_nifti(path, *reoriented(image, affine, "LPS")),
    "pir.nii.gz": lambda path, image, affine: write_nifti(path, *reoriented(image, affine, "PIR")),
    "slope.nii": lambda path, image, affine: write_nifti(path, image, affine, slope=0.37),
    "float64.nii": lambda path, image, affine: write_nifti(path, image / 7, affine, dtype=np.float64),
    "big-endian.nii": lambda path, image, affine: write_nifti(path, image, affine, order=">"),
    "itk.nrrd": write_itk,
    "itk.mha": write_itk,
    "series": write_dicom,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_brain_gives_the_same_tensor(tmp_path, phantom, name):
    transform = preprocessing()
    reference = transform({"image": write_nifti(tmp_path / "reference.nii", phantom.image, phantom.affine)})["image"]
    path = WRITERS[name](tmp_path / name, phantom.image, phantom.affine)
    image = transform({"image": str(path)})["image"]
    assert (image - reference).abs().max() < 1e-3
    assert np.allclose(image.affine, reference.affine, atol=1e-3)
    assert image.meta["geometry"]["spacing"] == pytest.approx([4, 4, 4], abs=1e-4)


def test_a_brain_scanned_at_an_angle_gives_the_same_tensor_to_interpolation_error(tmp_path, phantom):
    transform = preprocessing()
    straight = transform({"image": write_nifti(tmp_path / "a.nii", phantom.image, phantom.affine)})["image"]
    angle = np.radians(12)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    centre = phantom.affine @ [*(np.array(phantom.image.shape) - 1) / 2, 1]
    oblique = turn @ phantom.affine
    oblique[:3, 3] += centre[:3] - (turn @ centre)[:3]
    scan = MetaTensor(phantom.image[None].astype(np.float32), affine=phantom.affine)
    turned = SpatialResample(mode=3, padding_mode="constant")(scan, dst_affine=oblique, spatial_size=scan.shape[1:])
    image = transform({"image": write_nifti(tmp_path / "b.nii", turned[0].clip(0), oblique)})["image"]
    assert np.allclose(image.affine, straight.affine, atol=1e-3)
    assert np.corrcoef(image.flatten(), straight.flatten())[0, 1] > 0.995
    # as it lies in the file, the brain is far from that
    as_stored = transform({"image": write_nifti(tmp_path / "c.nii", turned[0].clip(0), phantom.affine)})["image"]
    assert np.corrcoef(as_stored.flatten(), straight.flatten())[0, 1] < 0.97


def test_there_and_back_at_one_millimetre():
    """The T1 of the ICBM152 template: same grid, affine and units, and what 128 voxels can hold of the image."""
    (path,) = (nilearn.__path__[0] + "/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",)
    transform = preprocessing(128)
    image = transform({"image": path})["image"]
    assert image.shape == (1, 128, 128, 128)
    back = to_scan(image, Fit.of(image), "intensity")
    original = nib.load(path)
    truth = original.get_fdata()
    assert back.shape[1:] == original.shape
    assert np.allclose(back.affine, original.affine, atol=1e-4)
    found = back[0].numpy()
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.98
    brain = truth > 0
    assert np.polyfit(truth[brain], found[brain], 1)[0] == pytest.approx(1, abs=0.1)
    assert np.median(found[brain]) == pytest.approx(np.median(truth[brain]), rel=0.05)
    assert (found[:8] == 0).all()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_there_and_back_in_every_orientation(tmp_path, phantom, codes):
    voxels, affine = reoriented(phantom.image, phantom.affine, codes)
    image = preprocessing(64)({"image": write_nifti(tmp_path / "scan.nii", voxels, affine)})["image"]
    back = to_scan(image, Fit.of(image), "intensity")
    assert back.shape[1:] == voxels.shape
    assert np.allclose(back.affine, affine, atol=1e-3)
    assert np.corrcoef(back[0].numpy().ravel(), voxels.ravel())[0, 1] > 0.98


def test_squeezing_each_axis_is_an_option(tmp_path, phantom):
    path = str(write_nifti(tmp_path / "scan.nii", phantom.image, phantom.affine))
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.json") | {"keep_aspect": False, "grid": ScanGrid()}
    image = ConfigParser(config).get_parsed_content("preprocessing")({"image": path})["image"]
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.allclose(spacing, np.array(phantom.image.shape) * 4 / 32)
