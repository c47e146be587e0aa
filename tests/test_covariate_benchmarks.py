"""What is measured of covariates is what it is called."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, informative_network, run_command

from benchmarks import adaptation, covariates


def test_ways_to_treat_a_new_site(cohort, tmp_path, monkeypatch, capsys):
    def in_this_process(words, job):
        done = run_command("monai.bundle", "run", job, *words, "--num_workers", 0)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(adaptation, "run_process", in_this_process)
    people = ["participant_id\tage\tsex\tsite"]
    for place, scan in enumerate(sorted(cohort.glob("*.nii.gz"))):
        (tmp_path / scan.name).symlink_to(scan)
        people.append(f"{scan.name[:8]}\t{50 + 3 * place}\t{'FM'[place % 2]}\t{'ABCCABCABCCB'[place]}")
    (tmp_path / "participants.tsv").write_text("\n".join(people))
    torch.save(informative_network(cohort).state_dict(), tmp_path / "model.pt")
    out = tmp_path / "out"
    adaptation.main(
        *(str(tmp_path / "model.pt"), str(tmp_path), str(out)),
        **{"count": 2, "spacing": 8.0, "draws": 2, "epochs": 2},
        network_config=str(ROOT / "tests" / "tiny.json"),
    )
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert header == ["measure", "as it is", "`adapt`", "`fit_prior`", "train on"]
    found = {name: values for name, *values in rows}
    assert len(found) == 7
    # a site more changes nothing for the others, and something for its own people; other weights change all
    of_others, of_new = found["others: bits per dim"], found["new site: bits per dim"]
    assert of_others[0] == of_others[1] and len(set(of_others)) == 3
    assert len(set(of_new)) == 4
    datalists = {name: json.loads((out / f"{name}.json").read_text()) for name in ("cohort", "new", "split")}
    assert [len(side) for found in datalists.values() for side in found.values()] == [6, 1, 5, 4, 1]


def test_a_change_spills_where_a_person_does_not_change():
    scans = torch.zeros(2, 1, 4, 4, 4)
    others, changed = scans.clone(), scans.clone()
    others[:, :, 0] = 0.5
    changed[:, :, 0], changed[:, :, 1:] = 0.4, 0.1
    brain = torch.ones(4, 4, 4, dtype=torch.bool)
    assert covariates.spill(scans, others, changed, brain) == pytest.approx((0.1, 0.4))
    assert covariates.spill(scans, others, others, brain) == pytest.approx((0.0, 0.5))


def test_parts_that_can_be_measured_exist():
    assert all(callable(getattr(covariates.Measurement, part)) for part in covariates.PARTS)
