"""Draws are functions of what they are for."""

import itertools
import random

import torch
from torch import Tensor

from bngan.rng import Stream, generator, key, normal, sample_latents


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def distance_from_normal(values: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic times sqrt(n): above 1.95 in 1 of 1000 samples of a standard normal."""
    ordered = values.double().flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((torch.special.ndtr(ordered) - steps).abs().max() * len(ordered) ** 0.5)


def test_a_draw_does_not_depend_on_draws_before_it() -> None:
    first = normal((4, 3), 7, Stream.ITERATION, 1)
    normal((100,), 7, Stream.PRECISE, 1)
    torch.manual_seed(123)
    torch.randn(10)
    assert equal(normal((4, 3), 7, Stream.ITERATION, 1), first)
    ordinary = torch.Generator().manual_seed(7)
    assert not equal(torch.randn(4, 3, generator=ordinary), torch.randn(4, 3, generator=ordinary))


def test_a_draw_leaves_torchs_own_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(5)
    torch.manual_seed(0)
    normal((4, 3), 7, Stream.ITERATION, 1)
    sample_latents(0, 100, latent_dim=4, seed=0)
    assert equal(torch.randn(5), expected)


def test_on_a_processor_32_bits_of_a_seed_count() -> None:
    """So that of n seeds about n^2 / 2^33 pairs coincide, as the docstring of Stream says."""
    seed = key(7, Stream.ITERATION, 1)
    draws = [torch.randn(8, generator=torch.Generator().manual_seed(number)) for number in (seed, seed & 0xFFFFFFFF)]
    assert equal(*draws)
    assert not equal(draws[0], torch.randn(8, generator=torch.Generator().manual_seed(seed ^ 1)))

    def pairs(iterations: int, seed: int) -> int:
        kept = {key(seed, Stream.ITERATION, iteration) & 0xFFFFFFFF for iteration in range(iterations)}
        return iterations - len(kept)

    found = sum(pairs(100_000, seed) for seed in range(10))  # 12 expected, with a deviation of 3.4
    assert 2 <= found <= 24


def test_every_part_of_the_key_counts_and_so_does_their_order() -> None:
    keys = [
        (),
        (0,),
        (0, 0),
        (0, 0, 0),
        (1,),
        (-1,),
        (1, 0),
        (0, 1),
        (1, 2, 3),
        (3, 2, 1),
        (2**40,),
        (2**40 + 1,),
        *((seed, stream, iteration, rank) for seed in (0, 1) for stream in Stream for iteration in (4, 5) for rank in (0, 1)),
    ]
    draws = {tuple(normal((4,), *key).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert len({tuple(normal((4,), *key).tolist()) for key in keys}) == len(draws)


def test_streams_have_numbers_of_their_own() -> None:
    # Two names for one number are one member, which only __members__ tells.
    for one, other in itertools.combinations(Stream.__members__.values(), 2):
        assert not equal(normal((8,), 0, one, 3), normal((8,), 0, other, 3))


def test_draws_with_neighbouring_keys_are_uncorrelated() -> None:
    count = 4096
    draws = torch.stack([normal((count,), 0, Stream.ITERATION, iteration) for iteration in range(8)])
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 5 / count**0.5
    assert torch.corrcoef(torch.stack([draws[0], draws[0] + draws[1]]))[0, 1] > 5 / count**0.5


def test_normal_has_its_shape_and_distribution() -> None:
    drawn = normal((50, 200), 3, Stream.PRECISE, 9)
    assert drawn.shape == (50, 200)
    assert drawn.dtype == torch.float32
    assert distance_from_normal(drawn) < 1.95
    uniform = torch.rand(50, 200, generator=generator(3)) * 12**0.5 - 3**0.5  # with mean 0 and variance 1 as well
    assert distance_from_normal(uniform) > 1.95


# Latents of samples ---------------------------------------------------------------------------------------------------


def test_any_split_of_the_samples_gives_the_same_latents() -> None:
    whole = sample_latents(0, 300, latent_dim=5, seed=11)
    assert whole.shape == (300, 5)
    chooser = random.Random(0)
    ends = [0, 1, 63, 64, 65, 127, 128, 129, 192, 299, 300]
    pairs = list(itertools.combinations_with_replacement(ends, 2))
    pairs += [tuple(sorted((chooser.randrange(301), chooser.randrange(301)))) for _ in range(60)]
    for start, stop in pairs:
        assert equal(sample_latents(start, stop, latent_dim=5, seed=11), whole[start:stop]), (start, stop)
    # What a generator restarted for each split would give.
    assert not equal(sample_latents(0, 10, latent_dim=5, seed=11), whole[10:20])


def test_latents_of_different_samples_and_seeds_differ() -> None:
    whole = sample_latents(0, 300, latent_dim=5, seed=11)
    assert len(whole.unique(dim=0)) == 300
    other = sample_latents(0, 300, latent_dim=5, seed=12)
    assert len(torch.cat([whole, other]).unique(dim=0)) == 600


def test_latents_are_standard_normal() -> None:
    latents = sample_latents(0, 2000, latent_dim=10, seed=0)
    assert distance_from_normal(latents) < 1.95
    assert distance_from_normal(latents * 1.1) > 1.95
    assert (torch.corrcoef(latents.T) - torch.eye(10)).abs().max() < 5 / 2000**0.5
