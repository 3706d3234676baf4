"""The training step and the one counter."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from bngan import GAN
from bngan.data.loader import ShardedBatches, TensorLoader
from bngan.gan import NonFiniteLoss
from bngan.losses import LOSSES, gradient_penalty

BATCH = 16


def tiny(**settings: Any) -> GAN:
    """A GAN small enough to train for a few iterations in a test."""
    seed_everything(settings.get("seed", 0), verbose=False)
    return GAN(**{"image_shape": (1, 4, 4), "latent_dim": 8, "hidden_dim": 8, "noise": 0.1, **settings})


def images(batch_size: int = BATCH, batches: int = 20) -> TensorLoader:
    """Random pictures in a fixed order of their own."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (batch_size * batches, 1, 4, 4), generator=generator, dtype=torch.uint8)
    rows = ShardedBatches(len(pixels), batch_size, train=True)
    return TensorLoader(pixels, torch.zeros(len(pixels), dtype=torch.long), rows)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **settings}, default_root_dir=folder, callbacks=list(callbacks))


class Calls(Callback):
    """Counts the forward passes of both networks."""

    def __init__(self) -> None:
        self.generator = self.discriminator = 0

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        def count_generator(*_: object) -> None:
            self.generator += 1

        def count_discriminator(*_: object) -> None:
            self.discriminator += 1

        pl_module.generator.register_forward_pre_hook(count_generator)
        *_, last = (module for module in pl_module.discriminator.modules() if isinstance(module, nn.Linear))
        last.register_forward_pre_hook(count_discriminator)


def test_max_steps_counts_alternations(tmp_path: Path) -> None:
    gan, calls = tiny(), Calls()
    run = trainer(tmp_path, calls, max_steps=10)
    run.fit(gan, images())
    assert run.global_step == 10
    assert gan.iterations_done == int(gan.iteration) == 10
    assert calls.generator == 10
    for optimizer in run.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {10}


def test_n_critic_updates_of_d_are_one_alternation(tmp_path: Path) -> None:
    gan = tiny(n_critic=3)
    run = trainer(tmp_path, max_steps=5)
    run.fit(gan, images(batch_size=BATCH * 3))
    d_optimizer, g_optimizer = run.optimizers
    assert {int(state["step"]) for state in d_optimizer.state.values()} == {15}
    assert {int(state["step"]) for state in g_optimizer.state.values()} == {5}
    assert gan.iterations_done == run.global_step == 5


def test_checkpoints_are_named_and_timed_by_alternations(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, saver, max_steps=10).fit(tiny(), images())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]


def test_logged_x_axis_is_the_iteration(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, logger=logger, log_every_n_steps=5).fit(tiny(), images())
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    step = header.split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows] == [5, 10, 15, 20]
    for tag in ("d_loss", "g_loss", "d_real", "d_fake", "d_grad_norm", "g_grad_norm"):
        assert f"train/{tag}" in header


def test_fakes_are_generated_once_per_alternation_and_d_runs_once_per_player(tmp_path: Path) -> None:
    calls = Calls()
    trainer(tmp_path, calls, max_steps=6).fit(tiny(batching="joint"), images())
    assert (calls.generator, calls.discriminator) == (6, 12)
    calls = Calls()
    trainer(tmp_path, calls, max_steps=6).fit(tiny(batching="separate"), images())
    assert (calls.generator, calls.discriminator) == (6, 24)


def test_each_player_moves_only_its_own_weights(tmp_path: Path) -> None:
    gan = tiny(d_lr=1e-30)
    before = {name: value.clone() for name, value in gan.named_parameters()}
    trainer(tmp_path, max_steps=3).fit(gan, images())
    for name, value in gan.named_parameters():
        moved = not torch.allclose(before[name], value, rtol=0, atol=1e-12)
        assert moved == name.startswith(("generator", "average")), name  # the average is of G


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("batching", ["joint", "separate"])
def test_every_loss_trains_with_finite_weights(loss: str, batching: Any, tmp_path: Path) -> None:
    gan = tiny(loss=loss, batching=batching, d_norm="layer" if loss == "wasserstein" else "batch")
    trainer(tmp_path, max_steps=8).fit(gan, images())
    assert all(value.isfinite().all() for value in gan.parameters())
    assert math.isfinite(float(gan.d_loss))
    assert math.isfinite(float(gan.g_loss))


@pytest.mark.parametrize("penalty", [{"r1": 1.0}, {"r2": 1.0}, {"gradient_penalty": 1.0}])
def test_penalties_change_d_and_are_refused_with_batch_norm_in_d(penalty: dict[str, float], tmp_path: Path) -> None:
    plain, penalized = tiny(d_norm="layer"), tiny(d_norm="layer", **penalty)
    for gan in (plain, penalized):
        trainer(tmp_path, max_steps=3).fit(gan, images())
    pairs = zip(plain.discriminator.parameters(), penalized.discriminator.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="depend on the others"):
        tiny(d_norm="batch", **penalty)


def test_accumulating_parts_equals_the_whole_batch_without_batch_norm(tmp_path: Path) -> None:
    # D alone is compared: G's latents are drawn anew for its own turn when the batch is cut.
    settings: dict[str, Any] = {"g_norm": "none", "d_norm": "none", "noise": 0.0, "g_lr": 1e-30, "loss": "hinge"}
    whole, parts = tiny(**settings).double(), tiny(**settings, accumulate=4).double()
    for gan in (whole, parts):
        trainer(tmp_path, max_steps=5, precision="64-true").fit(gan, images())
    for a, b in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    different = tiny(**settings, seed=1).double()
    trainer(tmp_path, max_steps=5, precision="64-true").fit(different, images())
    assert not torch.allclose(
        next(whole.discriminator.parameters()), next(different.discriminator.parameters()), rtol=0, atol=1e-9
    )


def test_gradient_penalty_looks_elsewhere_in_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixes: list[Tensor] = []

    def watched(logits: Any, real_images: Tensor, fake_images: Tensor, mix: Tensor) -> Tensor:
        mixes.append(mix)
        return gradient_penalty(logits, real_images, fake_images, mix)

    monkeypatch.setattr("bngan.gan.gradient_penalty", watched)
    trainer(tmp_path, max_steps=1).fit(tiny(loss="wasserstein", d_norm="none", accumulate=2), images())
    assert [len(mix) for mix in mixes] == [BATCH // 2, BATCH // 2]
    assert not torch.equal(mixes[0], mixes[1])


def test_same_seed_repeats_a_run_exactly_and_another_does_not(tmp_path: Path) -> None:
    runs = [tiny(), tiny(), tiny()]
    runs[2].seed = 1
    for gan in runs:
        trainer(tmp_path, max_steps=5).fit(gan, images())
    first, again, other = ([value.clone() for value in gan.parameters()] for gan in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def tracked(gan: GAN) -> list[int]:
    layers = [module for module in gan.discriminator.modules() if isinstance(module, nn.BatchNorm1d)]
    return [int(layer.num_batches_tracked) for layer in layers if layer.num_batches_tracked is not None]


@pytest.mark.parametrize(("moves", "batching", "expected"), [(False, "joint", 4), (True, "joint", 8), (False, "separate", 8)])
def test_running_statistics_of_d_move_by_policy(moves: bool, batching: Any, expected: int, tmp_path: Path) -> None:
    gan = tiny(d_tracks_g_step=moves, batching=batching)
    trainer(tmp_path, max_steps=4).fit(gan, images())
    assert set(tracked(gan)) == {expected}


def test_learning_rates_and_noise_follow_the_run(tmp_path: Path) -> None:
    class Record(Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []
            self.noises: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
            self.rates.append(trainer.optimizers[1].param_groups[0]["lr"])
            self.noises.append(pl_module._noise_level)

    record = Record()
    gan = tiny(g_lr=0.01, lr_decay_start=0.5, noise=0.4, noise_end=0.5)
    trainer(tmp_path, record, max_epochs=2).fit(gan, images(batches=10))
    assert record.rates[:11] == pytest.approx([0.01] * 11)
    assert record.rates[15] == pytest.approx(0.005)
    assert record.rates[19] == pytest.approx(0.001)
    assert record.noises[4] == pytest.approx(0.2)
    assert record.noises[9:] == pytest.approx([0.0] * 11)


@pytest.mark.parametrize("player", ["g", "d"])
def test_clipping_limits_the_named_players_gradient(player: str, tmp_path: Path) -> None:
    norms: dict[str, list[float]] = {}

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: GAN, optimizer: torch.optim.Optimizer) -> None:
            name = "d" if optimizer is trainer.optimizers[0] else "g"
            grads = [p.grad for p in optimizer.param_groups[0]["params"]]
            norms.setdefault(name, []).append(float(nn.utils.get_total_norm(grads)))

    gan = tiny(**{f"{player}_clip": 1e-3})
    trainer(tmp_path, Norms(), max_steps=4).fit(gan, images())
    other = "d" if player == "g" else "g"
    assert max(norms[player]) <= 1e-3 * (1 + 1e-4)
    assert min(norms[other]) > 1e-3


def test_nan_in_the_data_stops_the_run_and_names_the_iteration(tmp_path: Path) -> None:
    class Poisoned:
        def __iter__(self) -> Iterator[Tensor]:
            for number in range(10):
                yield torch.full((BATCH, 1, 4, 4), math.nan) if number == 6 else torch.zeros(BATCH, 1, 4, 4)

        def __len__(self) -> int:
            return 10

    saver = ModelCheckpoint(dirpath=tmp_path, filename="kept", every_n_train_steps=1)
    with pytest.raises(NonFiniteLoss, match="iteration 7"):
        trainer(tmp_path, saver).fit(tiny(noise=0.0), Poisoned())
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert int(kept["state_dict"]["iteration"]) == 6
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    gan = tiny()
    run = trainer(tmp_path, max_steps=1)
    run.fit(gan, images())
    run.save_checkpoint(tmp_path / "good.ckpt")
    with torch.no_grad():
        next(gan.generator.parameters()).fill_(math.inf)
    with pytest.raises(NonFiniteLoss, match=r"generator.*iteration 1"):
        run.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_iteration_survives_a_checkpoint(tmp_path: Path) -> None:
    gan = tiny()
    run = trainer(tmp_path, max_steps=7)
    run.fit(gan, images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = GAN.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.iterations_done == 7
    for name, value in gan.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_hyperparameters_load_without_pickled_objects(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(tiny(), images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["batching"] == "joint"
    assert content["hyper_parameters"]["image_shape"] == (1, 4, 4)


def test_virtual_batch_norm_takes_its_reference_from_the_first_batch(tmp_path: Path) -> None:
    gan = tiny(g_norm="virtual", d_norm="virtual", r1=0.1)
    trainer(tmp_path, max_steps=3).fit(gan, images(batch_size=64))
    assert isinstance(gan.discriminator.reference, Tensor)
    first, _ = next(iter(images(batch_size=64)))
    torch.testing.assert_close(gan.discriminator.reference, first.flatten(start_dim=1), rtol=0, atol=0)
    with pytest.raises(ValueError, match="at least 64"):
        trainer(tmp_path, max_steps=1).fit(tiny(d_norm="virtual"), images(batch_size=BATCH))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(precision: Any, tmp_path: Path) -> None:
    gan = tiny()
    trainer(tmp_path, max_steps=5, precision=precision).fit(gan, images())
    assert all(value.isfinite().all() for value in gan.parameters())
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert all(buffer.dtype == expected for name, buffer in gan.named_buffers() if "running" in name)


class Scaled(Callback):
    """Collects the gradients' norm as the optimizer is about to use it, the scaler's factor taken out."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        self.norms.append(float(pl_module.observed["train/g_grad_norm"]))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_are_unscaled_before_clipping_under_a_gradient_scaler(clip: float | None, tmp_path: Path) -> None:
    steps = []
    for scale in (1.0, 1024.0):
        # The scaler alone: half precision itself would blur the comparison.
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        gan, seen = tiny(g_clip=clip, d_clip=clip, g_lr=0.01), Scaled()
        trainer(tmp_path, seen, max_steps=5, plugins=[plugin], log_every_n_steps=1).fit(gan, images())
        steps.append((seen.norms, [value.detach().clone() for value in gan.parameters()]))
    (plain_norms, plain), (scaled_norms, scaled) = steps
    assert scaled_norms == pytest.approx(plain_norms, rel=0.05)
    assert scaled_norms[0] > 2e-3  # the clip bites
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    assert any(not torch.equal(a, b) for a, b in zip(plain, list(tiny(g_lr=0.01).parameters()), strict=True))


@pytest.mark.gpu
def test_clipping_is_right_under_a_gradient_scaler(tmp_path: Path) -> None:
    gan = tiny(g_clip=1e-3, d_clip=1e-3)
    trainer(tmp_path, accelerator="gpu", max_steps=5, precision="16-mixed", log_every_n_steps=1).fit(gan, images())
    assert all(value.isfinite().all() for value in gan.parameters())
    assert float(gan.observed["train/g_grad_norm"]) < 100
