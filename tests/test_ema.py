"""The moving average of G: how it moves, with its buffers, and that it changes nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bngan import GAN
from bngan.ema import EMA_BUFFERS, EmaBuffers, ExponentialMovingAverage
from tests.test_gan import images, tiny, trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def average_of(gan: GAN) -> nn.Module:
    assert gan.generator_ema is not None
    return gan.generator_ema


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# By itself ------------------------------------------------------------------------------------------------------------


def drawn(*layers: nn.Module) -> nn.Sequential:
    """Return a network of these layers whose weights are all random."""
    net = nn.Sequential(*layers).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def normalized() -> nn.Sequential:
    return drawn(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-5, momentum=0.1))


@pytest.mark.parametrize("buffers", EMA_BUFFERS)
def test_update_moves_weights_by_their_weight_and_buffers_by_policy(buffers: EmaBuffers) -> None:
    torch.manual_seed(0)
    average, network = normalized(), normalized()
    network(torch.randn(8, 3, dtype=torch.float64))
    before, present = state(average), state(network)
    ExponentialMovingAverage(average, network, buffers).update(torch.tensor(0.25, dtype=torch.float64))
    for name, value in average.state_dict().items():
        moved = 0.75 * before[name] + 0.25 * present[name]
        averaged = name.endswith(("weight", "bias")) or ("running" in name and buffers == "average")
        torch.testing.assert_close(value, moved if averaged else present[name], check_dtype=False)
        assert distance(moved, present[name]) > 1e-3, name
    assert all(torch.equal(value, present[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weight_of_0_keeps_the_average_and_of_1_copies(weight: float) -> None:
    average, network = normalized(), normalized()
    expected = state(network if weight else average)
    ExponentialMovingAverage(average, network, "average").update(torch.tensor(weight, dtype=torch.float64))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(average.state_dict()[name], expected[name])


def test_weight_is_read_anew_at_each_update() -> None:
    average, network = normalized(), normalized()
    weight = torch.tensor(0.0, dtype=torch.float64)
    moving = ExponentialMovingAverage(average, network, "copy")
    moving.update(weight)
    assert distance(average.state_dict()["0.weight"], network.state_dict()["0.weight"]) > 0.1
    weight.fill_(1.0)
    moving.update(weight)
    assert torch.equal(average.state_dict()["0.weight"], network.state_dict()["0.weight"])


def test_network_of_another_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ExponentialMovingAverage(normalized(), nn.Sequential(nn.Linear(3, 4)), "copy")


def bounded() -> nn.Sequential:
    """A linear, a convolutional and a transposed convolutional layer under spectral norm."""
    layers = (nn.Linear(9, 7), nn.Conv2d(3, 5, kernel_size=3), nn.ConvTranspose2d(5, 3, kernel_size=4))
    return drawn(*(spectral_norm(layer) for layer in layers))


@pytest.mark.parametrize("buffers", EMA_BUFFERS)
def test_averaged_weights_under_spectral_norm_have_spectral_norm_1(buffers: EmaBuffers) -> None:
    """The average of singular vectors is none of the averaged weights."""
    torch.manual_seed(0)
    network, average = bounded(), bounded()
    moving = ExponentialMovingAverage(average, network, buffers)
    for _ in range(300):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for layer in network:
            assert isinstance(layer.weight, Tensor)  # which takes a step of the power iteration
        moving.update(torch.tensor(0.02, dtype=torch.float64))
    for layer in average.eval():
        assert isinstance(layer.weight, Tensor)
        matrix = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        norm = float(torch.linalg.matrix_norm(matrix.flatten(start_dim=1), ord=2))
        assert norm == pytest.approx(1, abs=0.02), layer


# Of a GAN -------------------------------------------------------------------------------------------------------------


def trained(folder: Path, iterations: int = 20, **settings: Any) -> GAN:
    gan = tiny(**{"g_lr": 0.05, "ema_decay": 0.9, **settings})
    trainer(folder, max_steps=iterations).fit(gan, images())
    return gan


class Weights(Callback):
    """Keeps G's weights and buffers as they are after each iteration."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        self.states.append(state(pl_module.generator))


def averaged(states: list[dict[str, Tensor]], name: str, decay: float) -> Tensor:
    """Return the mean in which each state has the weight decay^age."""
    weights = decay ** torch.arange(len(states) - 1, -1, -1, dtype=torch.float64)
    return torch.tensordot(weights / weights.sum(), torch.stack([state[name].double() for state in states]), dims=1)


@pytest.mark.parametrize("buffers", EMA_BUFFERS)
def test_average_follows_its_rule(buffers: EmaBuffers, tmp_path: Path) -> None:
    seen, gan = Weights(), tiny(g_lr=0.05, ema_decay=0.6, ema_buffers=buffers)
    trainer(tmp_path, seen, max_steps=18).fit(gan, images())
    kept = average_of(gan).state_dict()
    assert len(seen.states) == 18
    assert kept.keys() == gan.generator.state_dict().keys()
    for name, value in kept.items():
        raw = gan.generator.state_dict()[name]
        if name.endswith("num_batches_tracked") or ("running" in name and buffers != "average"):
            assert torch.equal(value, raw), name
            continue
        assert distance(value, averaged(seen.states, name, 0.6)) < 1e-5
        assert distance(value, raw) > 1e-4 or name in ("net.0.bias", "net.3.bias"), name  # which are not trained
    for wrong in (averaged(seen.states, "net.3.weight", 0.7), averaged(seen.states[1:], "net.3.weight", 0.6)):
        assert distance(kept["net.3.weight"], wrong) > 1e-6


def test_first_update_copies(tmp_path: Path) -> None:
    gan = trained(tmp_path, iterations=1, ema_decay=0.999)
    for name, value in average_of(gan).state_dict().items():
        assert torch.equal(value, gan.generator.state_dict()[name]), name
    again = trained(tmp_path, iterations=2, ema_decay=0.999)
    assert distance(average_of(again).state_dict()["net.0.weight"], again.generator.state_dict()["net.0.weight"]) > 1e-4


def test_average_gets_no_gradients_and_is_in_no_optimizer(tmp_path: Path) -> None:
    gan = tiny()
    run = trainer(tmp_path, max_steps=3)
    run.fit(gan, images())
    optimized = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    for parameter in average_of(gan).parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert id(parameter) not in optimized
    networks = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    assert {id(parameter) for parameter in networks} == optimized


@pytest.mark.parametrize("settings", [{"ema_decay": 0.0}, *({"ema_buffers": kind} for kind in EMA_BUFFERS)])
def test_average_changes_nothing_in_training(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, other = trained(tmp_path, 5), trained(tmp_path, 5, **settings)
    for name, value in plain.generator.state_dict().items():
        assert torch.equal(other.generator.state_dict()[name], value), name


def test_decay_of_zero_keeps_no_average(tmp_path: Path) -> None:
    for decay, kept in ((0.0, False), (0.5, True)):
        gan = trained(tmp_path, iterations=2, ema_decay=decay)
        assert (gan.generator_ema is not None) == kept
        assert any(name.startswith("generator_ema.") for name in gan.state_dict()) == kept


def test_raw_and_averaged_weights_are_kept_and_come_back(tmp_path: Path) -> None:
    gan = tiny(g_lr=0.05, ema_decay=0.9)
    run = trainer(tmp_path, max_steps=20)
    run.fit(gan, images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    again = GAN.load_from_checkpoint(tmp_path / "a.ckpt")
    for name in gan.generator.state_dict():
        assert {f"generator.{name}", f"generator_ema.{name}"} <= stored.keys()
    assert distance(stored["generator.net.0.weight"], stored["generator_ema.net.0.weight"]) > 1e-3
    assert again.state_dict().keys() == gan.state_dict().keys()
    for name, value in gan.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_goes_on_with_the_average_it_had(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"g_lr": 0.05, "ema_decay": 0.9}
    whole, resumed = tiny(**settings), tiny(**settings)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="seven", every_n_train_steps=7, save_top_k=1)
    trainer(tmp_path, saver, max_steps=12).fit(whole, images())
    trainer(tmp_path, max_steps=12).fit(resumed, images(), ckpt_path=tmp_path / "seven.ckpt")
    stored = torch.load(tmp_path / "seven.ckpt", weights_only=True)["state_dict"]
    assert int(stored["iteration"]) == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert distance(stored["generator_ema.net.0.weight"], average_of(whole).state_dict()["net.0.weight"]) > 1e-3
