"""Joint and separate batches: what they share, and what they hide from a discriminator with batch norm."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bngan.batching import BATCHINGS, discriminate, of_classes, pack
from bngan.networks import Discriminator

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def changed_fakes(fakes: Tensor) -> Tensor:
    return 3 * fakes + torch.linspace(-2, 2, fakes.shape[1], dtype=fakes.dtype)


def logits_of(norm: str) -> Callable[[Tensor], Tensor]:
    return Discriminator(input_dim=20, hidden_dim=16, norm=norm).double().logits


def test_separate_batches_make_a_batch_normalized_discriminator_blind_to_shift_and_scale_of_the_fakes() -> None:
    logits = logits_of("batch")
    reals, fakes = torch.randn(2, 64, 20, dtype=torch.float64)
    before = discriminate(logits, reals, fakes, "separate")[1]
    after = discriminate(logits, reals, changed_fakes(fakes), "separate")[1]
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)  # up to eps, which does not scale along


def test_joint_batches_let_it_see_them() -> None:
    logits = logits_of("batch")
    reals, fakes = torch.randn(2, 64, 20, dtype=torch.float64)
    before = discriminate(logits, reals, fakes, "joint")[1]
    after = discriminate(logits, reals, changed_fakes(fakes), "joint")[1]
    assert (after - before).abs().max() > 0.1


def test_joint_and_separate_agree_without_batch_norm_alone() -> None:
    reals, fakes = torch.randn(40, 20, dtype=torch.float64), torch.randn(24, 20, dtype=torch.float64) + 1
    for norm, agree in (("none", True), ("layer", True), ("batch", False)):
        logits = logits_of(norm)
        joint, separate = discriminate(logits, reals, fakes, "joint"), discriminate(logits, reals, fakes, "separate")
        assert [len(part) for part in joint] == [40, 24]
        for a, b in zip(joint, separate, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10) == agree, norm


def test_joint_and_separate_logits_keep_real_before_fake() -> None:
    reals, fakes = torch.ones(3, 1), -torch.ones(2, 1)
    for batching in BATCHINGS:
        real_logits, fake_logits = discriminate(lambda images: 2 * images, reals, fakes, batching)
        assert_equal(real_logits, 2 * reals)
        assert_equal(fake_logits, 2 * fakes)


# Packs ----------------------------------------------------------------------------------------------------------------


def test_a_pack_has_its_images_channels_one_after_the_other() -> None:
    images = torch.randn(6, 3, 4, 5)
    packs = pack(images, 2)
    assert packs.shape == (3, 6, 4, 5)
    for first in range(3):
        assert_equal(packs[first], torch.cat([images[first], images[first + 3]]))
    assert pack(images, 1) is images


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_packs_of_one_process(ranks: int) -> None:
    images = torch.randn(24, 1, 2, 2)
    for rank in range(ranks):
        assert_equal(pack(images[rank::ranks], 4), pack(images, 4)[rank::ranks])
    assert not torch.equal(pack(images[:12], 4), pack(images, 4)[:3])


def test_images_that_fill_no_pack_are_left_out() -> None:
    images = torch.randn(7, 1, 2, 2)
    assert_equal(pack(images, 3), pack(images[:6], 3))
    assert len(pack(images[:2], 3)) == 0


def test_packs_of_many_runs_are_of_one_run_each() -> None:
    images = torch.randn(8, 5, 3, 4, 4)
    packs = pack(images, 2)
    assert packs.shape == (4, 5, 6, 4, 4)
    for run in range(5):
        assert_equal(packs[:, run], pack(images[:, run], 2))


@pytest.mark.parametrize("runs", [(), (5,)])
def test_fakes_are_of_the_classes_of_the_real_images_in_their_places(runs: tuple[int, ...]) -> None:
    seen: list[Tensor] = []

    def network(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return images

    labels = torch.randint(10, (4, *runs))
    images = torch.randn(4, *runs, 3)
    given = of_classes(network, labels)
    for batching in BATCHINGS:
        discriminate(given, images, images, batching)
    joint, real, fake = seen
    assert_equal(joint, torch.cat([labels, labels]))
    assert_equal(real, labels)
    assert_equal(fake, labels)


def test_network_without_classes_is_left_alone() -> None:
    logits = logits_of("batch")
    assert of_classes(logits, None) is logits
