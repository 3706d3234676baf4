"""Learning rates, instance noise and the average's weight in chosen iterations of runs with and without an end."""

import math
from typing import Any

import pytest

from bngan.schedules import Schedule, Schedules


def schedules(**settings: Any) -> Schedules:
    constant = {
        "d_lr": 0.2,
        "g_lr": 0.1,
        "lr_decay_start": 1.0,
        "instance_noise": 0.0,
        "instance_noise_end": 1.0,
        "ema_decay": 0.0,
    }
    return Schedules(**{**constant, **settings})


@pytest.mark.parametrize(
    ("decay_start", "iteration", "fraction"),
    [
        (0.5, 0, 1.0),
        (0.5, 50, 1.0),
        (0.5, 51, 0.98),
        (0.5, 75, 0.5),
        (0.5, 99, 0.02),
        (0.5, 100, 0.0),
        (0.0, 0, 1.0),
        (0.0, 25, 0.75),
        (0.9, 89, 1.0),
        (0.9, 95, 0.5),
        (1.0, 99, 1.0),
        (1.0, 100, 1.0),
    ],
)
def test_learning_rates_fall_linearly_to_0_from_their_start(decay_start: float, iteration: int, fraction: float) -> None:
    found = schedules(lr_decay_start=decay_start).at(iteration, total=100)
    assert (found.d_lr, found.g_lr) == (pytest.approx(0.2 * fraction), pytest.approx(0.1 * fraction))


@pytest.mark.parametrize(
    ("end", "iteration", "fraction"),
    [
        (1.0, 0, 1.0),
        (1.0, 1, 0.99),
        (1.0, 50, 0.5),
        (1.0, 100, 0.0),
        (0.5, 25, 0.5),
        (0.5, 50, 0.0),
        (0.5, 80, 0.0),
        (2.0, 100, 0.5),
    ],
)
def test_instance_noise_falls_linearly_to_0_at_its_end(end: float, iteration: int, fraction: float) -> None:
    found = schedules(instance_noise=0.4, instance_noise_end=end).at(iteration, total=100)
    assert found.instance_noise == pytest.approx(0.4 * fraction)


@pytest.mark.parametrize(
    ("iteration", "weight"),
    [(0, 1.0), (1, 10 / 12), (2, 10 / 13), (89, 0.1), (988, 10 / 999), (9989, 0.001), (9990, 0.001), (10**6, 0.001)],
)
def test_average_spans_a_tenth_of_the_iterations_until_its_decay_takes_over(iteration: int, weight: float) -> None:
    for total in (1000, math.inf):
        assert schedules(ema_decay=0.999).at(iteration, total).ema_weight == pytest.approx(weight)
    assert schedules(ema_decay=0.5).at(iteration, total=1000).ema_weight == pytest.approx(max(weight, 0.5))


def test_nothing_falls_in_a_run_without_an_end() -> None:
    falling = schedules(lr_decay_start=0.0, instance_noise=0.4, instance_noise_end=0.1)
    first, late, ended = falling.at(0, math.inf), falling.at(10**9, math.inf), falling.at(100, total=100)
    assert first == late == Schedule(d_lr=0.2, g_lr=0.1, instance_noise=0.4, ema_weight=1.0)
    assert ended == Schedule(d_lr=0.0, g_lr=0.0, instance_noise=0.0, ema_weight=1.0)


def test_nothing_goes_below_0_where_a_run_is_longer_than_it_was_to_be() -> None:
    falling = schedules(lr_decay_start=0.5, instance_noise=0.4, ema_decay=0.9)
    longer = falling.at(150, total=100)
    assert longer == falling.at(100, total=100)._replace(ema_weight=longer.ema_weight)
    assert min(longer) == 0
