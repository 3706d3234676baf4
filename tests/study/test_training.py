"""A run is what `fit` with its settings and seed is, looked at without being changed."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import Tensor

from bngan import GAN
from bngan.checkpoint import load_gan
from bngan.data.loader import ShardedBatches, TensorLoader
from bngan.data.module import ImageDataModule
from bngan.errors import UsageError
from bngan.rng import generator
from bngan.study import training
from bngan.study.probes import PROBES
from bngan.study.spec import Look, Run
from bngan.study.tasks import TASKS, Digits, Task
from bngan.study.training import Training, TrainingImages, build_gan, draw_samples, evaluate, train

SMALL = {"latent_dim": 4, "hidden_dim": 8}


def run_of(task: str = "noise", iterations: int = 12, looks: tuple[Look, ...] = (), **settings: Any) -> Run:
    """A run on 50 images of noise, of which a batch of 8 leaves a rest."""
    return Run(
        id="A/T/a3/g_lr=0.002/3",
        block="A",
        context="T",
        arm="a3",
        axes={},
        seed=3,
        role="fresh",
        task=task,
        settings={**SMALL, **settings},
        batch_size=8,
        iterations=iterations,
        looks=looks or (Look(iterations, samples=32),),
    )


class Noise:
    """A task whose images take no time."""

    pictured = 10

    def __init__(self, root: Path, seed: int, device: torch.device | str) -> None:
        self.pixels = torch.randint(256, (50, 1, 16, 16), generator=generator(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Tensor) -> Tensor:
        return self.pixels[rows % 50].float().div_(127.5).sub_(1)

    def measure(self, sets: Tensor, *, whole: bool) -> list[dict[str, float]]:
        return [{"mean": float(samples.mean()), "whole": float(whole)} for samples in sets]

    def references(self, count: int) -> dict[str, dict[str, float]]:
        return {}

    def picture(self, samples: Tensor) -> Tensor:
        return samples[0]


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "noise", Task((1, 16, 16), 10, Noise))


def fitted(run: Run, images: Tensor, labels: Tensor | None = None) -> GAN:
    """What `fit` makes of the same settings and seed."""
    seed_everything(run.seed, workers=True, verbose=False)
    gan = GAN(**run.settings, image_shape=TASKS[run.task].image_shape, seed=run.seed)
    size = run.batch_size * gan.settings.n_critic
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    loader = TensorLoader(images, labels, ShardedBatches(len(images), size, train=True, seed=run.seed))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=run.iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(gan, loader)
    gan.normalized_together.fill_(run.batch_size)  # which fit knows from its data module
    return gan


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "literal": {"loss": "non_saturating", "batching": "separate", "instance_noise": 0.0, "ema_decay": 0.0, "beta1": 0.5},
    "conv, n_critic 2": {"network": "conv", "n_critic": 2, "hidden_dim": 4},
    "dropout, clipped": {"d_dropout": 0.5, "d_clip": 0.1, "g_clip": 0.1},
    "noisy, two steps of G": {"g_norm": "noisy", "g_steps": 2},
    "pack, R1": {"pack": 2, "d_norm": "none", "r1": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_run_ends_at_the_bits_of_fit(case: str) -> None:
    run = run_of(looks=(Look(5, samples=8, probes=tuple(PROBES)), Look(12, samples=16, whole=True)), **CASES[case])
    data = Noise(Path(), 0, "cpu")
    trained = Training(run, data)
    for look in run.looks:
        trained.advance(look.iteration)
        evaluate(trained.gan, data, look, trained.also)  # which changes nothing
    expected = fitted(run, data.pixels).state_dict()
    found = trained.gan.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []
    start = {name: weight for name, weight in build_gan(run).named_parameters() if weight.requires_grad and weight.ndim > 1}
    assert not any(torch.equal(found[name], weight) for name, weight in start.items())


def test_run_with_classes_ends_at_the_bits_of_fit(mnist_root: Path) -> None:
    run = run_of("digits", iterations=3, classes=10)
    data = TASKS["digits"].load(mnist_root, run.seed, "cpu")
    assert isinstance(data, Digits)
    trained = Training(run, data)
    trained.advance(3)
    expected = fitted(run, data.images, data.labels).state_dict()
    assert all(torch.equal(trained.gan.state_dict()[name], value) for name, value in expected.items())
    assert not torch.equal(fitted(run, data.images).state_dict()["generator.net.1.gamma"], expected["generator.net.1.gamma"])


def test_classes_that_the_task_does_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match="classes is 10, but the images of task noise have 0"):
        build_gan(run_of(classes=10))
    with pytest.raises(UsageError, match="classes is 3, but the images of task digits have 10"):
        build_gan(run_of("digits", classes=3))
    with pytest.raises(UsageError, match="probes are for networks without classes"):
        build_gan(run_of("digits", classes=10, looks=(Look(12, samples=8, probes=("mates_share",)),)))


def test_virtual_batch_norm_takes_its_reference_from_the_first_batch() -> None:
    run = replace(run_of(iterations=1, d_norm="virtual"), batch_size=64)
    data = Noise(Path(), 0, "cpu")
    data.pixels = data.pixels.repeat(2, 1, 1, 1)
    trained = Training(run, data)
    trained.advance(1)
    first = trained.images(0)
    reference = trained.gan.discriminator.reference
    assert reference is not None
    assert torch.equal(reference, first.flatten(start_dim=1))


def test_images_are_those_of_fits_loader_over_several_epochs() -> None:
    data = Noise(Path(), 0, "cpu")
    batches = ShardedBatches(50, 8, train=True, seed=4)
    loader = TensorLoader(data.pixels, torch.zeros(50, dtype=torch.long), batches)
    images = TrainingImages(data, 8, seed=4)
    found = [images(done) for done in range(14)]
    for epoch in range(2):
        batches.set_epoch(epoch)
        for number, (expected, _) in enumerate(loader):
            assert torch.equal(found[6 * epoch + number], expected)
    assert torch.equal(images(0), found[0])  # after a later epoch


def test_digits_come_in_the_order_of_the_data_module(mnist_root: Path) -> None:
    module = ImageDataModule(root=str(mnist_root), seed=3, batch_size=64)
    images = TrainingImages(TASKS["digits"].load(mnist_root, 3, "cpu"), 64, seed=3)
    for done, (expected, _) in zip(range(3), module.train_dataloader(), strict=False):
        assert torch.equal(images(done), expected)


def test_start_is_fits_and_leaves_torchs_generator_alone() -> None:
    run = run_of()
    torch.manual_seed(9)
    gan = build_gan(run)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(9)))
    seed_everything(3, workers=True, verbose=False)
    expected = GAN(**run.settings, image_shape=(1, 16, 16), seed=3)
    pairs = zip(gan.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(found, weight) for found, weight in pairs)
    assert int(gan.normalized_together) == 8


# Looking at it --------------------------------------------------------------------------------------------------------


def test_looks_change_nothing() -> None:
    run = run_of(d_dropout=0.3)
    data = Noise(Path(), 0, "cpu")
    trained = Training(run, data)
    trained.advance(3)
    before, modes = copy.deepcopy(trained.gan.state_dict()), [part.training for part in trained.gan.modules()]
    torch.manual_seed(5)
    evaluate(trained.gan, data, Look(3, samples=20, whole=True), trained.also)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert all(torch.equal(value, before[name]) for name, value in trained.gan.state_dict().items())
    assert [part.training for part in trained.gan.modules()] == modes


def kinds(entries: tuple[dict[str, Any], ...]) -> list[tuple[int, str, str, float | None]]:
    return [(entry["iteration"], entry["weights"], entry["statistics"], entry.get("momentum")) for entry in entries]


def test_whole_looks_sample_a_batch_normalized_g_in_every_way() -> None:
    looks = (Look(2, samples=16), Look(4, samples=16, whole=True))
    result = train(run_of(looks=looks, iterations=4))
    ways = [("running", None), ("batch", None), ("precise", None), ("running", 0.01)]
    whole = [(4, weights, *way) for weights in ("raw", "ema") for way in ways]
    assert kinds(result.measured) == [(2, "raw", "running", None), (2, "ema", "running", None), *whole]
    assert [entry["whole"] for entry in result.measured] == [0, 0, *[1, 0, 0, 0] * 2]  # what takes long, of the first way alone
    assert len({entry["mean"] for entry in result.measured}) == len(result.measured)  # each is of other samples
    plain = train(run_of(looks=looks, iterations=4, g_norm="none", ema_decay=0.0))
    assert kinds(plain.measured) == [(2, "raw", "running", None), (4, "raw", "running", None)]


def test_samples_are_of_evaluation_mode_and_the_same_latents_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gan = build_gan(run_of())
    expected = draw_samples(gan, 40, "raw", "running")
    with torch.no_grad():
        gan.eval()
        torch.testing.assert_close(expected, gan.generate(gan.sample_latents(0, 40)))
    by_batch = draw_samples(gan, 40, "raw", "batch")
    assert not torch.allclose(by_batch, expected)
    monkeypatch.setattr(training, "AT_ONCE", 16)
    torch.testing.assert_close(draw_samples(gan, 40, "raw", "batch"), by_batch)


def test_result_is_plain_json_with_its_probes_and_a_picture(tmp_path: Path) -> None:
    looks = (Look(2, samples=16, probes=("offset_response", "gradient_cosine")), Look(3, samples=16))
    result = train(run_of(looks=looks, iterations=3), folder=tmp_path)
    assert json.loads(json.dumps(asdict(result)))["measured"] == list(result.measured)
    assert result.failure is None
    probes = {"offset_response", "offset_curve", "gradient_cosine"}
    assert {(entry["iteration"], entry["probe"]) for entry in result.probed} == {(2, probe) for probe in probes}
    assert 0 < result.seconds < 60
    assert Image.open(tmp_path / "A_T_a3_g_lr=0.002_3.png").size == (16, 16)


def test_run_that_diverges_ends_and_is_a_result(tmp_path: Path) -> None:
    looks = (Look(2, samples=16), Look(50, samples=16))
    diverging = {"g_norm": "none", "d_norm": "none", "loss": "least_squares", "d_lr": 1e15}
    result = train(run_of(looks=looks, iterations=50, **diverging), folder=tmp_path)
    assert result.failure is not None
    assert "at iteration" in result.failure
    assert [entry["iteration"] for entry in result.measured] in ([2, 2], [])
    assert list(tmp_path.iterdir()) == []
    json.dumps(asdict(result), allow_nan=False)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_weights_that_are_not_finite_at_a_look_are_a_failure(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(run: Run, device: torch.device | str = "cpu") -> GAN:
        gan = build_gan(run, device)
        with torch.no_grad():
            getattr(gan, network).net[0].weight[0, 0] = float("nan")
        return gan

    monkeypatch.setattr(training, "build_gan", poisoned)
    result = train(run_of(looks=(Look(0, samples=16),)))
    assert result.failure == f"{network}.net.0.weight has NaN or infinite values at iteration 0"
    assert result.measured == ()


def test_checkpoint_is_the_networks_at_the_end(tmp_path: Path) -> None:
    run = run_of(iterations=2)
    result = train(run, checkpoint=tmp_path / "last.ckpt")
    gan = load_gan(tmp_path / "last.ckpt")
    assert int(gan.iteration) == 2
    (found, _) = evaluate(gan, Noise(Path(), 0, "cpu"), run.looks[-1])
    assert found == result.measured[0]


@pytest.mark.parametrize("task", ["digits", "ring", "stack2_01"])
def test_tasks_train_and_measure(task: str, mnist_root: Path, tmp_path: Path) -> None:
    settings = {"network": "points", "instance_noise": 0.0} if task == "ring" else {}
    run = run_of(task, iterations=2, looks=(Look(2, samples=200, whole=task == "ring"),), ema_decay=0.0, **settings)
    result = train(run, folder=tmp_path, root=mnist_root)
    assert result.failure is None
    measured = {"digits": {"fid", "classes", "class_kl", "pixel_variance"}, "ring": {"modes", "high_quality", "points"}}
    expected = measured.get(task, {"modes", "class_kl"})
    assert result.measured[0].keys() == {"iteration", "weights", "statistics", "samples"} | expected
    assert len(list(tmp_path.iterdir())) == 1
