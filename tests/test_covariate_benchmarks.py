"""What is measured of covariates is what it is called."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, informative_network, run_command

from benchmarks import adaptation
from benchmarks.conditioning import Conditioning, counterfactual
from benchmarks.covariates import true_differences, year_shifts
from scripts.phantoms.people import Person


@pytest.mark.parametrize("form", ["film", "shift", "none"])
def test_conditioning_starts_at_nothing_and_learns(cohort, form):
    network = informative_network(cohort)
    scans = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    with torch.no_grad():
        before = network.infer(scans, 0.0)[0].loc
    conditioning = Conditioning(network, 3, form)
    features = torch.randn(2, 3)
    with conditioning.given(features):
        output = network.infer(scans, 0.0)[0]
    torch.testing.assert_close(output.loc, before)
    output.loc.square().sum().backward()
    moved = [head.weight.grad.abs().sum().item() for head in conditioning.heads]
    assert len(moved) == (0 if form == "none" else 16) and sum(amount > 0 for amount in moved) >= len(moved) // 2
    for head in conditioning.heads:
        torch.nn.init.normal_(head.weight, std=0.3)
    kept = counterfactual(network, conditioning, scans, features, features)
    torch.testing.assert_close(kept, scans, rtol=1e-3, atol=1e-3)
    changed = counterfactual(network, conditioning, scans, features, features + 1)
    assert (form == "none") == torch.allclose(changed, scans, atol=1e-3)


def test_a_form_that_does_not_exist_is_refused(cohort):
    with pytest.raises(ValueError, match="choose film, shift or none"):
        Conditioning(informative_network(cohort), 3, "concat")


class Linear:
    """People whose scans darken by their own speed of ageing."""

    def person(self, index: int) -> Person:
        rng = np.random.default_rng(index)
        return Person(float(rng.uniform(45, 85)), "F", "A", float(np.exp(rng.normal(0, 0.3))))

    def scans(self, wanted, what):
        people = [
            self.person(index)._replace(**({"age": cohort.age} if cohort.age else {})) for index, cohort in wanted
        ]
        direction = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
        return torch.stack([0.2 * person.aged * direction for person in people])


def test_true_differences_are_told_the_better_the_more_is_known():
    others = Linear()
    people = [others.person(1000 + index) for index in range(20)]
    scans = torch.stack([0.2 * person.aged * torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4) for person in people])
    moved = [p._replace(age=p.age + s) for p, s in zip(people, year_shifts(people), strict=True)]
    truth = torch.stack([0.2 * person.aged * torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4) for person in moved]) - scans
    errors = [(found - truth).abs().mean() for found in true_differences(others, 80, scans, people).values()]
    assert errors[0] > errors[1] > errors[2]


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
