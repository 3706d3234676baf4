"""One run on a processor: trained as `fit` trains it, without a Trainer, and looked at where its study says so."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bngan import rng
from bngan.batchnorm.layers import batch_norm_layers
from bngan.batchnorm.statistics import EVAL_STATISTICS, AlsoRunning, EvalStatistics
from bngan.checkpoint import save_gan
from bngan.data.loader import ShardedBatches
from bngan.errors import NonFiniteLoss, UsageError
from bngan.gan import GAN
from bngan.images import save_png
from bngan.iteration import Draws, Observed, OptimizerUpdate
from bngan.networks import needs_reference, set_reference
from bngan.sampler import Weights
from bngan.schedules import Schedule, schedule_at
from bngan.study.probes import PROBE_BATCHES, probe
from bngan.study.spec import Look, Result, Run
from bngan.study.tasks import TASKS, Data, Digits

Entry = dict[str, Any]
SLOW_MOMENTUM = 0.01  # of G's second running statistics
AT_ONCE = 512  # samples drawn together: whole blocks of those that are normalized by their own batch, where these are 2^n


def train(
    run: Run,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    *,
    root: Path = Path("data"),
    checkpoint: Path | None = None,
) -> Result:
    """Train and evaluate a run; one whose numbers become infinite or NaN ends there, which is its result.

    Args:
        run: what to train, and when to look at it.
        device: where.
        folder: where its picture of samples goes, named by its id with _ for /; None draws none.
        root: folder of the data sets' files.
        checkpoint: a file for the networks as they are at the end; None writes none.
    """
    data = TASKS[run.task].load(root, run.seed, device)
    training = Training(run, data, device)
    failure = None
    try:
        for look in run.looks:
            training.advance(look.iteration)
            training.look(look)
        if folder is not None:
            save_picture(training.gan, data, folder / run.picture)
    except NonFiniteLoss as error:
        failure = str(error)
    if checkpoint is not None:
        save_gan(training.gan, checkpoint, run.iterations)
    return Result(run, failure, training.seconds, tuple(training.measured), tuple(training.probed))


# Training -------------------------------------------------------------------------------------------------------------


def build_gan(run: Run, device: torch.device | str = "cpu") -> GAN:
    """Return a run's GAN as it starts, with the weights that `fit` draws from the same seed.

    Raises:
        UsageError: if it has other classes than the task's images, or probes are asked for, which know no classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        gan = GAN(**run.settings, image_shape=TASKS[run.task].image_shape, seed=run.seed)
    if gan.settings.classes:
        _check_classes(run, gan.settings.classes)
    gan.check_batch(run.batch_size)
    gan.normalized_together.fill_(run.batch_size)
    return gan.to(device)


def _check_classes(run: Run, asked: int) -> None:
    if asked != (found := TASKS[run.task].classes):
        raise UsageError(f"classes is {asked}, but the images of task {run.task} have {found}; set classes to that")
    if any(look.probes for look in run.looks):
        raise UsageError(f"probes are for networks without classes, and classes is {asked}; set it to 0, or ask for no probes")


def other_momenta(run: Run, gan: GAN) -> list[float]:
    """Return for which momenta G's running statistics are kept beside its own: where a look will measure them."""
    return [SLOW_MOMENTUM] if any(look.whole for look in run.looks) and any(batch_norm_layers(gan.generator)) else []


class TrainingImages:
    """A run's training images by the iteration, in the order in which `fit` meets them.

    Args:
        data: of the run's task.
        size: images in an iteration, batch_size for each update of D.
        seed: of the run.
        device: of the data.
    """

    def __init__(self, data: Data, size: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.data, self.device = data, device
        self._batches = ShardedBatches(len(data), size, train=True, seed=seed)
        self._rows = [*self._batches.rows(device)]  # of the present epoch

    def rows(self, done: int) -> Tensor:
        """Return the rows int64 (size,) that the iteration after `done` others trains with."""
        epoch, place = divmod(done, len(self._batches))
        if epoch != self._batches.epoch:
            self._batches.set_epoch(epoch)
            self._rows = [*self._batches.rows(self.device)]
        return self._rows[place]

    def __call__(self, done: int) -> Tensor:
        """Return the images (size, C, H, W) of those rows."""
        return self.data.batch(self.rows(done))

    def labels(self, done: int) -> Tensor:
        """Return their classes int64 (size,)."""
        assert isinstance(self.data, Digits)  # no others have classes
        return self.data.labels[self.rows(done)]


class Training:
    """A run as far as it has come.

    Args:
        run: what is trained.
        data: of its task.
        device: where.

    Attributes:
        gan: its networks.
        also: G's running statistics of another momentum, kept where a look will measure them.
        seconds: that training has taken.
        measured, probed: what looks have told until now, as in Result.
        probed_rows: of the training images that probes look at, int64 (n,), the same in every run.
    """

    def __init__(self, run: Run, data: Data, device: torch.device | str = "cpu") -> None:
        self.run, self.gan, self.seconds = run, build_gan(run, device), 0.0
        self.images = TrainingImages(data, run.batch_size * self.gan.settings.n_critic, run.seed, device)
        self.probed_rows = torch.arange(PROBE_BATCHES * run.batch_size, device=device)
        self.measured: list[Entry] = []
        self.probed: list[Entry] = []
        self.also = [AlsoRunning(self.gan.generator, momentum) for momentum in other_momenta(run, self.gan)]
        d_optimizer, g_optimizer = self.gan.configure_optimizers()
        iteration = self.gan.build_iteration(
            OptimizerUpdate(d_optimizer, self.gan.settings.d_clip), OptimizerUpdate(g_optimizer, self.gan.settings.g_clip)
        )
        generator = iteration.generator
        for also in self.also:
            generator = also.following(generator)
        self._iterate, self._draws = replace(iteration, generator=generator), Draws(device)

    def advance(self, until: int) -> None:
        """Train until so many iterations are done.

        Raises:
            NonFiniteLoss: as soon as a loss, a gradient or, at the end, a weight is not finite.
        """
        start = time.perf_counter()
        try:
            for done in range(int(self.gan.iteration), until):
                self._train_once(done)
            if spoilt := self.gan.spoilt():
                raise NonFiniteLoss(spoilt)
        finally:
            self.seconds += time.perf_counter() - start

    def look(self, look: Look) -> None:
        """Evaluate the networks as they are.

        Raises:
            NonFiniteLoss: if samples are not finite.
        """
        self.measured += evaluate(self.gan, self.images.data, look, self.also)
        self.probed += probe(self.gan, self.images.data.batch(self.probed_rows), look.probes)

    def _train_once(self, done: int) -> None:
        gan, images = self.gan, self.images(done)
        labels = self.images.labels(done) if gan.settings.classes else None
        if needs_reference(gan.discriminator):
            set_reference(gan.discriminator, images)
        schedule = torch.tensor(schedule_at(gan.settings, done, self.run.iterations), dtype=torch.float64).to(images)
        gan.seed_layers(done)
        draws = self._draws.seeded(rng.key(gan.settings.seed, rng.Stream.ITERATION, done))
        observed = self._iterate(images, Schedule(*schedule), draws, labels)
        gan.iteration.add_(1)
        check_observed(observed, done + 1)


def check_observed(observed: Observed, iteration: int) -> None:
    """Refuse losses and gradients that are not finite.

    Raises:
        NonFiniteLoss: naming the first of them, and the iteration.
    """
    for name in ("d_loss", "g_loss", "d_grad_norm", "g_grad_norm"):
        value = getattr(observed, name)
        if not value.isfinite():  # a CPU-GPU sync point
            raise NonFiniteLoss(f"{name} is {float(value)} at iteration {iteration}")


# Looking at it --------------------------------------------------------------------------------------------------------


def evaluate(gan: GAN, data: Data, look: Look, also: Sequence[AlsoRunning] = (), member: int | None = None) -> list[Entry]:
    """Return the entries of Result.measured of a look: for raw weights and, where there is one, their average.

    Samples are of the same latents in every run, in evaluation mode by running statistics. In a whole look a batch-normalized
    G is also sampled by batch and precise statistics, and by running statistics of other momenta, whose entries say `momentum`;
    what takes long to measure, such as coverage, is measured of the first of these alone.

    Args:
        gan: the networks, which are left as they are.
        data: of the task.
        look: what is measured.
        also: running statistics of other momenta.
        member: which run of an ensemble the GAN is, if `also` is an ensemble's.

    Raises:
        NonFiniteLoss: if samples are not finite.
    """
    entries: list[Entry] = []
    networks: dict[Weights, nn.Module | None] = {"raw": gan.generator, "ema": gan.generator_ema}
    for weights, network in networks.items():
        if network is None:
            continue
        for statistics, other in _samplings(gan, look, also):
            with nullcontext() if other is None else other.within(network, member):
                samples = draw_samples(gan, look.samples, weights, statistics)
            said = {"iteration": look.iteration, "weights": weights, "statistics": statistics, "samples": look.samples}
            momentum = {} if other is None else {"momentum": other.momentum}
            whole = look.whole and statistics == "running" and other is None
            entries.append(said | momentum | data.measure(samples.unsqueeze(0), whole=whole)[0])
    return entries


def _samplings(gan: GAN, look: Look, also: Sequence[AlsoRunning]) -> list[tuple[EvalStatistics, AlsoRunning | None]]:
    """Return by which statistics, and of which other momentum, samples are normalized in a look."""
    if not look.whole or not any(batch_norm_layers(gan.generator)):
        return [("running", None)]
    return [*((statistics, None) for statistics in EVAL_STATISTICS), *(("running", other) for other in also)]


def draw_samples(gan: GAN, count: int, weights: Weights, statistics: EvalStatistics) -> Tensor:
    """Return samples (count, C, H, W), whose numbers and latents are the same in every run.

    Raises:
        NonFiniteLoss: if they are not finite.
    """
    with gan.sampler(weights, statistics) as sampler:
        parts = [sampler.samples(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]
    samples = torch.cat(parts)
    if not samples.isfinite().all():
        raise NonFiniteLoss(f"samples have NaN or infinite values at iteration {int(gan.iteration)}")
    return samples


def save_picture(gan: GAN, data: Data, path: Path) -> None:
    """Write a PNG of samples of G as it is, not of its average, by running statistics; its folder is made.

    Raises:
        NonFiniteLoss: if they are not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(data.picture(draw_samples(gan, data.pictured, "raw", "running")), path)
