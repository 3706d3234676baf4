"""What batch norm's callback logs, and that it changes nothing."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from bngan import GAN
from bngan.batching import BATCHINGS, Batching, of_classes
from bngan.batchnorm.diagnostics import shift_blindness
from bngan.batchnorm.layers import BatchNorm, ConditionalBatchNorm, running_statistics
from bngan.batchnorm.statistics import evaluation_statistics
from bngan.callbacks import BatchNormStatistics
from bngan.callbacks.batchnorm import CELL
from bngan.cli import main
from bngan.data import ImageDataModule
from bngan.errors import UsageError
from bngan.images import to_minus1_1
from tests.conftest import QUICK, only_run
from tests.pictures import module_of, picture
from tests.test_gan import images, tiny, trainer

TAGS = [f"bn/{probe}{kind}" for probe in ("d_shift_blindness", "d_batch_dependence") for kind in ("", "/joint", "/separate")]
LAYERS = ("generator.net.1", "generator.net.4", "discriminator.net.1", "discriminator.net.4")


def fit(folder: Path, gan: GAN, *callbacks: Callback, steps: int = 10) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="")
    trainer(folder, *callbacks, max_steps=steps, logger=logger).fit(gan, images())
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def state(gan: GAN) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gan.state_dict().items()}


# Layer by layer -------------------------------------------------------------------------------------------------------


def test_every_layer_is_logged_every_so_many_iterations(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=4))
    assert {tag.removeprefix("bn/").partition("/")[0] for tag in events.Tags()["scalars"] if tag.startswith("bn/")} == {*LAYERS}
    for layer in LAYERS:
        for quantity in ("running_mean", "running_var", "gamma", "beta"):
            assert [event.step for event in events.Histograms(f"bn/{layer}/{quantity}")] == [4, 8]
            for statistic in ("min", "mean", "max"):
                assert [event.step for event in events.Scalars(f"bn/{layer}/{quantity}/{statistic}")] == [4, 8]
        for quantity in ("kl_to_running", "kl_floor"):
            assert [event.step for event in events.Scalars(f"bn/{layer}/{quantity}")] == [4, 8]


def test_histograms_can_be_left_out(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=5, histograms=False))
    assert events.Tags()["histograms"] == []
    assert "bn/generator.net.1/gamma/mean" in events.Tags()["scalars"]


def test_layers_without_running_statistics_are_not_logged(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(d_norm="layer"), BatchNormStatistics(every_n_iterations=5))
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("bn/")]
    assert tags
    assert all(tag.startswith("bn/generator.") for tag in tags)


class Recorded(Callback):
    """Works out, in each iteration, what should be logged of each layer in the last: by torch's own distributions."""

    def __init__(self) -> None:
        self.kl: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, gan: GAN) -> None:
        def look(name: str, layer: BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            z = inputs[0].detach()
            batch = Normal(z.mean(dim=0), (z.var(dim=0, correction=0) + layer.eps).sqrt())
            mean, var = running_statistics(layer)
            before = Normal(mean.clone(), (var + layer.eps).sqrt())
            self.kl[name].append(float(kl_divergence(batch, before).mean()))

        for name, layer in gan.batch_norms():
            layer.register_forward_pre_hook(partial(look, name))

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: object, batch_idx: int) -> None:
        self.kl = {name: [] for name, _ in gan.batch_norms()}


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("settings", [{}, {"n_critic": 2, "batching": "separate", "update_d_stats_in_g_step": True}], ids=str)
def test_values_are_those_of_the_layers_after_the_iteration_but_kl_is_to_those_before_each_batch(
    momentum: float, settings: dict[str, Any], tmp_path: Path
) -> None:
    gan, recorded = tiny(g_lr=0.05, d_lr=0.05, bn_momentum=momentum, **settings), Recorded()
    events = fit(tmp_path, gan, BatchNormStatistics(every_n_iterations=5), recorded)
    for name, layer in gan.batch_norms():
        mean, var = running_statistics(layer)
        for quantity, channels in (("running_mean", mean), ("running_var", var), ("gamma", layer.weight), ("beta", layer.bias)):
            channels = channels.detach()
            found = [events.Scalars(f"bn/{name}/{quantity}/{statistic}")[-1].value for statistic in ("min", "mean", "max")]
            expected = [float(channels.min()), float(channels.mean()), float(channels.max())]
            assert found == pytest.approx(expected, rel=1e-6)
        logged = [event.value for event in events.Scalars(f"bn/{name}/kl_to_running")]
        kl = recorded.kl[name]
        if name.startswith("discriminator."):  # the last passes are those of G's update, whose images D's statistics have
            updates = gan.settings.n_critic / (gan.settings.n_critic + 1)
            kl, again = kl[: round(len(kl) * updates)], kl[round(len(kl) * updates) :]
            assert logged[-1] != pytest.approx(sum(kl + again) / len(kl + again), rel=1e-2)
            assert len(again) == (1 if gan.settings.batching == "joint" else 2)
        assert logged[-1] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
        assert logged[0] != pytest.approx(logged[-1], rel=1e-3)
        assert len(kl) == (1 if not settings else 2 if name.startswith("generator.") else 4)


def test_floor_is_that_of_the_values_that_are_normalized_together(tmp_path: Path) -> None:
    for name, gan, values in (
        ("joint", tiny(), {"generator.net.1": 16, "discriminator.net.1": 32}),
        ("separate", tiny(batching="separate"), {"generator.net.1": 16, "discriminator.net.1": 16}),
        ("ghost", tiny(d_norm="ghost", ghost_groups=4), {"generator.net.1": 16, "discriminator.net.1": 8}),
    ):
        events = fit(tmp_path / name, gan, BatchNormStatistics(every_n_iterations=10))
        for layer, count in values.items():
            (floor,) = events.Scalars(f"bn/{layer}/kl_floor")
            assert floor.value == pytest.approx(1 / count, rel=1e-6), (name, layer)


def test_values_of_a_layer_are_means_over_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm that is not synchronized has running statistics and batches of its own on each rank."""
    alone, both = tiny(), tiny()
    one = fit(tmp_path / "one", alone, BatchNormStatistics(every_n_iterations=5))
    monkeypatch.setattr("bngan.callbacks.batchnorm.mean_over_ranks", lambda own: (own + (own + 1)) / 2)
    two = fit(tmp_path / "two", both, BatchNormStatistics(every_n_iterations=5))
    for layer in LAYERS:
        for quantity in ("running_mean/mean", "running_var/min", "gamma/max", "beta/mean", "kl_to_running"):
            tag = f"bn/{layer}/{quantity}"
            for own, mean in zip(one.Scalars(tag), two.Scalars(tag), strict=True):
                assert mean.value == pytest.approx(own.value + 0.5, rel=1e-5), tag


def test_iterations_that_are_looked_into_run_eagerly_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager: list[tuple[int, int]] = []

    @contextmanager
    def spied(gan: GAN) -> Iterator[None]:
        before = gan.trainer.global_step
        yield
        eager.append((before, gan.trainer.global_step))

    monkeypatch.setattr(GAN, "eager", spied)
    fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=4))
    assert eager == [(3, 4), (7, 8)]
    eager.clear()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, BatchNormStatistics(every_n_iterations=4), max_steps=10, logger=logger).fit(tiny(), images())
    assert eager == [], "without TensorBoard there is nobody to tell"


def test_looking_leaves_training_and_the_networks_as_they_are(tmp_path: Path) -> None:
    looked_into, alone = tiny(), tiny()
    fit(tmp_path / "looked into", looked_into, BatchNormStatistics(every_n_iterations=1))
    fit(tmp_path / "alone", alone)
    for name, value in state(alone).items():
        assert torch.equal(looked_into.state_dict()[name], value), name
    assert not any(module._forward_pre_hooks for module in looked_into.modules())


def test_a_crash_leaves_no_hooks_behind(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Trainer, gan: GAN, *_: object) -> None:
            raise KeyError("inside")

    gan = tiny()
    with pytest.raises(KeyError, match="inside"):
        fit(tmp_path, gan, Crash(), BatchNormStatistics(every_n_iterations=1))
    assert not any(module._forward_pre_hooks for module in gan.modules())


@pytest.mark.parametrize("every", [0, -1])
def test_intervals_below_one_are_refused(every: int) -> None:
    with pytest.raises(UsageError, match=rf"batchnorm\.every_n_iterations must be at least 1, got {every}"):
        BatchNormStatistics(every_n_iterations=every)
    BatchNormStatistics(every_n_iterations=1)


# What D sees ----------------------------------------------------------------------------------------------------------


def held_out(folder: Path, count: int, **settings: Any) -> ImageDataModule:
    """A data module of random pictures, so many of them held out."""
    for number in range(count):
        picture(folder / "test" / f"{number}.png", size=(4, 4))
    for number in range(64):
        picture(folder / "train" / f"{number}.png", size=(4, 4))
    return module_of(folder, **{"batch_size": 16, **settings})


def looked_at(folder: Path, gan: GAN, data: ImageDataModule) -> dict[str, float]:
    """Train for two iterations, and return what is logged of what D sees."""
    run = trainer(folder, BatchNormStatistics(), max_steps=2, limit_train_batches=2)
    run.fit(gan, datamodule=data)
    return {tag: float(value) for tag, value in run.callback_metrics.items() if tag.startswith("bn/")}


@pytest.mark.parametrize("batching", BATCHINGS)
def test_callback_logs_the_runs_own_batching_and_both(batching: Batching, tmp_path: Path) -> None:
    data = held_out(tmp_path / "pictures", count=80)
    trained_alike = []
    for callbacks in ((BatchNormStatistics(),), ()):
        gan = tiny(batching=batching)
        logger = CSVLogger(tmp_path, name=str(len(callbacks)), version="")
        trainer(tmp_path, *callbacks, max_steps=4, logger=logger).fit(gan, datamodule=data)
        trained_alike.append(state(gan))
    for name, value in trained_alike[0].items():
        assert torch.equal(trained_alike[1][name], value), name
    header, *rows = (line.split(",") for line in (tmp_path / "1" / "metrics.csv").read_text().splitlines())
    logged = {tag: [float(row[header.index(tag)]) for row in rows if row[header.index(tag)]] for tag in TAGS}
    for tag, values in logged.items():
        assert len(values) == 1, tag
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        other = "separate" if batching == "joint" else "joint"
        assert logged[probe] == logged[f"{probe}/{batching}"] != logged[f"{probe}/{other}"]
    assert logged["bn/d_shift_blindness/separate"][0] > 0.95 > logged["bn/d_shift_blindness/joint"][0]
    assert not set(TAGS) & set((tmp_path / "0" / "metrics.csv").read_text().splitlines()[0].split(","))


@pytest.mark.parametrize(("count", "logged"), [(3, False), (31, False), (32, True)])
def test_held_out_images_that_are_not_two_batches_are_not_looked_at(
    count: int, logged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert looked_at(tmp_path, tiny(), held_out(tmp_path / "pictures", count)).keys() == ({*TAGS} if logged else set())
    told = f"D is not probed (bn/d_*): {count} held-out images are not two batches of 16.\n"
    assert capsys.readouterr().out.count(told) == (not logged)


def test_dependence_is_not_worked_out_where_there_is_none(tmp_path: Path) -> None:
    found = looked_at(tmp_path, tiny(d_norm="layer"), held_out(tmp_path / "pictures", count=32))
    assert found.keys() == {tag for tag in TAGS if "blindness" in tag}


def test_what_is_logged_depends_on_trainings_batch_size_and_not_on_evaluations(tmp_path: Path) -> None:
    held_out(tmp_path / "pictures", count=83)
    found = [
        looked_at(
            tmp_path,
            tiny(d_lr=1e-12, g_lr=1e-12),
            module_of(tmp_path / "pictures", batch_size=batch_size, eval_batch_size=size),
        )
        for batch_size, size in ((8, 7), (8, 64), (32, 64))
    ]
    assert found[0] == found[1]
    assert found[0]["bn/d_batch_dependence"] > 1.3 * found[2]["bn/d_batch_dependence"]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_ghost_norms_groups_divide_what_is_looked_at(batching: Batching, tmp_path: Path) -> None:
    gan = tiny(g_norm="ghost", d_norm="ghost", ghost_groups=8, batching=batching)
    found = looked_at(tmp_path, gan, held_out(tmp_path / "pictures", count=83))
    assert all(0 < found[tag] <= 1 for tag in TAGS)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_d_of_packs_is_looked_at_with_packs(batching: Batching, tmp_path: Path) -> None:
    found = looked_at(tmp_path, tiny(pack=4, batching=batching), held_out(tmp_path / "pictures", count=83))
    assert all(0 < found[tag] <= 1 for tag in TAGS)


def test_d_is_looked_at_with_the_images_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of that size, with the noise of the last iteration, fakes normalized by their own batch and never twice."""
    data, gan = held_out(tmp_path / "pictures", count=83), tiny(instance_noise=2.0, g_norm="batch")
    noises: list[float] = []

    def look(
        logits: object,
        real_images: Tensor,
        draw_fakes: Callable[[int], Tensor],
        batching: Batching,
        batch_size: int,
        labels: Tensor | None,
    ) -> Tensor:
        noise = float(gan.discriminator.instance_noise)
        noises.append(noise)
        clean = to_minus1_1(data.subset(80, train=False).images)
        assert batch_size == 16
        assert labels is None
        assert float((real_images - clean).std()) == pytest.approx(noise, rel=0.1)
        fakes = draw_fakes(0)
        assert not torch.isclose(fakes, draw_fakes(1)).any()
        gan.discriminator.instance_noise.zero_()
        assert float((fakes - draw_fakes(0)).std()) == pytest.approx(noise, rel=0.1)
        z, fakes = gan.sample_latents(0, 16), draw_fakes(0)
        assert not torch.allclose(fakes, gan.generator.eval()(z).view(16, 1, 4, 4), atol=1e-3)
        torch.testing.assert_close(fakes, gan.generator.train()(z).view(16, 1, 4, 4))
        gan.discriminator.instance_noise.fill_(noise)
        return torch.zeros(())

    monkeypatch.setattr("bngan.callbacks.batchnorm.batch_dependence", look)
    run = trainer(tmp_path, BatchNormStatistics(), max_steps=4, max_epochs=-1, limit_train_batches=2, val_check_interval=2)
    run.fit(gan, datamodule=data)
    assert noises == [1.5, 1.5, 0.5, 0.5]  # of the second and the last of four iterations, for either batching


@pytest.fixture(scope="module")
def events(mnist_root: Path) -> Iterator[EventAccumulator]:
    every = ("--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1")
    with tempfile.TemporaryDirectory() as folder:
        where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}")
        assert main(["fit", *QUICK[::2], "--metrics.num_samples=0", *every, *where]) == 0
        yield EventAccumulator(str(only_run(Path(folder)))).Reload()


def test_run_plots_what_d_sees(events: EventAccumulator) -> None:
    values: dict[str, Any] = {}
    for tag in TAGS:
        assert [event.step for event in events.Scalars(tag)] == [5, 10], tag
        values[tag] = [event.value for event in events.Scalars(tag)]
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        assert values[probe] == values[f"{probe}/joint"]
        assert all(0 < value <= 1 for value in values[probe])
    assert min(values["bn/d_shift_blindness/separate"]) > 0.95 > max(values["bn/d_shift_blindness/joint"])


# By class -------------------------------------------------------------------------------------------------------------


def test_gamma_and_beta_of_each_class_are_logged(tmp_path: Path) -> None:
    gan = tiny(classes=3)
    first = gan.generator.net[1]
    assert isinstance(first, ConditionalBatchNorm)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    loader = images()
    loader.labels = torch.arange(len(loader.labels)) % 3
    trainer(tmp_path, BatchNormStatistics(every_n_iterations=4), max_steps=4, logger=logger).fit(gan, loader)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    for name, values in (("gamma", first.gamma.detach()), ("beta", first.beta.detach())):
        tag = f"bn/generator.net.1/{name}"
        for label in range(3):
            (logged,) = events.Scalars(f"{tag}/class_{label}")
            assert (logged.step, logged.value) == (4, pytest.approx(float(values[label].mean()), abs=1e-6))
        (between,) = events.Scalars(f"{tag}/between_classes")
        assert between.value == pytest.approx(float(values.std(dim=0, correction=0).mean()), abs=1e-6)
        assert between.value > 0
        (picture,) = events.Images(tag)
        assert (picture.height, picture.width) == (3 * CELL[0], first.gamma.shape[1] * CELL[1])
    assert "bn/generator.net.1.norm/running_mean/mean" in events.Tags()["scalars"]


def test_d_is_probed_with_fakes_of_the_classes_of_real_images(mnist_root: Path, tmp_path: Path) -> None:
    gan, batch = tiny(image_shape=(1, 28, 28), classes=10), 16
    data = ImageDataModule(root=str(mnist_root), batch_size=batch)
    run = trainer(
        tmp_path, BatchNormStatistics(), max_steps=1, val_check_interval=1, check_val_every_n_epoch=None, limit_val_batches=1
    )
    run.fit(gan, datamodule=data)
    real, labels = data.subset(512, train=False)
    seen = to_minus1_1(real) + gan.draw_instance_noise(512, 0)
    expected = []
    with evaluation_statistics(gan, "batch"):
        for number, (some, own) in enumerate(zip(seen.split(batch), labels.split(batch), strict=True)):
            fakes = gan.generate(gan.sample_latents(number * batch, (number + 1) * batch), own)
            noise = gan.draw_instance_noise(batch, 1, number)
            expected.append(shift_blindness(of_classes(gan.logits, own), some, fakes, "joint", noise))
    assert float(run.callback_metrics["bn/d_shift_blindness"]) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    assert 0 < float(run.callback_metrics["bn/d_batch_dependence"]) < 1
