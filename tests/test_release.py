"""Releases: what is in the zip, that it works elsewhere, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, inference_config, run_command, run_command_process
from monai.bundle import ConfigParser, download_large_files
from packaging.requirements import Requirement

from scripts import release
from scripts.population.files import save_prior
from scripts.population.prior import PopulationPrior, fingerprint
from scripts.release import ReleaseError, make_hub_folder, make_release, ship_weights
from scripts.training.checkpoints import CheckpointError, load_weights

NAME = "very_deep_vae_for_brain_mri"
VERSION = json.loads((ROOT / "configs/metadata.json").read_text())["version"]


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory, tiny_weights) -> Path:
    """A copy of the bundle whose default network is the tiny one, with weights, tracked by git."""
    root = tmp_path_factory.mktemp("tiny") / "bundle"
    root.mkdir()
    for folder in ("configs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("README.md", "LICENSE", "docs/README.md", "docs/data_license.txt", "tests/tiny.json"):
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (root / "scripts/webpage/static/niivue/niivue.umd.js").write_text("")  # of megabytes
    (root / "large_files.yml").write_text("# what is too large\nlarge_files: []\n")
    (root / "models").mkdir()
    shutil.copy(tiny_weights, root / "models/model.pt")
    tiny = json.loads((ROOT / "tests/tiny.json").read_text())
    network = {key.split("#")[1]: value for key, value in tiny.items() if key.startswith("network_def#")}

    def shrink(config):
        config["spatial_shape"] = tiny["spatial_shape"]
        config["network_def"].update(network)

    def fit(metadata):
        simple_versions(metadata)
        for side in metadata["network_data_format"].values():
            for data in side.values():
                data["spatial_shape"] = tiny["spatial_shape"]

    edit(root / "configs/inference.json", shrink)
    edit(root / "configs/metadata.json", fit)
    numpy = 'numpy==2.0 ; python_version >= "3.11"\nnumpy==1.0 ; python_version < "3.11"\n'
    (root / "requirements.txt").write_text(f"# pins\nmonai==1.0\ntorch==1.0\nnibabel==5.0\n{numpy}")
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    """One of a test's own."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def simple_versions(metadata: dict) -> None:
    """Those of the fixture's requirements.txt."""
    metadata.update(monai_version="1.0", pytorch_version="1.0", numpy_version="2.0")
    metadata["required_packages_version"] = {"nibabel": "5.0"}


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=4))


def refused(bundle: Path, output_dir: Path, **arguments) -> str:
    """What a release is refused with; nothing was written."""
    with pytest.raises(ReleaseError) as error:
        make_release(str(output_dir), bundle_root=str(bundle), **arguments)
    assert not output_dir.exists()
    return str(error.value)


def test_holds_what_git_tracks_and_the_weights_in_one_folder(bundle, tmp_path):
    (bundle / "notes.txt").write_text("not for release")
    (bundle / "scripts/__pycache__").mkdir(exist_ok=True)
    words = ("bundle", "--output_dir", tmp_path / "releases")
    done = run_command_process("scripts.release", *words, cwd=bundle)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "releases").iterdir()
    assert path.name == f"{NAME}_v{VERSION}.zip"
    for file in (path, bundle / "models/model.pt"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in done.stderr
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.read(f"{NAME}/models/model.pt") == (bundle / "models/model.pt").read_bytes()
        assert yaml.safe_load(archive.read(f"{NAME}/large_files.yml")) == {"large_files": []}
    assert names == sorted(names) and {name.split("/")[0] for name in names} == {NAME}
    files = {name.removeprefix(f"{NAME}/") for name in names}
    assert {"README.md", "LICENSE", "configs/inference.json", "scripts/networks.py"} <= files
    assert not [
        file for file in files if file.startswith(("tests", "notes", ".git")) or "cache" in file.split("/")[-2:-1]
    ]


def test_a_version_is_released_once(bundle, tmp_path):
    path = make_release(str(tmp_path), bundle_root=str(bundle))
    before = path.read_bytes()
    (bundle / "README.md").write_text("something else")
    with pytest.raises(ReleaseError, match=f"another release of version {VERSION}: raise 'version'"):
        make_release(str(tmp_path), bundle_root=str(bundle))
    assert path.read_bytes() == before


def test_works_where_it_is_unpacked(bundle, tmp_path, tiny_weights):
    """Sampling, from nothing but the zip of the bundle with its default network."""
    for config in ("inference.json", "metadata.json"):
        shutil.copy(ROOT / "configs" / config, bundle / "configs" / config)
    edit(bundle / "configs/metadata.json", simple_versions)
    shutil.copy(ROOT / "models/model.pt", bundle / "models/model.pt")
    with zipfile.ZipFile(make_release(str(tmp_path / "releases"), bundle_root=str(bundle))) as archive:
        archive.extractall(tmp_path / "elsewhere")
    words = [sys.executable, "-m", "monai.bundle", "run", "sample"]
    configs = f"['configs/inference.json','{(ROOT / 'tests/tiny.json').as_posix()}']"
    options = ["--config_file", configs, "--ckpt", tiny_weights, "--samples", 2, "--output_dir", tmp_path / "out"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*words, *map(str, options)],
        cwd=tmp_path / "elsewhere" / NAME,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*_sample.nii.gz"))) == 2


def test_a_hub_gets_a_card_with_front_matter_and_weights_without_pickle(bundle, tmp_path, tiny_weights):
    (bundle / "docs/README.md").write_text(
        "# Card\n\n![x](figures/x.png) [more](training.md#how) [usage](../README.md) [up](#card) [away](https://a.org/b)\n"
    )
    (bundle / "README.md").write_text("[card](docs/README.md#card) [data](docs/data.md), [code](scripts/networks.py)\n")
    (bundle / "docs/data.md").write_text("[usage](../README.md) and [card](README.md)\n")
    subprocess.run(["git", "add", "--all"], cwd=bundle, check=True)
    done = run_command("scripts.release", "hf", tmp_path / "hub" / "vdvae", cwd=bundle)
    assert done.returncode == 0, done.stderr
    hub = tmp_path / "hub" / "vdvae"
    assert [path.name for path in hub.parent.iterdir()] == ["vdvae"]
    head, _, card = (hub / "README.md").read_text().removeprefix("---\n").partition("---\n")
    said = yaml.safe_load(head)
    assert said["library_name"] == "monai" and said["license"][0] == "apache-2.0" and "medical" in said["tags"]
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    (result,) = said["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == metadata["eval_metrics"]
    assert card.strip().endswith(
        "![x](docs/figures/x.png) [more](docs/training.md#how) [usage](docs/bundle.md) [up](#card) [away](https://a.org/b)"
    )
    usage = "[card](../README.md#card) [data](data.md), [code](../scripts/networks.py)\n"
    assert (hub / "docs/bundle.md").read_text() == usage
    assert (hub / "docs/data.md").read_text() == "[usage](bundle.md) and [card](../README.md)\n"
    assert "*.safetensors filter=lfs" in (hub / ".gitattributes").read_text()
    assert not (hub / "tests").exists() and (hub / "LICENSE").is_file() and (hub / "configs/inference.json").is_file()
    whole = torch.load(tiny_weights, weights_only=True)
    network = inference_config().get_parsed_content("network_def")
    for name, tensor in load_weights(network, hub / "models/model.safetensors").state_dict().items():
        assert torch.equal(tensor, whole[name])
    with pytest.raises(ReleaseError, match="is not empty"):
        make_hub_folder(str(hub), str(bundle))
    (hub / "models/model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"cannot be read .*: it is damaged"):
        load_weights(network, hub / "models/model.safetensors")


def test_a_large_file_is_listed_not_shipped(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "SIZE_LIMIT", (bundle / "models/model.pt").stat().st_size - 1)
    message = refused(bundle, tmp_path / "releases")
    assert message.startswith("'models/model.pt' has ") and "say where by --url" in message

    hosted = tmp_path / "hosted.pt"
    shutil.copy(bundle / "models/model.pt", hosted)
    path = make_release(str(tmp_path / "releases"), url=hosted.as_uri(), bundle_root=str(bundle))
    text = (bundle / "large_files.yml").read_text()
    assert text.startswith("# what is too large\n")
    assert yaml.safe_load(text)["large_files"] == [
        {
            "path": "models/model.pt",
            "url": hosted.as_uri(),
            "hash_val": hashlib.sha256(hosted.read_bytes()).hexdigest(),
            "hash_type": "sha256",
        }
    ]
    with zipfile.ZipFile(path) as archive:
        assert f"{NAME}/models/model.pt" not in archive.namelist()
        assert archive.read(f"{NAME}/large_files.yml").decode() == text
        archive.extractall(tmp_path / "elsewhere")
    download_large_files(bundle_path=str(tmp_path / "elsewhere" / NAME))
    assert (tmp_path / "elsewhere" / NAME / "models/model.pt").read_bytes() == hosted.read_bytes()
    # the address is known now
    with zipfile.ZipFile(make_release(str(tmp_path / "again"), bundle_root=str(bundle))) as archive:
        assert archive.read(f"{NAME}/large_files.yml").decode() == text


def test_the_bundles_own_versions_are_the_same_everywhere_and_on_every_python():
    requirements = ROOT / "requirements.txt"
    release._check_versions(json.loads((ROOT / "configs/metadata.json").read_text()), requirements)
    lines = requirements.read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert [r.name for r in pinned if r.marker or [s.operator for s in r.specifier] != ["=="]] == []


def test_the_bundles_own_list_is_one_that_monai_reads():
    download_large_files(bundle_path=str(ROOT))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("metadata", lambda c: c.pop("copyright"), "has no 'copyright', which the bundle specification asks for"),
        ("metadata", lambda c: c.update(version="9.0.0"), "no entry for version 9.0.0 in 'changelog'"),
        ("metadata", lambda c: c.update(monai_version="0.9"), "says monai 0.9, but requirements.txt has 1.0"),
        ("metadata", lambda c: c.update(numpy_version="3.0"), "says numpy 3.0, but requirements.txt has 1.0 and 2.0"),
        (
            "metadata",
            lambda c: c["required_packages_version"].update(keras="3.0"),
            "says keras 3.0, but requirements.txt does not have it",
        ),
        ("metadata", lambda c: c["network_data_format"].update(outputs={}), "describes no 'outputs'"),
        (
            "metadata",
            lambda c: c["network_data_format"]["inputs"]["image"].pop("dtype"),
            "says of 'image' in 'network_data_format' nothing about 'dtype'",
        ),
        (
            "metadata",
            lambda c: c["network_data_format"]["inputs"]["image"].update(spatial_shape=[64, 64, 64]),
            r"says spatial_shape \[64, 64, 64\] of 'image'.*has \[8, 8, 8\]",
        ),
        (
            "inference",
            lambda c: c["network_def"].update(channels=[4, 4, 8]),
            "models/model.pt' is of another architecture",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(bundle, tmp_path, file, change, message):
    edit(bundle / f"configs/{file}.json", change)
    with pytest.raises(ReleaseError, match=message):
        make_release(str(tmp_path / "releases"), bundle_root=str(bundle))


def test_a_missing_file_is_named(bundle, tmp_path):
    (bundle / "models/model.pt").unlink()
    assert "'models/model.pt' is tracked by git and not in the folder" in refused(bundle, tmp_path / "releases")
    subprocess.run(["git", "rm", "--quiet", "--cached", "models/model.pt"], cwd=bundle, check=True)
    assert "'models/model.pt', which every bundle has, is missing: make it by" in refused(bundle, tmp_path / "releases")


def test_a_script_that_git_does_not_track_is_named(bundle, tmp_path):
    subprocess.run(["git", "rm", "--quiet", "--cached", "scripts/training/losses.py"], cwd=bundle, check=True)
    assert "'scripts/training/losses.py' is not tracked by git" in refused(bundle, tmp_path / "releases")


def test_a_folder_outside_git_is_refused(bundle, tmp_path):
    shutil.rmtree(bundle / ".git")
    assert "release from a clone of its repository" in refused(bundle, tmp_path / "releases")


def test_weights_that_are_not_finite_are_refused(bundle, tmp_path, tiny_weights):
    state = torch.load(tiny_weights, weights_only=True)
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, bundle / "models/model.pt")
    assert "models/model.pt' are not usable: " in (said := refused(bundle, tmp_path / "releases"))
    assert "is not finite" in said


def test_an_address_for_nothing_is_refused(bundle, tmp_path):
    assert "0 files are above 25 MB: leave it out" in refused(
        bundle, tmp_path / "releases", url="https://example.org/a.pt"
    )


def test_population_prior_must_be_of_the_weights_beside_it(bundle, tmp_path, tiny_weights):
    network = ConfigParser(ConfigParser.load_config_file(bundle / "configs/inference.json"))
    network = load_weights(network.get_parsed_content("network_def"), bundle / "models/model.pt")
    shape = network.latent_grids()[0]
    prior = PopulationPrior({0: torch.zeros(shape)}, {0: torch.ones(shape)}, {0: torch.zeros(1, *shape)})
    path = bundle / "models/population_prior.pt"
    save_prior(prior, path, {"weights": fingerprint(network)})
    make_release(str(tmp_path / "releases"), bundle_root=str(bundle))
    with zipfile.ZipFile(next((tmp_path / "releases").glob("*.zip"))) as archive:
        assert any(name.endswith("models/population_prior.pt") for name in archive.namelist())
    save_prior(prior, path, {"weights": "others"})
    with pytest.raises(ReleaseError, match="was fitted to other weights than"):
        make_release(str(tmp_path / "releases"), bundle_root=str(bundle))
    path.write_bytes(b"none")
    with pytest.raises(ReleaseError, match="is no population prior"):
        make_release(str(tmp_path / "releases"), bundle_root=str(bundle))
    path.rename(bundle / "models/population_prior_64.pt")
    with pytest.raises(ReleaseError, match="of weights that are not there"):
        make_release(str(tmp_path / "releases"), bundle_root=str(bundle))


def test_half_precision_halves_the_file_and_hardly_changes_the_network(bundle, tmp_path, tiny_weights):
    config = str(bundle / "configs/inference.json")
    path = ship_weights(str(tiny_weights), str(tmp_path / "half.pt"), config)
    halved, whole = torch.load(path, weights_only=True), torch.load(tiny_weights, weights_only=True)
    assert halved.keys() == whole.keys()
    assert {t.dtype for t in halved.values()} == {torch.float16, torch.float64}
    assert halved["template_affine"].dtype == torch.float64
    for name, tensor in whole.items():
        torch.testing.assert_close(halved[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-7)
    assert sum(t.nbytes for t in halved.values()) < 0.6 * sum(t.nbytes for t in whole.values())
    shutil.copy(path, bundle / "models/model.pt")
    make_release(str(tmp_path / "releases"), bundle_root=str(bundle))


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, "reach 1e\\+05 in '.*half precision ends"), (float("inf"), "not finite")]
)
def test_what_half_precision_cannot_hold_is_refused(bundle, tmp_path, tiny_weights, value, message):
    state = torch.load(tiny_weights, weights_only=True)
    next(t for t in state.values() if t.dtype == torch.float32).view(-1)[0] = value
    torch.save(state, tmp_path / "bad.pt")
    before = (bundle / "models/model.pt").read_bytes()
    with pytest.raises(ReleaseError, match=message):
        ship_weights(str(tmp_path / "bad.pt"), str(bundle / "models/model.pt"), str(bundle / "configs/inference.json"))
    assert (bundle / "models/model.pt").read_bytes() == before
