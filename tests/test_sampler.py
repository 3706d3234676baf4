"""Samples: from which weights, normalized by which statistics, and the same however they are cut up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngan import GAN, rng
from bngan.batchnorm.statistics import EVAL_STATISTICS, EvalStatistics
from bngan.errors import UsageError
from bngan.images import slerp
from bngan.sampler import Sampler, Weights
from tests.test_gan import images, tiny, trainer

WEIGHTS: tuple[Weights, ...] = ("raw", "ema")


def apart(a: Tensor, b: Tensor, by: float = 1e-3) -> bool:
    return bool((a - b).abs().max() > by)


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def trained(folder: Path, **settings: Any) -> GAN:
    gan = tiny(**{"g_lr": 0.05, "ema_decay": 0.9, **settings})
    trainer(folder, max_steps=20).fit(gan, images())
    gan.normalized_together.fill_(16)
    return gan


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> GAN:
    return trained(tmp_path_factory.mktemp("gan"))


def drawn(gan: GAN, weights: Weights | None, statistics: EvalStatistics | None, chunk: int = 40, start: int = 3) -> Tensor:
    stop = start + 40
    with gan.sampler(weights, statistics) as sampler:
        return torch.cat([sampler.samples(first, min(first + chunk, stop)) for first in range(start, stop, chunk)])


# By itself ------------------------------------------------------------------------------------------------------------


class Batched(nn.Module):
    """Adds the batch's mean to each of its latents; keeps the batches' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.sizes: list[int] = []

    def forward(self, z: Tensor) -> Tensor:
        self.sizes.append(len(z))
        return z * self.weight + z.mean()


def test_sampler_draws_numbered_samples_in_blocks() -> None:
    network = Batched()
    whole, blocks = Sampler(Batched(), (1, 2, 2), latent_dim=4), Sampler(network, (1, 2, 2), latent_dim=4, block=8)
    found = blocks.samples(5, 21, seed=3)
    assert found.shape == (16, 1, 2, 2)
    assert found.dtype == torch.float64
    assert network.sizes == [8, 8, 8]
    assert_close(found[:3], whole.samples(0, 8, seed=3)[5:])
    assert_close(found[3:11], whole.samples(8, 16, seed=3))
    assert apart(found, whole.samples(5, 21, seed=3))
    assert apart(found, blocks.samples(5, 21, seed=4))


@pytest.mark.parametrize("block", [None, 8])
def test_walk_changes_the_latent_alone(block: int | None) -> None:
    network = Batched()
    sampler = Sampler(network, (1, 2, 2), latent_dim=4, block=block)
    ends = torch.stack([rng.sample_latents(number, number + 1, 4, seed=3)[0] for number in (13, 22)]).double()
    latents = slerp(ends[:1], ends[1:], steps=5)
    found = sampler.walk(13, 22, steps=5, seed=3)
    assert network.sizes == ([5] if block is None else [8] * 5)
    mates = rng.sample_latents(8, 16, 4, seed=3).double()  # of sample 13
    batches = [latents] * 5 if block is None else [torch.cat([mates[:5], z[None], mates[6:]]) for z in latents]
    expected = torch.stack([z + batch.mean() for z, batch in zip(latents, batches, strict=True)]).view(5, 1, 2, 2)
    assert_close(found, expected)


# Of a GAN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_samples_are_the_same_however_they_are_cut_up(gan: GAN, weights: Weights, statistics: EvalStatistics) -> None:
    whole = drawn(gan, weights, statistics, chunk=64)
    assert whole.shape == (40, 1, 4, 4)
    for chunk in (1, 7):
        assert_close(drawn(gan, weights, statistics, chunk), whole)
    shifted = drawn(gan, weights, statistics, start=10)
    assert_close(shifted[:33], whole[7:])
    assert apart(shifted[:33], whole[:33])


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_walk_begins_at_its_first_sample_and_ends_at_its_last_where_company_does_not_matter(
    gan: GAN, statistics: EvalStatistics
) -> None:
    with gan.sampler(statistics=statistics) as sampler:
        walk = sampler.walk(19, 40, steps=10, seed=5)
        first, last = sampler.samples(19, 20, seed=5)[0], sampler.samples(40, 41, seed=5)[0]
    assert walk.shape == (10, 1, 4, 4)
    assert_close(walk[0], first, atol=1e-6)
    assert apart(walk[-1], last, by=1e-4) == (statistics == "batch")
    assert apart(walk[0], walk[1])
    assert apart(first, last)


def test_samples_differ_by_weights_and_by_statistics(gan: GAN) -> None:
    kinds = [drawn(gan, weights, statistics) for weights in WEIGHTS for statistics in EVAL_STATISTICS]
    for number, first in enumerate(kinds):
        for second in kinds[number + 1 :]:
            assert apart(first, second)


def test_samples_by_running_statistics_are_those_of_the_network_in_evaluation(gan: GAN) -> None:
    assert gan.generator_ema is not None
    for weights, network in zip(WEIGHTS, (gan.generator, gan.generator_ema), strict=True):
        with gan.sampler(weights, "running") as sampler:
            found = sampler.samples(0, 20, seed=5)
        expected = network.eval()(gan.sample_latents(0, 20, seed=5)).view(20, 1, 4, 4)
        network.train()
        assert_close(found, expected)


def test_sampling_leaves_the_gan_as_it_was(gan: GAN) -> None:
    before = {name: value.clone() for name, value in gan.state_dict().items()}
    modes = {name: module.training for name, module in gan.named_modules()}
    for weights in WEIGHTS:
        for statistics in EVAL_STATISTICS:
            drawn(gan, weights, statistics)
    assert all(torch.equal(gan.state_dict()[name], value) for name, value in before.items())
    assert {name: module.training for name, module in gan.named_modules()} == modes


def test_unset_weights_and_statistics_are_the_average_and_the_runs_policy(gan: GAN, tmp_path: Path) -> None:
    assert torch.equal(drawn(gan, None, None), drawn(gan, "ema", "running"))
    precise = trained(tmp_path, ema_decay=0.0, eval_statistics="precise")
    assert torch.equal(drawn(precise, None, None), drawn(precise, "raw", "precise"))
    assert apart(drawn(precise, None, None), drawn(precise, "raw", "running"))


def test_average_that_is_not_kept_cannot_be_sampled() -> None:
    without = tiny(ema_decay=0.0)
    with pytest.raises(UsageError, match=r"no average.*ema_decay is 0.*raw"), without.sampler("ema"):
        pass
    with tiny().sampler("ema") as sampler:
        assert sampler.samples(0, 2).shape == (2, 1, 4, 4)


def test_average_of_precise_buffers_is_sampled_by_precise_statistics(tmp_path: Path) -> None:
    precise, copied = trained(tmp_path, ema_buffers="precise"), trained(tmp_path, ema_buffers="copy")
    assert torch.equal(drawn(precise, "ema", None), drawn(precise, "ema", "precise"))
    assert_close(drawn(precise, "ema", None), drawn(copied, "ema", "precise"), atol=1e-6)
    assert apart(drawn(precise, "ema", None), drawn(copied, "ema", None))
    assert_close(drawn(precise, "ema", "running"), drawn(copied, "ema", "running"), atol=1e-6)
    assert apart(drawn(precise, "raw", "running"), drawn(precise, "raw", "precise"))


def test_samples_are_normalized_with_as_many_as_training_normalized_together() -> None:
    gan = tiny()
    for size in (8, 32):
        gan.normalized_together.fill_(size)
        with gan.sampler(statistics="batch") as sampler:
            assert sampler.block == size
            found = sampler.samples(0, 40, seed=2)
            assert_close(found[:size], sampler.generate(gan.sample_latents(0, size, seed=2)))
        with gan.sampler(statistics="running") as sampler:
            assert sampler.block is None


# By class -------------------------------------------------------------------------------------------------------------

CLASSES = 3


class Labelled(Batched):
    """Adds to each latent its label, ten times, and the mean of the batch's labels; keeps the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[Tensor] = []

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        self.labels.append(labels)
        return z * self.weight + 10 * labels.unsqueeze(dim=1) + labels.double().mean()


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> GAN:
    gan = tiny(g_lr=0.05, ema_decay=0.9, classes=CLASSES)
    loader = images()
    loader.labels = torch.arange(len(loader.labels)) % CLASSES
    trainer(tmp_path_factory.mktemp("conditional"), max_steps=20).fit(gan, loader)
    gan.normalized_together.fill_(16)
    return gan


@pytest.mark.parametrize("block", [None, 8])
def test_sample_i_is_of_class_i_mod_classes(block: int | None) -> None:
    network = Labelled()
    found = Sampler(network, (1, 2, 2), latent_dim=4, block=block, classes=CLASSES).samples(5, 21, seed=3)
    numbers = torch.arange(5, 21) if block is None else torch.arange(0, 24)
    assert torch.equal(torch.cat(network.labels), numbers % CLASSES)
    labels = torch.arange(5, 21) % CLASSES
    z = rng.sample_latents(5, 21, 4, seed=3)
    own = (found.flatten(start_dim=1) - z).mean(dim=1) - 10 * labels  # what its batch adds
    assert own.min() > 0.5
    assert own.max() < 1.5


@pytest.mark.parametrize("block", [None, 8])
def test_all_samples_are_of_the_class_that_is_asked_for(block: int | None) -> None:
    network = Labelled()
    sampler = Sampler(network, (1, 2, 2), latent_dim=4, block=block, classes=CLASSES)
    found, z = sampler.samples(5, 21, seed=3, label=2), rng.sample_latents(5, 21, 4, seed=3)
    added = (found.detach().flatten(start_dim=1) - z).mean(dim=1)
    if block is None:
        assert_close(
            added, torch.full((16,), 22.0, dtype=torch.float64)
        )  # all its mates are of class 2, which is nothing to it
    else:
        assert len(network.labels) == 3 * CLASSES
        assert {round(float(mean), 9) for mean in added - 20} <= {round((sum(range(3)) * 2 + k) / 8, 9) for k in range(4)}
    assert_close(sampler.samples(9, 12, seed=3, label=2), found[4:7])


def test_latents_alone_are_of_one_class_after_the_other() -> None:
    Sampler(network := Labelled(), (1, 2, 2), latent_dim=4, classes=CLASSES).generate(torch.zeros(5, 4))
    assert network.labels[0].tolist() == [0, 1, 2, 0, 1]


def test_walk_stays_in_one_class() -> None:
    for block in (None, 8):
        for label, expected in ((None, 13 % CLASSES), (0, 0)):
            network = Labelled()
            sampler = Sampler(network, (1, 2, 2), latent_dim=4, block=block, classes=CLASSES)
            sampler.walk(13, 22, steps=5, seed=3, label=label)
            if block is None:
                assert torch.equal(network.labels[0], torch.full((5,), expected))
            else:
                mates = torch.arange(8, 16) % CLASSES
                mates[5] = expected
                assert all(torch.equal(labels, mates) for labels in network.labels)


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_samples_of_a_class_are_among_those_of_all_classes(conditional: GAN, statistics: EvalStatistics) -> None:
    with conditional.sampler(statistics=statistics) as sampler:
        mixed = sampler.samples(0, 24)
        for label in range(CLASSES):
            found = sampler.samples(0, 24, label=label)
            assert_close(found[label::CLASSES], mixed[label::CLASSES])
            assert apart(found[(label + 1) % CLASSES :: CLASSES], mixed[(label + 1) % CLASSES :: CLASSES])
            assert_close(sampler.samples(5, 9, label=label), found[5:9])


def test_sampler_generates_what_the_gan_does(conditional: GAN) -> None:
    z, labels = conditional.sample_latents(0, 6), torch.tensor([2, 2, 0, 1, 1, 0])
    with conditional.sampler("raw", "running") as sampler:
        assert_close(sampler.generate(z, labels), conditional.generate(z, labels))
        assert_close(sampler.generate(z), conditional.generate(z, torch.arange(6) % CLASSES))
        assert apart(sampler.generate(z), sampler.generate(z, labels))


@pytest.mark.parametrize(
    ("classes", "label", "answer"), [(0, 3, r"class 3.*without --model.classes"), (10, 10, "0 to 9"), (10, -1, "0 to 9")]
)
def test_class_that_there_is_not_is_refused(classes: int, label: int, answer: str) -> None:
    sampler = Sampler(Batched(), (1, 2, 2), latent_dim=4, classes=classes)
    for draw in (lambda: sampler.samples(0, 2, label=label), lambda: sampler.walk(0, 1, 2, label=label)):
        with pytest.raises(UsageError, match=answer):
            draw()
