"""The training step: what it minimises, what it skips, what it reports."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from torch.testing import assert_close

from scripts.networks import VDVAE
from scripts.training.handlers import MovingAverage
from scripts.training.losses import ELBOLoss, additional_metrics, elbo_metrics, key_metric, negative_log_likelihood
from scripts.training.precision import _warn_of_slow_bfloat16, autocast
from scripts.training.trainer import VDVAEEvaluator, VDVAETrainer, is_lower
from scripts.training.update import StepLimits, TrainingStalledError


def tiny(**arguments) -> VDVAE:
    torch.manual_seed(0)
    sizes = {"channels": [4, 6], "num_latents": [1, 2], "latent_channels": [2, 3], "kernel_sizes": [3, 2]}
    return VDVAE(3, 1, spatial_shape=[8, 8, 8], **sizes, **arguments)


def loader(count: int = 4, batch_size: int = 2, poison: int | None = None) -> DataLoader:
    scans = torch.rand(count, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if poison is not None:
        scans[poison, 0, 0, 0, 0] = float("nan")
    return DataLoader(Dataset([{"image": scan} for scan in scans]), batch_size=batch_size)


def trainer(network: VDVAE, data: DataLoader | None = None, epochs: int = 1, lr: float = 1e-2, **arguments):
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    data = data or loader()
    loss = arguments.pop("loss_function", ELBOLoss())
    limits = {name: arguments.pop(name) for name in vars(StepLimits()) if name in arguments}
    return VDVAETrainer("cpu", epochs, data, network, optimizer, loss, limits=StepLimits(**limits), **arguments)


def weights(network: VDVAE) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


def test_a_step_is_the_clipped_gradient_of_the_objective():
    network, reference = tiny(), tiny()
    engine = trainer(network, loader(count=2), max_grad_norm=5.0, weight_penalty=0.1)
    torch.manual_seed(3)
    engine.run()

    scans = torch.stack([item["image"] for item in loader(count=2).dataset.data])
    torch.manual_seed(3)
    # the loader draws one number when it is made into an iterator
    torch.empty((), dtype=torch.int64).random_()
    output = reference(scans)
    nll = negative_log_likelihood(output.loc, output.scale, scans)
    penalty = sum(p.square().mean() for p in reference.parameters() if p.ndim >= 2)
    (nll.mean() + output.kl.sum(1).mean() + 0.1 * penalty).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 5.0)
    assert norm > 5
    assert engine.state.numbers["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    with torch.no_grad():
        for p in reference.parameters():
            p -= 1e-2 * p.grad
    assert_close(weights(network), weights(reference), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scans", "updates"), [(4, 1), (6, 2), (8, 2)])
def test_accumulation_equals_a_larger_batch(scans, updates):
    """Also where the last update of an epoch has fewer batches (6 scans), and for the moving average of the weights."""

    # temperature and order apart, two batches of 2 hold what one of 4 holds: use the posterior's mean throughout
    class Mean(VDVAE):
        def forward(self, x, temperature=0.0):
            return super().forward(x, 0.0)

    results = []
    for batch_size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        network = Mean(3, 1, [4, 6], [1, 2], [2, 3], [3, 2], spatial_shape=[8, 8, 8])
        average = MovingAverage(network, momentum=0.5)
        data = loader(scans, batch_size)
        engine = trainer(network, data, accumulation_steps=steps, train_handlers=[average], max_grad_norm=1e9, lr=1e-6)
        engine.run()
        assert engine.state.updates == updates
        results.append((weights(network), weights(average.ema_model)))
    start = weights(Mean(3, 1, [4, 6], [1, 2], [2, 3], [3, 2], spatial_shape=[8, 8, 8]))
    for one, other in zip(*results, strict=True):
        assert not torch.equal(one, start)
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_moves_on_with_updates_not_with_batches():
    network = tiny()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1e-3 * (update + 1))
    VDVAETrainer(
        "cpu", 1, loader(count=8), network, optimizer, ELBOLoss(), lr_scheduler=scheduler, accumulation_steps=2
    ).run()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_nan_in_a_batch_is_skipped_counted_and_named(batch_norm, caplog):
    network = tiny(batch_norm=batch_norm)
    metrics = elbo_metrics(network, finite_only=True)
    data = loader(count=6, poison=2)
    for index, item in enumerate(data.dataset.data):
        item["image"] = MetaTensor(item["image"], meta={"filename_or_obj": f"sub-{index}.nii.gz"})
    engine = trainer(network, data, skip_warmup=0, key_train_metric=key_metric(metrics))
    engine.run()
    assert engine.state.updates == 3
    assert engine.state.skipped == 1
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    assert "Update 2 skipped: the gradients' norm is nan (1 skipped so far). " in caplog.text
    assert "The likelihood is not finite of sub-2.nii.gz" in caplog.text
    assert math.isfinite(engine.state.metrics["bits_per_dim"])


def test_a_nan_in_a_gradient_alone_is_skipped(caplog):
    network = tiny()
    before = weights(network)
    next(network.parameters()).register_hook(lambda gradient: gradient * math.nan)
    engine = trainer(network)
    engine.run()
    assert engine.state.skipped == engine.state.updates == 2
    assert torch.equal(weights(network), before)
    assert "Update 1 skipped: the gradients' norm is nan (1 skipped so far). Its scans were (unnamed)" in caplog.text


def test_an_epoch_in_which_nothing_is_finite_goes_by():
    metrics = elbo_metrics(tiny(), finite_only=True)
    engine = trainer(tiny(), loader(count=2, batch_size=1), key_train_metric=key_metric(metrics))
    engine.loss_function.forward = lambda output, scans, beta: (
        output.loc.mean() * math.nan,
        output.kl.sum(1) * math.nan,
    )
    engine.run()
    assert engine.state.skipped == 2
    assert math.isnan(engine.state.metrics["bits_per_dim"])


@pytest.mark.parametrize(
    ("current", "best", "better"), [(1, 2, True), (2, 1, False), (1, math.nan, True), (math.nan, 1, False)]
)
def test_any_bits_are_better_than_none(current, best, better):
    assert is_lower(current, best) == better


def test_a_huge_update_names_its_scans(caplog):
    trainer(tiny(), loader(), skip_grad_norm=1e-6, skip_warmup=1, accumulation_steps=2).run()
    assert caplog.text == ""
    trainer(tiny(), loader(), skip_grad_norm=1e-6, skip_warmup=0, accumulation_steps=2).run()
    assert "Its scans were (unnamed), (unnamed), (unnamed), (unnamed)." in caplog.text


@pytest.mark.parametrize(("warmup", "skipped"), [(0, 4), (3, 1), (4, 0)])
def test_huge_updates_are_skipped_after_the_warmup(warmup, skipped):
    engine = trainer(tiny(), loader(count=8), skip_grad_norm=1e-6, skip_warmup=warmup)
    engine.run()
    assert engine.state.skipped == skipped


@pytest.mark.parametrize("max_skips", [50, 3])
def test_skips_in_a_row_end_the_run_with_a_sentence(max_skips):
    options = {} if max_skips == 50 else {"max_skips": max_skips}
    network = tiny()
    before = weights(network)
    engine = trainer(network, loader(count=60, batch_size=1), skip_grad_norm=1e-6, skip_warmup=0, **options)
    with pytest.raises(TrainingStalledError, match=rf"{max_skips} updates in a row.*--learning_rate"):
        engine.run()
    assert engine.state.updates == max_skips
    assert torch.equal(weights(network), before)


def test_amp_on_the_cpu_is_bfloat16_and_close_to_full_precision():
    norms = {}
    for amp in (False, True):
        engine = trainer(tiny(), amp=amp, amp_dtype=torch.bfloat16, weight_penalty=0.0)
        torch.manual_seed(0)
        engine.run()
        assert not engine.scaler.is_enabled()
        norms[amp] = engine.state.numbers["grad_norm"]
        assert engine.state.output["pred"].loc.dtype == torch.float32
        assert engine.state.output["pred"].kl.dtype == torch.float32
    assert norms[True] != norms[False]
    assert norms[True] == pytest.approx(norms[False], rel=0.1)


@pytest.mark.parametrize("supported", [True, False])
def test_amp_on_a_cpu_without_bfloat16_stays_in_single_precision_and_says_so(supported, monkeypatch, caplog):
    monkeypatch.setattr("scripts.training.precision.cpu_has_bfloat16", lambda: supported)
    _warn_of_slow_bfloat16.cache_clear()
    with caplog.at_level("WARNING"), autocast(torch.device("cpu"), True) as cast:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if supported else torch.float32)
    assert cast.fast_dtype == torch.bfloat16
    assert ("has no instructions for bfloat16" in caplog.text) != supported
    with autocast(torch.device("cpu"), True, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_emulated_bfloat16_of_a_gpu_is_not_used(monkeypatch):
    # an older GPU: PyTorch says yes, unless asked without emulation
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no GPU here
        assert autocast(torch.device("cuda"), True).fast_dtype == torch.float16


def test_float16_gradients_are_unscaled_before_clipping():
    norms = {}
    for scale in (None, 256.0):
        engine = trainer(tiny(), loader(count=2), amp=True, amp_dtype=torch.float16 if scale else torch.bfloat16)
        if scale:
            engine.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        engine.run()
        norms[scale] = engine.state.numbers["grad_norm"]
    assert norms[256.0] == pytest.approx(norms[None], rel=0.1)


def test_beta_weighs_the_kl():
    norms = []
    for kl_warmup in (0, 100):
        engine = trainer(tiny(), loader(count=2), loss_function=ELBOLoss(kl_warmup), weight_penalty=0.0)
        torch.manual_seed(0)
        engine.run()
        output = engine.state.output
        expected = output["nll"].mean() + (output["kl"].mean() if kl_warmup == 0 else 0)
        assert_close(output["loss"], expected)
        norms.append(engine.state.numbers["grad_norm"])
    assert norms[0] != norms[1]


def test_the_evaluator_weighs_every_scan_alike():
    network = tiny().eval()
    metrics = elbo_metrics(network)
    results = []
    for batch_size in (5, 2):
        metrics = elbo_metrics(network)
        evaluator = VDVAEEvaluator(
            "cpu",
            loader(count=5, batch_size=batch_size),
            network,
            inferer=lambda scans, network: network(scans, temperature=0.0),  # no noise, which is a batch's
            key_val_metric=key_metric(metrics),
            additional_metrics=additional_metrics(metrics),
        )
        evaluator.run()
        results.append(dict(evaluator.state.metrics))
    assert results[0].keys() == {
        *("bits_per_dim", "nll", "kl", "mse"),
        *(f"kl{part}_z{i:02d}" for i in range(3) for part in ("", "_per_dim")),
    }
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5)
    first = results[0]
    assert first["kl"] == pytest.approx(sum(first[f"kl_z{i:02d}"] for i in range(3)), rel=1e-6)
    assert first["bits_per_dim"] == pytest.approx((first["nll"] + first["kl"]) / 512 / math.log(2), rel=1e-6)
    # the first latent: 3 channels on 4 x 4 x 4
    assert first["kl_per_dim_z00"] == pytest.approx(first["kl_z00"] / (3 * 64), rel=1e-6)


def test_two_evaluations_draw_the_same_noise():
    evaluator = VDVAEEvaluator("cpu", loader(), tiny(), key_val_metric=key_metric(elbo_metrics(tiny())))
    values = []
    for _ in range(2):
        torch.rand(7)
        evaluator.run()
        values.append(evaluator.state.metrics["bits_per_dim"])
    assert values[0] == values[1]
