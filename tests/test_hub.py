"""A trained generator is loaded in one line and sampled in another, and gives what `bngan sample` gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bngan
from bngan.cli import main
from bngan.errors import UsageError
from bngan.gan import GAN
from bngan.hub import TrainedGenerator, find_device
from bngan.images import to_uint8
from tests.test_gan import tiny


def spoilt(gan: GAN) -> GAN:
    """Give a GAN running statistics and an average of its own, so that each way to sample it gives other images."""
    torch.manual_seed(1)
    for network in (gan.generator, gan.generator_ema):
        for layer in network.modules() if network is not None else ():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features)
    return gan


def save(gan: GAN, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": gan.state_dict(), "hyper_parameters": dict(gan.hparams)}, path)
    return path


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The best of two checkpoints of the only run under runs/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mnist" / "one" / "checkpoints"
    save(tiny(seed=7), folder / "last.ckpt")
    return save(spoilt(tiny()), folder / "best.ckpt")


def test_samples_are_images_of_a_generator_in_evaluation(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint)
    images = generator.sample(64, seed=0)
    assert (images.shape, images.dtype, images.device.type) == ((64, 1, 4, 4), torch.float32, "cpu")
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert not images.requires_grad
    assert not any(part.training for part in generator.gan.modules())
    assert not torch.equal(images, generator.sample(64, seed=1))


@pytest.mark.parametrize("way", ["last", "runs/mnist/one", "runs/mnist/one/checkpoints/best.ckpt"])
def test_run_is_named_as_on_the_command_line(way: str, checkpoint: Path) -> None:
    expected = bngan.load(checkpoint).sample(3)
    assert torch.equal(bngan.load(way).sample(3), expected)
    assert torch.equal(bngan.load(Path(way)).sample(3), expected)
    assert not torch.equal(bngan.load(checkpoint.with_name("last.ckpt")).sample(3), expected)


@pytest.mark.parametrize("statistics", [None, "running", "precise", "batch"])
@pytest.mark.parametrize("weights", [None, "raw", "ema"])
def test_samples_are_those_of_the_command_line(weights: Any, statistics: Any, checkpoint: Path) -> None:
    images = bngan.load(checkpoint, weights=weights, statistics=statistics).sample(5, seed=3)
    options = [f"--{name}={value}" for name, value in (("weights", weights), ("statistics", statistics)) if value]
    assert main(["sample", str(checkpoint), "--num=5", "--seed=3", "--output=samples.npz", *options]) == 0
    assert np.array_equal(np.load("samples.npz")["images"], to_uint8(images).numpy())


def test_ways_to_sample_differ(checkpoint: Path) -> None:
    ways: list[Tensor] = [
        bngan.load(checkpoint, weights="raw").sample(5),
        bngan.load(checkpoint, weights="ema").sample(5),
        bngan.load(checkpoint, weights="ema", statistics="batch").sample(5),
        bngan.load(checkpoint, weights="ema", statistics="precise").sample(5),
    ]
    for number, images in enumerate(ways):
        assert all(not torch.allclose(images, other, atol=1e-3) for other in ways[:number])


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_sample_is_the_same_however_many_are_drawn(statistics: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = bngan.load(checkpoint, statistics=statistics)
    images = generator.sample(300)
    torch.testing.assert_close(generator.sample(1), images[:1])
    monkeypatch.setattr("bngan.hub.LARGEST_CHUNK", 7)
    torch.testing.assert_close(generator.sample(300), images)
    assert not torch.allclose(images[:128], images[128:256], atol=1e-3)


def test_chunks_are_small_where_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TrainedGenerator(tiny())
    seen: list[int] = []
    generator.gan.generator_ema.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))  # pyright: ignore
    generator.sample(1001)
    monkeypatch.setattr("bngan.hub.CHUNK_VALUES", 16 * 300)
    generator.sample(700)
    monkeypatch.setattr("bngan.hub.CHUNK_VALUES", 1)
    generator.sample(2)
    assert seen == [500, 500, 1, 300, 300, 100, 1, 1]


def test_latents_of_ones_own_become_images(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint)
    z = generator.gan.sample_latents(0, 4, seed=3)
    torch.testing.assert_close(generator.generate(z), generator.sample(4, seed=3))


def test_sampling_changes_nothing(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint, statistics="precise")
    before = {name: value.clone() for name, value in generator.gan.state_dict().items()}
    first = generator.sample(3)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in generator.gan.state_dict().items())
    assert torch.equal(generator.sample(3), first)


def test_lightnings_way_to_load_gives_a_gan_in_training(checkpoint: Path) -> None:
    """The reason why there is another."""
    gan = GAN(**dict(bngan.load(checkpoint).gan.hparams))
    assert gan.training
    z = gan.sample_latents(0, 8)
    assert not torch.allclose(gan.generate(z)[:2], gan.generate(z[:2]), atol=1e-3)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "averaged"}, "unknown weights 'averaged'; choose from raw, ema"),
    "statistics": ({"statistics": "own"}, "unknown statistics 'own'; choose from running, batch, precise"),
    "missing file": ({"path": "gone.ckpt"}, "there is no checkpoint gone.ckpt"),
    "empty folder": ({"path": "runs"}, "runs"),
    "no file of a checkpoint": ({"path": __file__}, "damaged or not a checkpoint"),
    **{
        f"device {name!r}": ({"device": name}, f"device {name!r}")
        for name in ("banana", "", "meta", "cuda:-1", "cuda:99", "hpu")
    },
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_gets_a_line(case: str, checkpoint: Path) -> None:
    arguments, words = MISTAKES[case]
    with pytest.raises(UsageError) as caught:
        bngan.load(**{"path": checkpoint, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"ema_decay": 0.0}, {"weights": "ema"}, "keeps no average"),
        ({"g_norm": "none"}, {"statistics": "batch"}, "no batch norm"),
    ],
)
def test_what_a_generator_has_not_is_said_before_it_is_sampled(
    settings: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        TrainedGenerator(tiny(**settings), **arguments)
    assert len(TrainedGenerator(tiny(**settings)).sample(2)) == 2


@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_sample_is_drawn(count: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        TrainedGenerator(tiny()).sample(count)


@pytest.mark.parametrize(
    ("kind", "count", "taken", "refused"),
    [
        (None, 0, {"cpu": "cpu", "CPU": "cpu"}, ["gpu", "cuda", "cuda:0", "mps", "xpu"]),
        ("cuda", 2, {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "CUDA:1": "cuda:1"}, ["cuda:2", "mps", "xpu"]),
        ("mps", 1, {"gpu": "mps", "mps": "mps", "mps:0": "mps:0"}, ["mps:1", "cuda"]),
        ("xpu", 1, {"gpu": "xpu", "xpu:0": "xpu:0"}, ["xpu:1", "cuda"]),
    ],
)
def test_gpu_is_the_accelerator_that_there_is(
    kind: str | None, count: int, taken: dict[str, str], refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert {name: str(find_device(name)) for name in taken} == taken
    for name in (*refused, "meta"):
        with pytest.raises(UsageError, match=f"device '{name}' is not on this machine"):
            find_device(name)
