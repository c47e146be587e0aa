"""The page of ``python -m scripts.explore``: who may use it, its table, its jobs, and the page in a browser."""

from __future__ import annotations

import gzip
import html
import logging
import re
import shutil
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import nibabel as nib
import numpy as np
import pytest
import torch
import uvicorn
from browser import Window, chromium, pages, viewer
from conftest import ROOT, fitted_scans, inference_config, informative_network, run_command
from starlette.testclient import TestClient
from test_covariates import KINDS, prior_with_effects

from scripts import explore as command
from scripts.data.covariates import CovariateCoding
from scripts.inference.covariates import Deviation
from scripts.inference.engine import scan_generator
from scripts.inference.inferers import CoordinateDecoding, Imputation, Reconstruction, Sampling
from scripts.inference.outputs import from_zero_to_one
from scripts.inference.scoring import Scoring
from scripts.layers.gaussian import LatentSampler
from scripts.utils.figures import peak_of
from scripts.webpage.app import create_app
from scripts.webpage.cohort import CohortTable
from scripts.webpage.jobs import Jobs
from scripts.webpage.work import MOST_WAITING, BusyError, Result, Results, Worker

TOKEN = "a-token"
BROKEN = 12  # the number of the scan that cannot be read


@pytest.fixture(scope="module")
def folder(cohort, tmp_path_factory):
    """Twelve scans, a truncated one, and their covariates."""
    folder = tmp_path_factory.mktemp("explored")
    names = []
    for path in sorted(cohort.glob("*.nii.gz")):
        shutil.copy(path, folder)
        names.append(path.name.split("_")[0])
    (folder / "sub-9999_FLAIR.nii.gz").write_bytes(path.read_bytes()[:600])
    rows = [f"{name}\t{40 + 3 * place}\t{'FM'[place % 2]}\t{'ABC'[place % 3]}" for place, name in enumerate(names)]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex\tsite", *rows, ""]))
    return folder


@pytest.fixture(scope="module")
def network(cohort):
    return informative_network(cohort)


@pytest.fixture(scope="module")
def prior(network):
    rows = [{"age": str(40 + k), "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    return prior_with_effects(network, CovariateCoding.learn(KINDS, rows))


@pytest.fixture(scope="module")
def jobs(folder, network, prior):
    return Jobs(inference_config(network=network, population_prior=prior, dataset_dir=str(folder)))


def program(jobs):
    """What asks for jobs without a browser."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    return TestClient(create_app(jobs, TOKEN), base_url="http://127.0.0.1", headers=headers)


@pytest.fixture
def client(jobs):
    with program(jobs) as client:
        yield client


def ask(client, kind, **arguments):
    """A job's last state."""
    answer = client.post("/api/jobs", json={"kind": kind, "arguments": arguments})
    assert answer.status_code == 202, answer.text
    return wait(client, answer.json())


def wait(client, job):
    for _ in range(3000):
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.01)
        job = client.get(f"/api/jobs/{job['id']}").json()
    raise AssertionError(job)


def volume(client, job, name):
    content = client.get(job["files"][f"{name}.nii.gz"]).content
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_the_token_opens_the_page(jobs):
    client = TestClient(create_app(jobs, TOKEN), base_url="http://127.0.0.1", follow_redirects=False)
    for path in ("/", "/?token=wrong", "/api/about", "/api/scans", "/static/app.js", "/api/about?token=a-token"):
        answer = client.get(path)
        assert answer.status_code == 401 and "token is missing or wrong" in answer.json()["error"], path
    first = client.get(f"/?token={TOKEN}")
    assert first.status_code == 303 and first.headers["location"] == "/"
    assert {"HttpOnly", "SameSite=strict"} <= set(first.headers["set-cookie"].split("; "))
    page = client.get("/")
    assert page.status_code == 200 and "niivue" in page.text
    policy = page.headers["content-security-policy"]
    assert all(part in policy for part in ("default-src 'self'", "base-uri 'none'", "form-action 'none'"))
    assert client.get("/static/niivue/LICENSE").status_code == 200


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/about", {"host": "evil.example"}, 403),
        ("/api/about", {"host": "127.0.0.1.evil.example:80"}, 403),
        ("/api/about", {"origin": "http://evil.example"}, 403),
        ("/api/about", {"origin": "http://127.0.0.1:1"}, 403),
        ("/api/about", {"origin": "null"}, 403),
        ("/api/about", {"origin": "http://127.0.0.1"}, 200),
        ("/api/about", {"host": "localhost:8000"}, 200),
        ("/api/about", {"host": "[::1]:8000"}, 200),
        ("/api/about", {"authorization": "Bearer other"}, 401),
        ("/static/%2e%2e/app.py", {}, 400),
        ("/static/..%2fapp.py", {}, 400),
        ("/static/..%5capp.py", {}, 400),
        ("/api/results/%2e%2e/%2e%2e", {}, 400),
        ("/api/results/none/scan.nii.gz", {}, 404),
        ("/api/jobs/none", {}, 404),
    ],
)
def test_odd_requests_are_refused(client, path, headers, status):
    assert client.get(path, headers=headers).status_code == status


def test_long_requests_are_refused(client):
    assert client.post("/api/jobs", content=b" " * 1_100_000).status_code == 413
    assert client.post("/api/jobs", content=iter([b"{}"])).status_code == 413  # of a length that it does not say


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "A job is asked for as"),
        (b"[1]", "A job is asked for as"),
        (b"[" * 100_000, "A job is asked for as"),
        (b'{"kind": "\\ud800"}', "There is no job '\\ud800'"),
        (b'{"kind": ["view"]}', "There is no job ['view']"),
        (b'{"kind": "eval", "arguments": {}}', "There is no job 'eval'"),
        (b'{"kind": "view", "arguments": {}}', "missing a required argument: 'index'"),
        (b'{"kind": "view", "arguments": {"index": 0, "path": "x"}}', "unexpected keyword argument 'path'"),
    ],
)
def test_what_is_no_job_is_refused(client, body, said):
    answer = client.post("/api/jobs", content=body)
    assert answer.status_code == 422 and said in answer.json()["error"]


def test_what_is_not_a_number_is_refused(client):
    answer = client.post("/api/jobs", content=b'{"kind": "view", "arguments": {"index": NaN}}')
    job = wait(client, answer.json())
    assert job["state"] == "failed" and "There is no scan nan" in job["error"]


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("view", {"index": 99}, "There is no scan 99"),
        ("view", {"index": True}, "There is no scan True"),
        ("view", {"index": 0, "channel": 1}, "There is no channel 1"),
        ("view", {"index": BROKEN}, "cannot be read as an image"),
        ("decode", {"coordinates": [0, 0, 0]}, "coordinates must be 1 to 2 numbers"),
        ("decode", {"coordinates": ["a"]}, "coordinates must be 1 to 2 numbers"),
        ("sample", {"count": 0}, "count is 0"),
        ("sample", {"seed": -1}, "seed is -1"),
        ("sample", {"prior": "other"}, "prior is 'other'"),
        ("sample", {"temperature": 99}, "temperature is 99"),
        ("sample", {"temperature": {"3": 1}}, "names the grid '3'"),
        ("sample", {"covariates": {"height": 2}}, "knows no 'height'"),
        ("change", {"index": 0, "covariates": {"age": list(range(40, 60))}}, "11 are the most"),
        ("change", {"index": 0, "covariates": {"sex": "X"}}, "sex is 'X'"),
        ("change", {"index": 0, "covariates": {"age": [50, -3]}}, "from 40 to 81; ask for one from 29.75 to 91.25"),
        ("sample", {"covariates": {"age": 900}}, "age is 900: in the prior's cohort it goes from 40 to 81"),
        ("mix", {"first": 0, "second": 1, "levels": ["3"]}, "names the grid '3'"),
        ("mix", {"first": 0, "second": 1, "steps": 1}, "steps is 1"),
        ("fill", {"index": 0, "mask": []}, "Nothing is painted"),
        ("fill", {"index": 0, "mask": [0, 512]}, "Everything is painted"),
        ("fill", {"index": 0, "mask": [510, 3]}, "lie in the scan's 512 voxels"),
        ("fill", {"index": 0, "mask": [1]}, "must be whole numbers"),
        ("fill", {"index": 0, "mask": [0, True]}, "must be whole numbers"),
        ("fill", {"index": 0, "mask": [1, 1], "draws": 1}, "draws is 1"),
    ],
)
def test_errors_are_sentences(client, kind, arguments, said):
    job = ask(client, kind, **arguments)
    assert job["state"] == "failed" and said in job["error"] and "Traceback" not in job["error"]


def test_the_table_is_scored_sorted_and_searched(client):
    assert ask(client, "score")["state"] == "done"
    assert ask(client, "score")["result"] == {"scored": 1}  # the one that is broken: its file may be mended by now
    page = client.get("/api/scans?sort=bits_per_dim&descending=true&limit=5").json()
    assert (page["total"], page["scored"], page["broken"], len(page["rows"])) == (13, 12, 1, 5)
    assert {"image", "age", "site", "bits_per_dim", "anomaly_score", "typicality"} <= set(page["columns"])
    scores = [row["bits_per_dim"] for row in page["rows"]]
    assert scores == sorted(scores, reverse=True)
    last = client.get("/api/scans?sort=bits_per_dim&offset=12").json()["rows"]
    assert [row["index"] for row in last] == [BROKEN] and "cannot be read as an image" in last[0]["error"]
    assert [row["age"] for row in client.get("/api/scans?sort=age&limit=2").json()["rows"]] == [40, 43]
    assert client.get("/api/scans?search=9999").json()["total"] == 1
    assert client.get("/api/scans?limit=many").status_code == 422


def test_a_large_cohort_is_no_problem():
    class Columns:
        def __call__(self, scan):
            return {"image": scan, "subject": "001"}

        def details(self, scan):
            return {"age": str(len(scan) + int(scan[1:-4]) % 70)}

    cohort = CohortTable([{"image": f"s{number}.nii"} for number in range(5000)], Columns())
    for number in range(0, 5000, 2):
        cohort.note(number, bits_per_dim=float(number % 997))
    start = time.process_time()
    page = cohort.page(offset=2000, limit=10_000, sort="bits_per_dim", search="S")
    assert time.process_time() - start < 1
    assert page["total"] == 5000 and page["scored"] == 2500 and len(page["rows"]) == 200
    assert page["rows"][0]["subject"] == "001" and isinstance(page["rows"][0]["age"], float)


def test_pictures_of_scans(client):
    answer = client.get("/api/scans/0/thumbnail.png")
    assert answer.headers["content-type"] == "image/png" and answer.content[1:4] == b"PNG"
    broken = client.get(f"/api/scans/{BROKEN}/thumbnail.png")
    assert broken.status_code == 422 and "cannot be read as an image" in broken.json()["error"]
    assert client.get("/api/scans/0/thumbnail.png?channel=x").status_code == 422


@torch.no_grad()
def test_a_scan_is_shown_as_the_jobs_see_it(client, cohort, network):
    job = ask(client, "view", index=3)
    scans, affine = fitted_scans(cohort)
    found = Reconstruction(levels="each")(scans[3:4], network)
    for name in ("recon", "recon_to2", "recon_to4"):
        image = volume(client, job, name)
        np.testing.assert_allclose(image.get_fdata(), from_zero_to_one(found[name][0, 0], (-1, 1)), atol=1e-5)
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_allclose(volume(client, job, "zscore").get_fdata(), found["zscore"][0, 0], rtol=1e-3, atol=1e-3)
    voxel = np.linalg.solve(affine, [*job["result"]["peak"], 1])[:3].round().astype(int)
    inside, anomaly = (volume(client, job, name).get_fdata() for name in ("scan", "anomaly"))
    assert abs(anomaly[tuple(voxel)]) == pytest.approx(np.abs(anomaly[inside > 0.05]).max())
    assert {"scan", "restored", "anomaly", "scale"} <= {name.removesuffix(".nii.gz") for name in job["files"]}
    # the numbers are those of `score`
    sampler = LatentSampler([scan_generator(0, job["result"]["row"]["image"])])
    scoring = Scoring(smoothing=8 / 128)
    expected = scoring(scans[3:4], network, sampler=sampler)
    assert job["result"]["row"]["bits_per_dim"] == pytest.approx(float(expected["bits_per_dim"]), rel=1e-5)


@torch.no_grad()
def test_sliders_decode_coordinates(client, network, prior):
    places = ask(client, "coordinates", index=1)["result"]["coordinates"]
    assert len(places) == prior.factors
    job = ask(client, "decode", coordinates=[1.5], start=[0, 0])
    moved = CoordinateDecoding(prior)(torch.tensor([[1.5, 0.0], [0.0, 0.0]]), network)["sample"]
    moved = from_zero_to_one(moved[:, 0], (-1, 1))
    np.testing.assert_allclose(volume(client, job, "decoded").get_fdata(), moved[0], atol=1e-5)
    difference = volume(client, job, "difference").get_fdata()
    np.testing.assert_allclose(difference, moved[0] - moved[1], atol=1e-5)
    assert np.abs(difference).max() > 1e-3


@torch.no_grad()
def test_samples_are_those_of_the_seed(client, network, prior):
    job = ask(client, "sample", count=2, seed=5, covariates={"age": 70})
    sampler = LatentSampler([scan_generator(5, "0002")])
    expected = Sampling(prior=prior, covariates={"age": 70})(1, network, sampler=sampler)["sample"][0, 0]
    shown = volume(client, job, "sample_0002").get_fdata()
    np.testing.assert_allclose(shown, from_zero_to_one(expected, (-1, 1)), atol=1e-5)
    assert client.get(job["files"]["sample_0001.png"]).headers["content-type"] == "image/png"
    other = ask(client, "sample", count=2, seed=5, prior="network", temperature={"4": 0.5})
    assert not np.allclose(volume(client, other, "sample_0002").get_fdata(), shown)


def test_changes_and_mixtures_are_film_strips(client):
    job = ask(client, "change", index=0, covariates={"age": [45, 80], "sex": "M"})
    assert job["result"]["labels"] == ["as it is", "age 45, sex M", "age 80, sex M"]
    assert job["result"]["known"] == {"age": 40.0, "sex": "F", "site": "A"}
    assert np.abs(volume(client, job, "difference_02").get_fdata()).max() > 1e-3
    assert not volume(client, job, "difference_00").get_fdata().any()
    mixed = ask(client, "mix", first=0, second=1, levels=["4"], steps=3)
    whole = ask(client, "mix", first=0, second=1, steps=3)
    ends = [volume(client, job, "frame_02").get_fdata() for job in (mixed, whole)]
    assert mixed["result"]["labels"] == ["0%", "50%", "100%"] and not np.allclose(*ends)


@torch.no_grad()
def test_the_deviation_is_that_of_the_scans_own_covariates(client, cohort, network, prior):
    job = ask(client, "deviation", index=3)
    assert job["result"]["known"] == {"age": 49.0, "sex": "M", "site": "A"} and job["total"] == 32
    scans, _ = fitted_scans(cohort)
    name = client.get("/api/scans").json()["rows"][3]["image"]
    maps = {}
    for age in (49.0, 70.0):
        features = prior.coding.numbers({"age": age, "sex": "M", "site": "A"})[None]
        sampler = LatentSampler([scan_generator(0, name)])
        maps[age] = Deviation(prior, 32)(scans[3:4], network, features, sampler=sampler)["deviation"][0, 0].numpy()
    shown = volume(client, job, "deviation").get_fdata()
    np.testing.assert_allclose(shown, maps[49.0], rtol=1e-3, atol=1e-3)
    assert np.abs(shown - maps[70.0]).max() > 0.1


@pytest.fixture(scope="module")
def healthy(cohort, tmp_path_factory):
    """People who are none of the scans: these, mirrored."""
    others = tmp_path_factory.mktemp("healthy")
    for path in cohort.glob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(image.get_fdata()[::-1], image.affine), others / path.name)
    return others


@pytest.fixture(scope="module")
def certified_jobs(folder, healthy, network, prior, tmp_path_factory):
    """The page with the calibration of a run of the job; half of the brain is gone in its fourth scan."""
    output = tmp_path_factory.mktemp("certified")
    shutil.copytree(folder, output / "scans")
    path = sorted((output / "scans").glob("*.nii.gz"))[3]
    image = nib.load(path)
    values = image.get_fdata()
    values[: len(values) // 2] = 0
    nib.save(nib.Nifti1Image(values, image.affine), path)
    config = {"network": network, "population_prior": prior, "dataset_dir": str(output / "scans"), "error_rate": 0.1}
    run = inference_config(**config, calibration=str(healthy), output_dir=str(output / "run"))
    run.get_parsed_content("deviation")
    return Jobs(inference_config(**config, calibration=str(output / "run" / "calibration.json")))


def test_the_certificate_stands_beside_the_deviation(certified_jobs, client, folder, healthy, network, prior):
    with program(certified_jobs) as certified:
        assert certified.get("/api/about").json()["certified"]
        job = ask(certified, "deviation", index=3)
        said = job["result"]["certificate"]
        assert said["guarantee"].startswith("Of healthy people like the 12 of the calibration at most 10 % have")
        sizes = [found["p"] for found in said["findings"]]
        assert sizes == sorted(sizes) and min(sizes) >= said["smallest_p"] == pytest.approx(1 / 13)
        shown = np.abs(volume(certified, job, "significant").get_fdata())
        found = [-np.log10(p) for p in sizes if p <= 0.1]
        assert found and set(np.unique(shown[shown > 0]).round(3)) == set(np.round(found, 3))
    assert not client.get("/api/about").json()["certified"]
    config = {"network": network, "population_prior": prior, "dataset_dir": str(folder)}
    with pytest.raises(ValueError, match=r"the page takes a calibration\.json"):
        Jobs(inference_config(**config, error_rate=0.1, calibration=str(healthy)))


@torch.no_grad()
def test_what_is_painted_is_filled_in(client, cohort, network):
    # a box of 2 x 3 x 2 voxels from (3, 2, 4) on, as the page sends it: runs along the first axis
    runs = [number for z in (4, 5) for y in (2, 3, 4) for number in (3 + 8 * y + 64 * z, 2)]
    job = ask(client, "fill", index=3, mask=runs, draws=3)
    assert job["result"]["voxels"] == 12 and (job["done"], job["total"]) == (9, 9)
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    mask[..., 3:5, 2:5, 4:6] = True
    noise = LatentSampler([scan_generator(0, client.get("/api/scans").json()["rows"][3]["image"])])
    found = Imputation(draws=3)(fitted_scans(cohort)[0][3:4], network, mask, sampler=noise)
    draws = from_zero_to_one(torch.cat(list(found.values()))[:, 0], (-1, 1)).numpy()
    scan, filled = (volume(client, job, name).get_fdata() for name in ("scan", "filled"))
    inside = mask[0, 0].numpy()
    np.testing.assert_allclose(filled[inside], draws.mean(0)[inside], atol=1e-5)
    np.testing.assert_array_equal(filled[~inside], scan[~inside])
    np.testing.assert_allclose(volume(client, job, "draw_02").get_fdata(), draws[2], atol=1e-5)
    spread = volume(client, job, "spread").get_fdata()
    np.testing.assert_allclose(spread[inside], draws.std(0, ddof=1)[inside], atol=1e-5)
    assert (spread[inside] > 0).all() and not spread[~inside].any()


def endless(log, name, gate=None):
    for number in range(10**6):
        log.append(name)
        if gate is not None:
            gate.wait(10)
        yield number, 10**6
    yield Result()


def steps(count, **files):
    for number in range(count):
        yield number, count
    yield Result({"count": count}, files)


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came about")


def test_a_long_job_holds_nobody_up_and_can_be_cancelled():
    worker, log = Worker(Results()), []
    long = worker.submit("score", "long", endless(log, "long"))
    until(lambda: len(log) > 3)
    short = worker.submit("view", "short", steps(5))
    until(lambda: short.ended)
    assert short.state == "done" and long.state == "running" and worker.active() == [long]
    worker.cancel(long)
    assert long.state == "cancelled" and worker.active() == []
    time.sleep(0.05)
    done = len(log)
    time.sleep(0.05)
    assert len(log) == done and worker.results.get("long") is None
    assert worker.submit("view", "short", steps(5)).state == "done"  # its result is kept
    worker.stop()


def test_many_short_jobs_hold_nobody_up():
    worker, log, gate = Worker(Results()), [], threading.Event()

    def noted(name):
        yield 0, 2
        log.append(name)
        gate.wait(10)
        yield 1, 2
        yield Result()

    for number in range(100):
        worker.submit("thumbnail", str(number), noted("thumbnail"))
    view = worker.submit("view", "view", noted("view"))
    gate.set()
    until(lambda: view.ended)
    assert log.index("view") < 5  # not after all of them
    until(lambda: not worker.active())
    assert log.count("thumbnail") == 100
    worker.stop()


def test_memory_does_not_grow_with_requests():
    results = Results(room=10_000)
    worker = Worker(results)
    jobs = [worker.submit("view", str(number), steps(1, a=bytes(3000))) for number in range(50)]
    until(lambda: all(job.ended for job in jobs))
    assert results.size <= 10_000 and len(results._kept) == 2
    assert results.get("0") is None and results.get("49") is not None
    for number in range(700):
        worker.cancel(worker.submit("view", f"more {number}", steps(1)))
    until(lambda: not worker.active())
    assert len(worker._jobs) <= 600
    worker.stop()


def test_too_many_jobs_are_refused():
    worker, gate = Worker(Results()), threading.Event()
    for number in range(MOST_WAITING):
        worker.submit("view", str(number), endless([], "", gate))
    with pytest.raises(BusyError, match="jobs are waiting already"):
        worker.submit("view", "last", steps(1))
    for job in worker.active():
        worker.cancel(job)
    gate.set()
    worker.stop()


def test_an_error_of_the_program_ends_the_job_alone(caplog):
    def broken():
        yield 0, 1
        raise KeyError("oops")

    worker = Worker(Results())
    job = worker.submit("view", "broken", broken())
    until(lambda: job.ended)
    assert job.state == "failed" and "oops" in job.error and "The job 'view' of the page failed" in caplog.text
    after = worker.submit("view", "good", steps(1))
    until(lambda: after.ended)
    assert after.state == "done"
    worker.stop()


def test_without_a_prior_the_page_says_what_is_missing(folder, network):
    with program(Jobs(inference_config(network=network, population_prior=None, dataset_dir=str(folder)))) as client:
        about = client.get("/api/about").json()
        assert about["factors"] == 0 and about["covariates"] == [] and about["levels"][0] == {"key": "2", "name": "2³"}
        assert "no population prior" in ask(client, "decode", coordinates=[1])["error"]
        assert "'network' alone" in ask(client, "sample")["error"]
        assert "fitted with covariates" in ask(client, "change", index=0, covariates={"age": 50})["error"]
        assert "fitted with covariates" in ask(client, "deviation", index=0)["error"]
        assert ask(client, "sample", prior="network", count=1)["state"] == "done"


@pytest.mark.parametrize(
    ("words", "said"), [(("--port", 99999), "port is 99999"), (("--browser", "maybe"), "browser is 'maybe'")]
)
def test_the_command_refuses(words, said):
    result = run_command("scripts.explore", *words)
    assert result.returncode != 0 and said in result.stderr


def own_file(uri):
    """The address that a file leads to, which nobody else can read."""
    path = Path(urlparse(uri).path)
    assert path.stat().st_mode & 0o777 == 0o600
    return html.unescape(re.search(r"url=(.*)\">", path.read_text())[1])


def test_the_command_prints_its_address(folder, network, tmp_path, monkeypatch, caplog):
    served, opened = [], []

    def serve(server, sockets):
        served.append((server.config.app, sockets[0].getsockname()))
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    # by a file of the user's own: what a command line says is seen by others
    monkeypatch.setattr(command.webbrowser, "open", lambda uri: opened.append(own_file(uri)))
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    given = {"ckpt": tmp_path / "model.pt", "dataset_dir": folder, "prior": "network", "bundle_root": str(ROOT)}
    given["config_file"] = [command.INFERENCE, str(ROOT / "tests" / "tiny.json")]
    with caplog.at_level(logging.INFO):
        command.explore(**given, browser=True)
    (app, (host, port)), (address,) = served[0], opened
    assert not list(Path(tempfile.gettempdir()).glob("explore-*.html"))
    assert host == "127.0.0.1" and address.startswith(f"http://127.0.0.1:{port}/?token=") and address in caplog.text
    assert "other machines" not in caplog.text
    token = address.partition("token=")[2]
    client = TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {token}"})
    assert client.get("/api/scans").json()["total"] == 13
    command.explore(**given, host="0.0.0.0", browser=False)
    assert "other machines can reach this page" in caplog.text and len(opened) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="set another --port"):
        command.explore(**given, port=taken.getsockname()[1], browser=False)


@contextmanager
def served(jobs):
    """The address of the page while it is served."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(jobs, TOKEN), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def slow(**arguments):
    """A job of half a minute."""
    for done in range(300):
        time.sleep(0.1)
        yield done, 300
    yield Result()


def test_the_page_shows_what_is_significant(certified_jobs, browser):
    with served(certified_jobs) as address, pages(browser):
        window = Window(browser, address)
        window.page.locator("#scans tbody tr").nth(3).click()
        window.page.get_by_label("Overlay").first.select_option("significant")
        window.page.get_by_text(
            re.compile("Largest clusters: .* ml, p 0.077.*Of healthy people like the 12")
        ).wait_for()
        window.holds(f"{viewer('#scans')}.volumes.length === 2")
        assert window.overlaid("#scans") == np.count_nonzero(window.volume("#scans", 1))
        assert not window.failures


def test_the_page_in_a_browser(jobs, browser, tmp_path, monkeypatch):
    with served(jobs) as address, pages(browser):
        window = Window(browser, address)
        page, holds, drawn = window.page, window.holds, window.drawn

        # scans: choose one, overlay, threshold, levels; the broken one is a row that says why
        page.wait_for_selector("td.error", state="attached")
        broken = page.locator("td.error div")
        assert broken.text_content().startswith("cannot be read as an image")
        assert "sub-9999_FLAIR.nii.gz' cannot" in broken.get_attribute("title")  # all of it
        assert page.locator("tr", has=broken).bounding_box()["height"] < 50
        # a heading keeps the focus when Enter sorts by it; a search without hits says so
        head = page.locator("[data-column=age]")
        head.press("Enter")
        page.get_by_role("button", name="age ↓").wait_for()
        assert page.evaluate("document.activeElement.textContent") == "age ↓"
        page.get_by_label("Search").fill("nobody")
        page.get_by_text("No scan of 13 has “nobody” in its row.").wait_for()
        page.get_by_label("Search").fill("")
        page.get_by_text("1 to 13 of 13").wait_for()
        head.press("Enter")
        page.get_by_role("button", name="age ↑").wait_for()
        page.locator("#scans tbody tr").first.press("Enter")
        drawn("#scans")
        assert page.locator("#scans .bar").count() == 2
        assert page.locator("#scans .bar").last.text_content().endswith("orange brighter")
        nv = viewer("#scans")
        place = page.evaluate(f"Array.from({nv}.frac2vox({nv}.scene.crosshairPos))")
        assert tuple(place) == peak_of(*(window.volume("#scans", number)[None] for number in (0, 1)))[1:]
        page.get_by_label("Threshold").first.fill("4")
        assert page.evaluate(f"{nv}.volumes[1].cal_min") == pytest.approx(4)
        page.get_by_label("Opacity").first.fill("0.4")
        assert page.evaluate(f"{nv}.volumes[1].opacity") == pytest.approx(0.4)
        with page.expect_download() as download:
            page.get_by_text("Download overlay").first.click()
        scan = page.text_content("#scans .caption").removesuffix(".nii.gz")
        assert download.value.suggested_filename == f"{scan}_anomaly.nii.gz"
        download.value.save_as(tmp_path / "anomaly.nii.gz")
        overlay = nib.load(tmp_path / "anomaly.nii.gz").get_fdata()
        np.testing.assert_allclose(np.sort(overlay, None), np.sort(window.volume("#scans", 1), None), rtol=1e-4)
        # what is below the threshold is not drawn, and above the largest value nothing is
        overlay = np.abs(window.volume("#scans", 1))
        for threshold in (0.5, 1):
            page.get_by_label("Threshold").first.fill(str(threshold))
            assert 0 < (overlay >= threshold).sum() < 512
            assert window.overlaid("#scans") == (overlay >= threshold).sum()
        page.get_by_label("Threshold").first.fill("6")
        assert overlay.max() < 6 and window.overlaid("#scans") == 0
        before = np.abs(window.volume("#scans")).sum()
        page.get_by_label("Levels", exact=True).fill("0")
        drawn("#scans", 2)
        assert np.abs(window.volume("#scans")).sum() != before
        # what is unusual for the scan's covariates is made when it is chosen, and again for the next scan
        page.get_by_label("Overlay").first.select_option("deviation")
        page.get_by_text("people of age 40, sex F, site A").wait_for()
        assert "standard deviations, blue darker, orange brighter" in page.locator("#scans .bar").last.text_content()
        assert page.evaluate(f"{nv}.volumes[1].cal_min") == pytest.approx(2)
        assert page.evaluate(f"{nv}.volumes[1].colormap + {nv}.volumes[1].colormapNegative") == "warmcold"
        page.locator("#scans tbody tr").nth(1).click()
        page.get_by_text("people of age 43, sex M, site B").wait_for()
        # one that was given up while it was made is made anew when it is chosen again
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "deviation", slow)
            page.locator("#scans tbody tr").nth(2).click()
            page.get_by_text(re.compile("deviation for age, sex, site: .* of 300")).wait_for()
            page.get_by_label("Overlay").first.select_option("anomaly")
        page.get_by_label("Overlay").first.select_option("deviation")
        page.get_by_text("people of age 46, sex F, site C").wait_for()
        page.get_by_text("Score all").click()
        holds("document.querySelector('#scans').textContent.includes('12 scored')")

        # latents: a slider changes voxels, reset undoes it, the result can be downloaded
        page.get_by_role("tab", name="Latents").click()
        drawn("#latents")
        before = np.abs(window.volume("#latents")).sum()
        page.get_by_label("Factor 1", exact=True).fill("3")
        drawn("#latents", 2)
        assert np.abs(window.volume("#latents")).sum() != pytest.approx(before, rel=1e-4)
        with page.expect_download() as download:
            page.locator("#latents").get_by_text("Download NIfTI").click()
        assert download.value.suggested_filename == f"{scan}_decoded.nii.gz"
        download.value.save_as(tmp_path / "decoded.nii.gz")
        image = nib.load(tmp_path / "decoded.nii.gz")
        assert image.shape == (8, 8, 8) and image.get_fdata().sum() == pytest.approx(
            np.abs(window.volume("#latents")).sum(), rel=1e-3
        )
        page.get_by_text("Reset").click()
        drawn("#latents", 3)
        assert np.abs(window.volume("#latents")).sum() == pytest.approx(before, rel=1e-4)
        # the caption names the scan that the sliders started from, whatever is typed since
        scan = page.locator("#scans tbody tr").nth(1).locator("td").nth(1).text_content()
        start, caption = page.get_by_label("Start from"), page.locator("#latents .caption")
        start.fill(scan)
        page.get_by_text(f"factors say of {scan}").wait_for()
        shown = caption.text_content()
        for typed, said in ((scan[:6], ""), ("sub-9999_FLAIR.nii.gz", "cannot be read as an image")):
            start.fill(typed)
            if said:
                page.locator("#latents .message").get_by_text(said).wait_for()
            seen = window.times("#latents")
            page.get_by_label("Factor 1", exact=True).fill("1" if said else "2")
            drawn("#latents", seen + 1)
            assert caption.text_content() == shown

        # samples: a sheet, keep one and compare
        page.get_by_role("tab", name="Sample").click()
        page.wait_for_selector("#sample .sheet img")
        assert page.locator("#sample .sheet img").count() == 8
        page.get_by_role("button", name="Keep on the left").click()
        page.locator("#sample .sheet button").nth(2).click()
        drawn("#sample", 2, place=1)
        captions = page.locator("#sample .caption").all_text_contents()
        assert captions == [f"Sample {number} of seed 0, the cohort's prior" for number in (1, 3)]
        page.locator("#sample").get_by_role("spinbutton", name="age 40 to 81 in the cohort").fill("70")
        page.get_by_label("Temperature", exact=True).fill("0.8")
        page.get_by_role("button", name="Draw").click()
        kept = "Sample 1 of seed 0, the cohort's prior"
        page.get_by_text(f"{kept}, temperature 0.8, age 70").wait_for()
        assert page.locator("#sample .caption").first.text_content() == kept

        # work that takes long is cancelled, where it was asked for and in the bar at the bottom after a reload
        monkeypatch.setattr(jobs, "sample", slow)
        page.get_by_label("Seed").fill("7")  # those of seed 0 are kept
        page.get_by_role("button", name="Draw").click()
        page.locator("#sample").get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled.").wait_for()
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("Drawing samples").wait_for()
        monkeypatch.undo()
        page.reload()
        page.get_by_text("Drawing samples").wait_for()
        page.locator("#jobs").get_by_role("button", name="Cancel").first.click()
        page.get_by_text("Not for clinical use.").wait_for()
        page.get_by_role("tab", name="Scans").click()
        page.locator("#scans tbody tr").first.press("Enter")
        drawn("#scans")

        # change: the scan that was opened, over age; errors are sentences
        page.get_by_role("tab", name="Change").click()
        page.get_by_role("button", name="Mix", exact=True).click()
        assert page.text_content("#change .message") == "Second scan: choose one first."
        # a part of a name that one scan alone has will do, others are not guessed at
        second = page.get_by_label("Second scan")
        second.fill("sub-00")
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Mix", exact=True).click()
        assert "12 scans have “sub-00” in their rows" in page.text_content("#change .message")
        assert page.locator("#change .hint").is_visible()
        second.fill("0002")
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Mix", exact=True).click()
        page.wait_for_selector("#change .sheet img")
        assert "to sub-0002_FLAIR.nii.gz" in page.text_content("#change .caption")
        assert not page.locator("#change .hint").is_visible()
        drawn("#change")
        seen = window.times("#change")
        page.get_by_text("Film over age").click()
        page.locator("#change .caption").get_by_text("(age 40, sex F, site A)").wait_for()
        drawn("#change", seen + 1)
        assert page.locator("#change .sheet img").count() == 10

        # paint: a stroke on an axial slice reaches the slices around it; inside voxels change, outside none
        seen = window.times("#change")
        fill, paint = (page.get_by_role("button", name=name, exact=True) for name in ("Fill", "Paint"))
        paint.click()
        drawn("#change", seen + 1)
        assert fill.is_disabled() and page.get_by_label("through slices").is_checked()
        nv = viewer("#change")
        left, top, width, height = page.evaluate(f"{nv}.screenSlices.find((s) => s.axCorSag === 0).leftTopWidthHeight")
        box = page.locator("#change canvas").bounding_box()

        def stroke(share):
            y = box["y"] + top + height / 2
            page.mouse.move(box["x"] + left + width * (0.5 - share), y)
            page.mouse.down()
            page.mouse.move(box["x"] + left + width * (0.5 + share), y, steps=4)
            page.mouse.up()

        stroke(0.1)
        painted = page.evaluate(f"Array.from({nv}.drawBitmap)")
        mask = np.array(painted, bool).reshape((8, 8, 8), order="F")
        assert 27 <= mask.sum() < 512 and mask.any((0, 1)).sum() == 3  # three slices
        assert f"{mask.sum()} voxels painted" in page.text_content("#change")
        stroke(0.4)
        assert sum(page.evaluate(f"Array.from({nv}.drawBitmap)")) > mask.sum()
        page.get_by_role("button", name="Undo").click()
        assert page.evaluate(f"Array.from({nv}.drawBitmap)") == painted
        before = window.volume("#change")
        fill.click()
        drawn("#change", seen + 2)
        assert "spread of draws" in page.locator("#change .bar").last.text_content()
        after, spread = (window.volume("#change", number) for number in (0, 1))
        assert (after[mask] != before[mask]).any() and (after[~mask] == before[~mask]).all()
        assert spread[mask].any() and not spread[~mask].any()

        monkeypatch.setattr(jobs, "fill", slow)
        paint.click()
        drawn("#change", seen + 3)
        assert page.evaluate(f"Array.from({nv}.drawBitmap)") == painted  # to go on from
        page.get_by_label("Draws").fill("5")
        fill.click()
        page.get_by_text("Filling in:").wait_for()
        page.locator("#change").get_by_role("button", name="Cancel").click()
        page.locator("#change").get_by_text("Cancelled.").wait_for()
        monkeypatch.undo()
    assert window.elsewhere == [] and window.failures == []


def test_a_picture_that_nobody_waits_for_is_not_made(jobs, monkeypatch):
    given_up = threading.Event()

    def endless_picture(**arguments):
        try:
            while True:
                time.sleep(0.01)
                yield 0, 1
        finally:
            given_up.set()

    monkeypatch.setattr(jobs, "thumbnail", endless_picture)
    with served(jobs) as address:
        port = int(address.split(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as asked:
            head = f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}"
            asked.sendall(f"GET /api/scans/0/thumbnail.png HTTP/1.1\r\n{head}\r\n\r\n".encode())
            assert not given_up.wait(0.5)
        assert given_up.wait(10)


def test_two_people_at_once(jobs, browser, monkeypatch):
    with served(jobs) as address, pages(browser):
        first, second = windows = [Window(browser, address) for _ in range(2)]
        for window in windows:
            window.page.wait_for_selector("#scans tbody tr img")
        # each gets the scan that it asks for, while both ask
        for window, row in zip(windows, (2, 5), strict=True):
            window.page.locator("#scans tbody tr").nth(row).click()
        for window in windows:
            window.drawn("#scans")
        with program(jobs) as client:
            for window, row in zip(windows, (2, 5), strict=True):
                shown = volume(client, ask(client, "view", index=row), "scan").get_fdata()
                np.testing.assert_allclose(window.volume("#scans"), shown, atol=1e-6)
        # the long work of one does not hold up the other, who sees it and can end it
        monkeypatch.setattr(jobs, "score", slow)
        first.page.get_by_text("Score all").click()
        second.page.get_by_text("Scoring scans").wait_for()
        second.page.get_by_role("tab", name="Latents").click()
        second.drawn("#latents")
        assert first.page.get_by_text("Score all").is_disabled()
        second.page.locator("#jobs").get_by_role("button", name="Cancel").click()
        first.holds("![...document.querySelectorAll('button')].find((b) => b.textContent === 'Score all').disabled")
    for window in windows:
        assert window.elsewhere == [] and window.failures == []


def test_the_channel_that_is_shown_is_chosen(folder, browser, tmp_path):
    for number, path in enumerate(sorted(folder.glob("sub-0*.nii.gz"))[:2]):
        scan = nib.load(path)
        flair = scan.get_fdata(dtype=np.float32)
        for name, values in (("T1w", np.where(flair > 0, 2 * flair.max() - flair, 0)), ("FLAIR", flair)):
            nib.save(nib.Nifti1Image(values, scan.affine), tmp_path / f"sub-{number}_{name}.nii.gz")
    changes = {"network_def#in_channels": 2, "scan_pattern": ["*_T1w.nii.gz", "*_FLAIR.nii.gz"]}
    config = inference_config(dataset_dir=str(tmp_path), population_prior=None, **changes)
    config["network"] = config.get_parsed_content("network_def")
    jobs = Jobs(config)
    assert jobs.about()["channels"] == ["T1w", "FLAIR"]
    with program(jobs) as client:
        views = [ask(client, "view", index=0, channel=channel) for channel in (0, 1)]
        expected = [volume(client, view, "scan").get_fdata() for view in views]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    with served(jobs) as address, pages(browser):
        window = Window(browser, address)
        page = window.page
        page.locator("#scans tbody tr").first.press("Enter")
        window.drawn("#scans")
        np.testing.assert_allclose(window.volume("#scans"), expected[0], atol=1e-6)
        page.wait_for_selector("#scans td img[src*='channel=0']", state="attached")
        page.get_by_label("Channel").select_option("FLAIR")
        window.drawn("#scans", 2)
        np.testing.assert_allclose(window.volume("#scans"), expected[1], atol=1e-6)
        page.wait_for_selector("#scans td img[src*='channel=1']", state="attached")
        # it counts for the other views too, and changing it draws them anew
        page.get_by_role("tab", name="Sample").click()
        window.drawn("#sample", place=1)
        sampled = page.get_attribute("#sample .sheet img", "src")
        page.get_by_label("Channel").select_option("T1w")
        window.holds(f"document.querySelector('#sample .sheet img')?.getAttribute('src') !== '{sampled}'")
    assert window.elsewhere == [] and window.failures == []
