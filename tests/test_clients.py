"""Other programs that drive the bundle: the code of docs/clients.md, run as it stands there."""

import csv
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, inference_config, run_bundle
from monai.bundle import create_workflow
from monai.fl.utils.constants import ExtraItems, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from scripts.phantoms import make_brains
from scripts.population.files import load_prior

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


def code(heading: str, index: int = 0) -> str:
    """A block of Python under a heading of docs/clients.md."""
    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[index]


def run_code(source: str, **replacements: object) -> dict:
    """Run it with other strings in place of some of its own, and return its variables."""
    for before, after in replacements.items():
        assert f'"{before}' in source, before
        source = source.replace(f'"{before}', f'"{after}')
    variables: dict = {}
    exec(source, variables)
    return variables


@pytest.fixture(autouse=True)
def in_the_bundle(monkeypatch):
    monkeypatch.chdir(ROOT)


def with_configs(source: str, config: str, overlays: list[str]) -> str:
    assert f'"configs/{config}"' in source
    return source.replace(f'"configs/{config}"', str([f"configs/{config}", *overlays]))


def test_a_notebook_encodes_decodes_and_samples(cohort):
    found = run_code(code("A notebook"), **{"scan.nii.gz": sorted(cohort.glob("*.nii.gz"))[0].as_posix()})
    network, scan = found["network"], found["scan"]
    assert not network.training and len(found["latents"]) == network.num_latents
    assert found["reconstruction"].shape == found["deviation"].shape == scan.shape == (1, 1, 64, 64, 64)
    assert (found["deviation"] > 0).all()
    # the shipped weights know phantoms
    reconstruction, scan = (found[name].as_subclass(torch.Tensor).flatten() for name in ("reconstruction", "scan"))
    assert torch.corrcoef(torch.stack([reconstruction, scan]))[0, 1] > 0.9
    assert found["samples"].shape == (4, 1, 64, 64, 64)


def test_an_inference_workflow_has_every_property(cohort, tmp_path):
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    source = with_configs(code("Workflows"), "inference.json", ["tests/tiny.json"])
    more = f'ckpt="{(tmp_path / "model.pt").as_posix()}",\n    figures=False,'
    source = source.replace("    dataset_dir=", f"    {more}\n    dataset_dir=")
    workflow = run_code(source, SCANS=cohort.as_posix(), RESULTS=(tmp_path / "results").as_posix())["workflow"]
    assert workflow.version and workflow.spatial_shape == [64, 64, 64]
    assert workflow.dataset_dir == cohort.as_posix() and len(workflow.dataset_data) == 12
    assert len(list((tmp_path / "results").glob("*_recon.nii.gz"))) == 12

    (tmp_path / "other").mkdir()
    shutil.copy(sorted(cohort.glob("*.nii.gz"))[0], tmp_path / "other")
    workflow.dataset_dir = str(tmp_path / "other")
    workflow.initialize()
    assert len(workflow.dataset) == 1


def test_a_training_workflow_has_every_property(cohort, tmp_path):
    source = with_configs(code("Workflows", 1), "train.json", TINY[1:])
    found = run_code(source, SCANS=cohort.as_posix(), OUT=(tmp_path / "out").as_posix())
    workflow = found["workflow"]
    assert workflow.check_properties() == []
    assert workflow.trainer.state.epoch == workflow.max_epochs == 3
    assert type(workflow.network_def).__name__ == "VDVAE" and workflow.val_interval == 1
    assert workflow.train_dataset_data is not None and workflow.val_key_metric.keys() == {"bits_per_dim"}
    assert (tmp_path / "out/checkpoints/model.pt").is_file()


def test_a_federated_client_trains_and_evaluates(cohort, tmp_path):
    source = with_configs(code("Federated learning"), "train.json", TINY[1:])
    source = source.replace("    local_epochs=1,", f"    config_train_filename={TINY},\n    local_epochs=1,")
    found = run_code(source, SCANS=cohort.as_posix(), OUT=(tmp_path / "out").as_posix())
    client, weights = found["client"], found["weights"]
    assert client.trainer.state.epoch == 2 and client.trainer.state.updates == 4

    # what the server sends is what is evaluated
    metrics = dict(client.evaluate(ExchangeObject(weights=weights)).metrics)
    assert np.isfinite(list(metrics.values())).all()
    other = {name: value * 1.5 for name, value in weights.items()}
    assert client.evaluate(ExchangeObject(weights=other)).metrics["bits_per_dim"] != metrics["bits_per_dim"]

    for kind in (ModelType.BEST_MODEL, ModelType.FINAL_MODEL):
        assert client.get_weights({ExtraItems.MODEL_TYPE: kind}).weights.keys() == weights.keys()
    client.send_weight_diff = True
    difference = client.get_weights()
    assert difference.weight_type == WeightType.WEIGHT_DIFF
    assert any(value.abs().max() > 0 for value in difference.weights.values())


def test_sites_train_one_model_and_fit_one_prior(tmp_path):
    spec = importlib.util.spec_from_file_location("federated", ROOT / "docs" / "examples" / "federated.py")
    federated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(federated)
    for site in "AB":
        make_brains(tmp_path / site, 12, spacing=8.0, workers=1, seed=ord(site), covariates=True, site=site)
    federated.main(
        *(str(tmp_path / site) for site in "AB"),
        output_dir=str(tmp_path / "out"),
        rounds=2,
        covariates={"age": "continuous", "sex": "categorical"},
        configs=TINY,
        inference_configs=["configs/inference.json", "tests/tiny.json"],
    )
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())
    content = torch.load(tmp_path / "out" / "population_prior.pt", weights_only=True)
    assert content["cohorts"] == {"A": 12, "B": 12}
    assert load_prior(content).coding.variables["site"].categories == ("A", "B")
    one, other = ({"w": torch.tensor([value]), "n": torch.tensor(3)} for value in (1.0, 4.0))
    assert federated.average([one, other], [2, 1]) == {"w": torch.tensor([2.0]), "n": torch.tensor(3)}


@pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is not installed: pip install mlflow-skinny sqlalchemy alembic")
def test_mlflow_keeps_what_training_measures(cohort, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from monai.utils import path_to_sqlite_uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workflow = create_workflow(
        config_file=TINY,
        workflow_type="train",
        logging_file=False,
        tracking="docs/examples/mlflow.json",
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
    )
    workflow.run()
    workflow.finalize()
    client = MlflowClient(path_to_sqlite_uri(str(tmp_path / "mlruns.db")))
    (run,) = client.search_runs([client.get_experiment_by_name("very_deep_vae").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params.items() >= {"epochs": "2", "batch_size": "4", "spatial_shape": "[8, 8, 8]"}.items()
    losses = client.get_metric_history(run.info.run_id, "update/loss")
    assert [loss.step for loss in losses] == list(range(1, workflow.trainer.state.iteration + 1))
    assert losses[-1].value == pytest.approx(workflow.trainer.state.output[0]["loss"].item())
    bits = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "bits_per_dim")}
    with (tmp_path / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "validation"]
    recorded = {int(row["epoch"]): float(row["bits_per_dim"]) for row in rows}
    assert bits == pytest.approx(recorded) and bits.keys() == {0, 1, 2}
    artifacts = {Path(item.path).name for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.json", "datalist.json", "history.csv"}


@pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is not installed: pip install mlflow-skinny sqlalchemy alembic")
def test_monai_own_tracking_settings_work(cohort, tmp_path):
    from mlflow import MlflowClient
    from monai.utils import path_to_sqlite_uri

    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--epochs", 1, "--tracking", "mlflow")
    result = run_bundle(*words)
    assert result.returncode == 0, result.stderr
    client = MlflowClient(path_to_sqlite_uri(str(tmp_path / "mlruns.db")))
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 2
    assert run.data.metrics["bits_per_dim"] < 0
