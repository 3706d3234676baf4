"""The LightningModule: one iteration a step, what it logs, what it refuses, what a checkpoint holds."""

import copy
import csv
import math
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bngan import GAN
from bngan.batching import Batching
from bngan.batchnorm.layers import VirtualBatchNorm, batch_norm_layers
from bngan.checkpoint import load_gan, save_gan
from bngan.data.loader import ShardedBatches, TensorLoader
from bngan.errors import NonFiniteLoss, UsageError
from bngan.losses import LOSSES
from bngan.rng import Stream, generator, normal

BATCH = 16


def tiny(**settings: Any) -> GAN:
    """A GAN small enough to train for a few iterations in a test."""
    seed_everything(settings.get("seed", 0), verbose=False)
    return GAN(**{"image_shape": (1, 4, 4), "latent_dim": 8, "hidden_dim": 8, "instance_noise": 0.1, **settings})


def images(batch_size: int = BATCH, batches: int = 20, side: int = 4) -> TensorLoader:
    """Random pictures in a fixed order of their own."""
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (batch_size * batches, 1, side, side), generator=drawn, dtype=torch.uint8)
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


def same(one: GAN, other: GAN) -> bool:
    return all(torch.equal(other.state_dict()[name], value) for name, value in one.state_dict().items())


# Counting -------------------------------------------------------------------------------------------------------------


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


def test_max_steps_counts_iterations(tmp_path: Path) -> None:
    gan, calls = tiny(), Calls()
    run = trainer(tmp_path, calls, max_steps=10)
    run.fit(gan, images())
    assert run.global_step == int(gan.iteration) == 10
    assert calls.generator == 10
    for optimizer in run.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {10}


def test_n_critic_updates_of_d_are_one_iteration(tmp_path: Path) -> None:
    gan = tiny(n_critic=3)
    run = trainer(tmp_path, max_steps=5)
    run.fit(gan, images(batch_size=BATCH * 3))
    d_optimizer, g_optimizer = run.optimizers
    assert {int(state["step"]) for state in d_optimizer.state.values()} == {15}
    assert {int(state["step"]) for state in g_optimizer.state.values()} == {5}
    assert run.global_step == int(gan.iteration) == 5


def test_checkpoints_are_named_and_timed_by_iterations(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, saver, max_steps=10).fit(tiny(), images())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize(("batching", "d_passes"), [("joint", 2), ("separate", 4)])
def test_fakes_are_generated_once_per_iteration_and_serve_both_networks(
    batching: Batching, d_passes: int, tmp_path: Path
) -> None:
    calls = Calls()
    trainer(tmp_path, calls, max_steps=6).fit(tiny(batching=batching), images())
    assert (calls.generator, calls.discriminator) == (6, 6 * d_passes)


# Training -------------------------------------------------------------------------------------------------------------


def test_each_network_moves_only_its_own_weights(tmp_path: Path) -> None:
    gan = tiny(d_lr=1e-30)
    before = {name: value.clone() for name, value in gan.named_parameters()}
    trainer(tmp_path, max_steps=3).fit(gan, images())
    for name, value in gan.named_parameters():
        moved = not torch.allclose(before[name], value, rtol=0, atol=1e-12)
        # So does its average. A bias in front of batch norm, whose gradient is rounding, stays as it was.
        assert moved == (name.startswith("generator") and not name.endswith(("net.0.bias", "net.3.bias"))), name


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("batching", ["joint", "separate"])
def test_every_loss_trains_with_finite_weights(loss: str, batching: Batching, tmp_path: Path) -> None:
    gan = tiny(loss=loss, batching=batching, d_norm="layer" if loss == "wasserstein" else "batch")
    trainer(tmp_path, max_steps=8).fit(gan, images())
    assert all(value.isfinite().all() for value in gan.parameters())
    assert gan.observed is not None
    assert all(value.isfinite().all() for value in gan.observed)


@pytest.mark.parametrize("penalty", [{"r1": 1.0}, {"r2": 1.0}, {"gradient_penalty": 1.0}])
def test_penalties_change_d_and_are_refused_with_batch_norm_in_d(penalty: dict[str, float], tmp_path: Path) -> None:
    plain, penalized = tiny(d_norm="layer"), tiny(d_norm="layer", **penalty)
    for gan in (plain, penalized):
        trainer(tmp_path, max_steps=3).fit(gan, images())
    pairs = zip(plain.discriminator.parameters(), penalized.discriminator.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    for norm in ("batch", "reference", "ghost"):
        with pytest.raises(UsageError, match="depend on the others"):
            tiny(d_norm=norm, **penalty)


def test_wasserstein_loss_has_a_gradient_penalty_of_10_unless_told_otherwise() -> None:
    assert tiny(loss="wasserstein", d_norm="layer").settings.wgan_gp == 10
    assert tiny(loss="wasserstein", d_norm="layer", gradient_penalty=0.0).settings.wgan_gp == 0
    assert tiny(loss="hinge").settings.wgan_gp == 0


def test_same_seed_repeats_a_run_exactly_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = tiny(), tiny(), tiny()
    other.settings = replace(other.settings, seed=1)
    for gan in (first, again, other):
        trainer(tmp_path, max_steps=5).fit(gan, images())
    assert same(first, again)
    assert not same(first, other)


def test_dropout_in_d_is_a_function_of_seed_and_iteration(tmp_path: Path) -> None:
    first, again, other = (tiny(d_dropout=0.5) for _ in range(3))
    other.settings = replace(other.settings, seed=1)
    for number, gan in enumerate((first, again, other)):
        torch.manual_seed(number)
        trainer(tmp_path, max_steps=5).fit(gan, images())
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(("moves", "batching", "expected"), [(False, "joint", 4), (True, "joint", 8), (False, "separate", 8)])
def test_running_statistics_of_d_move_by_policy(moves: bool, batching: Batching, expected: int, tmp_path: Path) -> None:
    gan = tiny(update_d_stats_in_g_step=moves, batching=batching)
    trainer(tmp_path, max_steps=4).fit(gan, images())
    layers = [module for module in gan.discriminator.modules() if isinstance(module, nn.BatchNorm1d)]
    assert {int(layer.num_batches_tracked) for layer in layers if layer.num_batches_tracked is not None} == {expected}


class Gradients(Callback):
    """Keeps the norm of each network's gradient as its optimizer used it, and as it was observed."""

    def __init__(self) -> None:
        self.used: dict[str, list[float]] = {"d": [], "g": []}
        self.observed: dict[str, list[float]] = {"d": [], "g": []}

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        assert pl_module.observed is not None
        for name, optimizer in zip(("d", "g"), trainer.optimizers, strict=True):
            gradients = [weight.grad for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
            self.used[name].append(float(nn.utils.get_total_norm(gradients)))
        self.observed["d"].append(float(pl_module.observed.d_grad_norm))
        self.observed["g"].append(float(pl_module.observed.g_grad_norm))


@pytest.mark.parametrize(("network", "other"), [("g", "d"), ("d", "g")])
def test_clipping_limits_the_named_networks_gradient(network: str, other: str, tmp_path: Path) -> None:
    norms = Gradients()
    trainer(tmp_path, norms, max_steps=4).fit(tiny(**{f"{network}_clip": 1e-3}), images())
    assert max(norms.used[network]) <= 1e-3 * (1 + 1e-4)
    assert min(norms.observed[network]) > 1e-3, "observed before clipping"
    assert min(norms.used[other]) > 1e-3
    assert norms.used[other] == pytest.approx(norms.observed[other], rel=1e-5)


def test_virtual_batch_norm_takes_its_reference_from_the_first_batch(tmp_path: Path) -> None:
    gan = tiny(g_norm="virtual", d_norm="virtual", r1=0.1)
    trainer(tmp_path, max_steps=3).fit(gan, images(batch_size=64))
    assert isinstance(gan.discriminator.reference, Tensor)
    first, _ = next(iter(images(batch_size=64)))
    torch.testing.assert_close(gan.discriminator.reference, first.flatten(start_dim=1), rtol=0, atol=0)
    with pytest.raises(UsageError, match="at least 64"):
        trainer(tmp_path, max_steps=1).fit(tiny(d_norm="virtual"), images(batch_size=BATCH))


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_virtual_batch_norms_reference_is_as_noisy_as_what_d_sees(network: str, tmp_path: Path) -> None:
    """Normalized by a clean reference, images with noise of deviation 1 are nearly twice as far from the mean."""
    settings: dict[str, Any] = {"network": network, "d_norm": "virtual", "instance_noise": 1.0, "instance_noise_end": 1e9}
    gan, seen = tiny(image_shape=(1, 16, 16), hidden_dim=16, **settings), images(batch_size=64, side=16)
    trainer(tmp_path, max_steps=1).fit(gan, seen)
    spreads: list[float] = []
    layers = [layer for layer in gan.discriminator.modules() if isinstance(layer, VirtualBatchNorm)]
    handles = [layer.register_forward_hook(lambda _, __, output: spreads.append(float(output[64:].std()))) for layer in layers]
    real = next(iter(seen))[0]
    with torch.no_grad():
        gan.logits(real + gan.draw_instance_noise(len(real), 0))
        found, spreads[:] = [*spreads], []
        gan.discriminator.instance_noise.zero_()
        gan.logits(real + normal(real.shape, 0))
    for handle in handles:
        handle.remove()
    assert found == pytest.approx([1.0] * len(layers), abs=0.15)
    assert max(spreads) > 1.5


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(2, -1, 40), (2, 30, 30), (2, 50, 40), (-1, 30, 30)])
def test_run_is_as_long_as_epochs_and_steps_allow(epochs: int, steps: int, expected: int, tmp_path: Path) -> None:
    class Once(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
            trainer.should_stop = True

    gan = tiny()
    trainer(tmp_path, Once(), max_epochs=epochs, max_steps=steps).fit(gan, images())
    assert gan.total_iterations == expected


def test_run_without_an_end_says_that_its_schedules_stand_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hundredth(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
            trainer.should_stop = trainer.global_step == 5

    for settings, said in (({}, True), ({"instance_noise": 0.0, "lr_decay_start": 1.0}, False)):
        gan = tiny(**settings)
        trainer(tmp_path, Hundredth(), max_epochs=-1).fit(gan, images())
        assert math.isinf(gan.total_iterations)
        assert ("noise and learning rates stay constant" in capsys.readouterr().out) == said


@pytest.mark.parametrize("norm", ["batch", "reference", "ghost"])
@pytest.mark.parametrize(("network", "expected"), [("mlp", (2, 2)), ("conv", (3, 2))])
def test_eps_and_momentum_reach_every_batch_norm_layer(network: str, expected: tuple[int, int], norm: str) -> None:
    shape = {"network": network, "image_shape": (1, 32, 32), "g_norm": norm, "d_norm": norm}
    gan, plain = tiny(**shape, bn_eps=3e-4, bn_momentum=0.03), tiny(**shape)
    counts = [len(list(batch_norm_layers(part))) for part in (gan.generator, gan.discriminator)]
    assert tuple(counts) == expected
    layers = [layer for _, layer in batch_norm_layers(gan)]
    assert len(layers) == 2 * counts[0] + counts[1]  # and those of G's average
    assert {(layer.eps, layer.momentum) for layer in layers} == {(3e-4, 0.03)}
    assert {(layer.eps, layer.momentum) for _, layer in batch_norm_layers(plain)} == {(1e-5, 0.1)}


def test_batch_norms_are_named_as_in_the_state_dict() -> None:
    gan = tiny()
    names = [name for name, _ in gan.batch_norms()]
    assert names == ["generator.net.1", "generator.net.4", "discriminator.net.1", "discriminator.net.4"]
    assert all(f"{name}.running_mean" in gan.state_dict() for name in names)
    assert list(tiny(g_norm="layer", d_norm="none").batch_norms()) == []


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size", "ranks", "answer"),
    [
        ({}, 2, 1, None),
        ({}, 1, 1, "at least 2 images at a time"),
        ({"g_norm": "layer", "d_norm": "none"}, 1, 1, None),
        ({"g_norm": "layer", "d_norm": "ghost", "ghost_groups": 4}, 8, 2, None),
        ({"g_norm": "layer", "d_norm": "ghost", "ghost_groups": 4}, 10, 1, "ghost_groups 4 must divide the 10 images"),
        ({"g_norm": "ghost", "d_norm": "none", "ghost_groups": 3}, 12, 2, "a multiple of 2 where they are normalized together"),
        ({"ghost_groups": 3}, 10, 2, None),  # which no layer has
        ({"g_norm": "ghost"}, 8, 2, "ghost_groups 1 must .* a multiple of 2"),
    ],
)
def test_batches_are_checked_by_what_the_networks_have(
    settings: dict[str, Any], size: int, ranks: int, answer: str | None
) -> None:
    with nullcontext() if answer is None else pytest.raises(UsageError, match=answer):
        tiny(**settings).check_batch(size, ranks)


@pytest.mark.parametrize(
    ("settings", "size", "answer"),
    [
        ({"n_critic": 3}, 16, "a batch of 16 images cannot be cut into n_critic = 3 equal parts"),
        ({"d_norm": "ghost", "ghost_groups": 3}, 16, "ghost_groups 3 must divide the 16 images"),
    ],
)
def test_first_batch_is_checked(settings: dict[str, Any], size: int, answer: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=answer):
        trainer(tmp_path, max_steps=1).fit(tiny(**settings), images(batch_size=size))
    trainer(tmp_path, max_steps=1).fit(tiny(**settings), images(batch_size=18))


@pytest.mark.parametrize("batching", ["joint", "separate"])
def test_ghost_norm_trains_as_another_game_than_batch_norm_and_with_one_group_as_the_same(
    batching: Batching, tmp_path: Path
) -> None:
    trained: dict[tuple[str, int], GAN] = {}
    for norm, groups in (("batch", 1), ("ghost", 1), ("ghost", 4)):
        gan = trained[norm, groups] = tiny(g_norm=norm, d_norm=norm, ghost_groups=groups, batching=batching)
        trainer(tmp_path, max_steps=5, precision="64-true").fit(gan, images())

    def furthest(norm: str, groups: int) -> float:
        plain, other = trained["batch", 1].state_dict(), trained[norm, groups].state_dict()
        return max(float((plain[name] - other[name]).abs().max()) for name in plain)

    assert furthest("ghost", 1) < 1e-9
    assert furthest("ghost", 4) > 1e-3


# Logging --------------------------------------------------------------------------------------------------------------


def logged(folder: Path) -> list[dict[str, float]]:
    """Each iteration's scalars, in order."""
    with (folder / "metrics.csv").open() as file:
        return [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]


def test_logged_x_axis_is_the_iteration(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, logger=logger, log_every_n_steps=5).fit(tiny(), images())
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    tags = {"d_loss", "g_loss", *LOSSES["relativistic"].readings, "d_grad_norm", "g_grad_norm"}
    tags |= {"d_lr", "g_lr", "instance_noise"}
    assert rows[0].keys() == {"step", *(f"train/{tag}" for tag in tags)}


class Snapshots(Callback):
    """Keeps each iteration's images, and G and D before it and after it."""

    def __init__(self) -> None:
        self.real: list[Tensor] = []
        self.before: list[tuple[nn.Module, Any]] = []
        self.after: list[tuple[nn.Module, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: GAN, batch: list[Tensor], batch_idx: int) -> None:
        self.real.append(batch[0].clone())
        self.before.append((copy.deepcopy(pl_module.generator), copy.deepcopy(pl_module.discriminator)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        self.after.append((copy.deepcopy(pl_module.generator), copy.deepcopy(pl_module.discriminator)))


def losses_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """D's and G's relativistic loss of logits (2 N, 1), real before fake."""
    real, fake = logits.double().chunk(2)
    return F.softplus(fake - real).mean(), F.softplus(real - fake).mean()


def norm_of(loss: Tensor, network: nn.Module) -> Tensor:
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)]).norm()


def worked_out(seen: Snapshots, done: int, noise: float, judge: Any = None) -> dict[str, float]:
    """What the iteration after `done` others should log, from its images, its networks and its standard deviation of noise.

    Without `judge` the generator is judged by D as it is after its own update.
    """
    real, draws = seen.real[done], generator(0, Stream.ITERATION, done)
    (g, d), judge = seen.before[done], judge or seen.after[done][1]
    real_noise, z, fake_noise = (
        torch.randn(shape, generator=draws, dtype=real.dtype) for shape in (real.shape, (len(real), 8), real.shape)
    )
    real, fake = real + noise * real_noise, g(z).view_as(real) + noise * fake_noise
    logits = d.logits(torch.cat([real, fake.detach()]))
    above = logits[: len(real)] - logits[len(real) :]
    d_loss, _ = losses_of(logits)
    _, g_loss = losses_of(judge.logits(torch.cat([real, fake])))
    values = {
        "d_loss": d_loss,
        "g_loss": g_loss,
        "d_pair_accuracy": (above > 0).double().mean(),
        "d_pair_prob": above.sigmoid().mean(),
        "d_grad_norm": norm_of(d_loss, d),
        "g_grad_norm": norm_of(g_loss, g),
    }
    return {f"train/{name}": float(value.detach()) for name, value in values.items()}


def furthest_weight(before: nn.Module, after: nn.Module) -> float:
    return max(float((b - a).abs().max()) for a, b in zip(after.parameters(), before.parameters(), strict=True))


def test_logged_values_are_those_of_their_own_iteration(tmp_path: Path) -> None:
    # With decays of 0 Adam moves each weight by the learning rate.
    changing = {"g_lr": 0.01, "d_lr": 0.02, "beta1": 0.0, "beta2": 0.0, "lr_decay_start": 0.0, "instance_noise": 0.4}
    seen, logger = Snapshots(), CSVLogger(tmp_path, name="", version="")
    settings: dict[str, Any] = {"max_steps": 6, "precision": "64-true", "logger": logger, "log_every_n_steps": 1}
    trainer(tmp_path, seen, **settings).fit(tiny(**changing), images())
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for done, row in enumerate(rows):
        noise = 0.4 * (1 - done / 6)
        expected = {
            **worked_out(seen, done, noise),
            "train/instance_noise": noise,
            "train/g_lr": furthest_weight(seen.before[done][0], seen.after[done][0]),
            "train/d_lr": furthest_weight(seen.before[done][1], seen.after[done][1]),
        }
        found = {tag: row[tag] for tag in expected}
        assert found == pytest.approx(expected, rel=1e-5)
        # Another level of noise, or D as it was before its update, would be noticed.
        for wrong in (worked_out(seen, done, noise - 0.4 / 6), worked_out(seen, done, noise, judge=seen.before[done][1])):
            assert found["train/g_loss"] != pytest.approx(wrong["train/g_loss"], rel=1e-5)
    for tag in ("train/d_lr", "train/g_lr", "train/instance_noise"):
        assert [row[tag] for row in rows] == sorted((row[tag] for row in rows), reverse=True)


def test_validation_shows_d_held_out_images_and_fakes_as_noisy_as_in_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=20)
    gan, held_out = tiny(instance_noise=1.0, instance_noise_end=2.0), images(batch_size=32, batches=2)
    run.fit(gan, images(), held_out)
    gan.eval()
    level = 1 - 0.5 * 19 / 20  # in the last iteration
    assert float(gan.discriminator.instance_noise) == pytest.approx(level)

    def d_losses(level: float, *, swapped: bool = False) -> float:
        losses = []
        for batch, (real, _) in enumerate(held_out):
            noise = normal((64, 1, 4, 4), gan.settings.seed, Stream.PROBE, 32 * batch)
            fake = gan.generate(gan.sample_latents(32 * batch, 32 * batch + 32))
            both = [fake, real] if swapped else [real, fake]
            losses.append(losses_of(gan.logits(torch.cat(both) + level * noise))[0])
        return float(torch.stack(losses).mean())

    with torch.no_grad():
        found = float(run.callback_metrics["val/d_loss"])
        assert found == pytest.approx(d_losses(level), rel=1e-5)
        for other in (d_losses(0.0), d_losses(1.0), d_losses(level, swapped=True)):
            assert found != pytest.approx(other, rel=1e-4)
    assert 0 < float(run.callback_metrics["val/d_pair_accuracy"]) < 1
    assert 0 < float(run.callback_metrics["val/d_pair_prob"]) < 1


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_readings_are_logged_by_the_names_that_say_what_they_are(loss: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=20)
    run.fit(tiny(loss=loss, gradient_penalty=0.0), images(), images(batch_size=32, batches=2))
    logged_names = {tag for tag in run.callback_metrics if tag.startswith("val/d_")}
    assert logged_names == {"val/d_loss", *(f"val/{name}" for name in LOSSES[loss].readings)}


# What is not finite ---------------------------------------------------------------------------------------------------


def test_nan_in_the_data_stops_the_run_and_names_the_iteration(tmp_path: Path) -> None:
    class Poisoned:
        def __iter__(self) -> Iterator[Tensor]:
            for number in range(10):
                yield torch.full((BATCH, 1, 4, 4), math.nan) if number == 6 else torch.zeros(BATCH, 1, 4, 4)

        def __len__(self) -> int:
            return 10

    saver = ModelCheckpoint(dirpath=tmp_path, filename="kept", every_n_train_steps=1)
    with pytest.raises(NonFiniteLoss, match="iteration 7"):
        trainer(tmp_path, saver).fit(tiny(instance_noise=0.0), Poisoned())
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


# Settings and checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"g_lr": 0.0}, "g_lr must be above 0, got 0"),
        ({"loss": "wgan"}, "unknown loss 'wgan'"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "the hinge loss, which has no labels"),
        ({"g_norm": "bacth"}, "unknown norm 'bacth'"),
        ({"network": "resnet"}, "unknown network 'resnet'"),
        ({"d_dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked_when_the_gan_is_built(settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        tiny(**settings)
    assert tiny().hparams.keys() >= settings.keys()


def test_iteration_survives_a_checkpoint(tmp_path: Path) -> None:
    gan = tiny()
    run = trainer(tmp_path, max_steps=7)
    run.fit(gan, images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = GAN.load_from_checkpoint(tmp_path / "a.ckpt")
    assert int(again.iteration) == 7
    assert same(gan, again)


def test_hyperparameters_load_without_pickled_objects(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(tiny(), images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["batching"] == "joint"
    assert content["hyper_parameters"]["image_shape"] == (1, 4, 4)


def test_overridden_learning_rate_and_betas_win_over_the_checkpoints(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="a", every_n_train_steps=3)
    trainer(tmp_path, saver, max_steps=3).fit(tiny(), images())
    rates: dict[float, tuple[float, tuple[float, float]]] = {}
    for g_lr in (2e-3, 5e-4):
        gan = tiny(g_lr=g_lr, beta1=g_lr, lr_decay_start=1.0)
        run = trainer(tmp_path, max_steps=4)
        run.fit(gan, images(), ckpt_path=tmp_path / "a.ckpt")
        (group,) = run.optimizers[1].param_groups
        rates[g_lr] = (float(group["lr"]), group["betas"])
    assert rates == {rate: (pytest.approx(rate), (rate, 0.999)) for rate in rates}


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.0}, {"ema_buffers": "copy"}, {"network": "conv"}])
def test_gan_can_be_sent_to_another_process(settings: dict[str, Any], tmp_path: Path) -> None:
    gan = tiny(**{"image_shape": (1, 16, 16) if "network" in settings else (1, 4, 4), **settings})
    again = pickle.loads(pickle.dumps(gan))
    assert same(gan, again)
    if "network" not in settings:
        for one in (gan, again):
            trainer(tmp_path, max_steps=3).fit(one, images())
        assert same(gan, again)
        pickle.dumps(gan)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(precision: Any, tmp_path: Path) -> None:
    gan = tiny()
    trainer(tmp_path, max_steps=5, precision=precision).fit(gan, images())
    assert all(value.isfinite().all() for value in gan.parameters())
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert all(buffer.dtype == expected for name, buffer in gan.named_buffers() if "running" in name)


def test_resumed_run_keeps_every_digit_of_double_precision(tmp_path: Path) -> None:
    whole, resumed = tiny(), tiny()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="a", every_n_train_steps=3, save_top_k=1)
    trainer(tmp_path, saver, max_steps=5, precision="64-true").fit(whole, images())
    trainer(tmp_path, max_steps=5, precision="64-true").fit(resumed, images(), ckpt_path=tmp_path / "a.ckpt")
    assert same(whole, resumed)
    trained = [value for value in whole.generator.parameters() if value.requires_grad]
    assert all(not torch.equal(value, value.float().double()) for value in trained)


def test_generator_in_16_bits_is_judged_by_the_discriminator_just_improved(tmp_path: Path) -> None:
    gan, seen = tiny(d_lr=0.1), Snapshots()
    trainer(tmp_path, seen, max_steps=1, precision="bf16-mixed").fit(gan, images())
    assert gan.observed is not None
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        improved, stale = (worked_out(seen, 0, noise=0.1, judge=d) for d in (seen.after[0][1], seen.before[0][1]))
    assert float(gan.observed.g_loss) == pytest.approx(improved["train/g_loss"], rel=2e-3)
    assert float(gan.observed.g_loss) != pytest.approx(stale["train/g_loss"], rel=0.05)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_are_unscaled_before_clipping_under_a_gradient_scaler(clip: float | None, tmp_path: Path) -> None:
    steps: list[tuple[list[float], list[Tensor]]] = []
    for scale in (1.0, 1024.0):
        # The scaler alone: half precision itself would blur the comparison.
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        gan, norms = tiny(g_clip=clip, d_clip=clip, g_lr=0.01), Gradients()
        trainer(tmp_path, norms, max_steps=5, plugins=[plugin]).fit(gan, images())
        steps.append((norms.observed["g"], [value.detach().clone() for value in gan.parameters()]))
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
    assert gan.observed is not None
    assert float(gan.observed.g_grad_norm) < 100


# Packs, and layers that draw ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [16, 19, 17])  # a last batch of 3 images is one pack of 2, of 1 image none
def test_packs_are_trained_and_validated(held_out: int, tmp_path: Path) -> None:
    gan = tiny(pack=2, loss="hinge")
    run = trainer(tmp_path, max_steps=4)
    run.fit(gan, images())
    drawn = torch.rand(held_out, 1, 4, 4, generator=generator(1)) * 2 - 1
    (found,) = run.validate(gan, DataLoader(TensorDataset(drawn), batch_size=16), verbose=False)
    assert math.isfinite(found["val/d_loss"])


def test_packs_and_further_updates_of_g_change_training(tmp_path: Path) -> None:
    once, twice = tiny(), tiny(g_steps=2)
    for gan in (once, twice):
        run = trainer(tmp_path, max_steps=5)
        run.fit(gan, images())
        steps = [{int(state["step"]) for state in optimizer.state.values()} for optimizer in run.optimizers]
        assert steps == [{5}, {5 * gan.settings.g_steps}]
        assert run.global_step == int(gan.iteration) == 5
    assert not same(once, twice)
    with pytest.raises(UsageError, match="pack 3"):
        trainer(tmp_path, max_steps=1).fit(tiny(pack=3), images())


@pytest.mark.parametrize("settings", [{"d_dropout": 0.3}, {"g_norm": "noisy"}, {"d_norm": "noisy"}])
def test_what_layers_draw_depends_on_the_seed_and_the_iteration_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    one, other = tiny(**settings), tiny(**settings)
    for number, gan in enumerate((one, other)):
        torch.manual_seed(number)
        trainer(tmp_path, max_steps=3).fit(gan, images())
    assert same(one, other)


# Classes --------------------------------------------------------------------------------------------------------------


def labelled(classes: int = 3) -> TensorLoader:
    loader = images()
    loader.labels = torch.randint(classes, loader.labels.shape, generator=generator(4))
    return loader


def test_labels_decide_what_is_learned(tmp_path: Path) -> None:
    ends = []
    for loader in (labelled(), labelled(), images()):
        gan = tiny(classes=3)
        trainer(tmp_path, max_steps=3).fit(gan, loader)
        ends.append(gan)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_batches_without_labels_are_refused_where_there_are_classes(tmp_path: Path) -> None:
    bare = DataLoader(TensorDataset(torch.rand(32, 1, 4, 4) * 2 - 1), batch_size=16)
    with pytest.raises(UsageError, match=r"--model.classes 3 needs batches of images and labels"):
        trainer(tmp_path, max_steps=1).fit(tiny(classes=3), bare)
    with pytest.raises(UsageError, match=r"labels of the first batch reach from 0 to 4.*classes are 0 to 2"):
        trainer(tmp_path, max_steps=1).fit(tiny(classes=3), labelled(5))


@pytest.mark.parametrize(
    ("classes", "found", "answer"),
    [
        (10, 26, r"--model.classes is 10, but the data has 26 classes"),
        (10, 1, r"--model.classes 10 needs images of 10 classes, and the data has none.*folder of its own"),
        (10, 10, None),
        (1, 1, None),
        (0, 26, None),
    ],
)
def test_data_of_another_number_of_classes_is_refused_before_training(
    classes: int, found: int, answer: str | None, tmp_path: Path
) -> None:
    class Data(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.batch_size = found, BATCH

        def train_dataloader(self) -> TensorLoader:
            return images()

    with nullcontext() if answer is None else pytest.raises(UsageError, match=answer):
        trainer(tmp_path, max_steps=1).fit(tiny(classes=classes), datamodule=Data())


def test_validation_compares_fakes_of_the_classes_of_the_real_images(tmp_path: Path) -> None:
    gan, loader = tiny(classes=3, instance_noise=0.0), labelled()
    run = trainer(tmp_path)
    (found,) = run.validate(gan, loader, verbose=False)
    losses = []
    with torch.no_grad():
        gan.eval()
        for number, (real, labels) in enumerate(loader):
            fakes = gan.generate(gan.sample_latents(number * BATCH, (number + 1) * BATCH), labels)
            logits = gan.logits(torch.cat([real, fakes]), torch.cat([labels, labels])).chunk(2)
            losses.append(gan.loss.discriminator(*logits))
    assert found["val/d_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)


def test_gan_with_classes_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    gan = tiny(classes=3)
    trainer(tmp_path, max_steps=3).fit(gan, labelled())
    save_gan(gan, tmp_path / "g.ckpt", total=3)
    again = load_gan(tmp_path / "g.ckpt")
    assert again.settings == gan.settings
    assert same(gan, again)
