"""Learning rates, instance noise and the average's weight in chosen iterations of runs with and without an end."""

import math
from typing import Any

import pytest

from bngan.schedules import Schedule, jumps, schedule_at
from bngan.settings import Settings


def schedules(**settings: Any) -> Settings:
    constant = {
        "d_lr": 0.2,
        "g_lr": 0.1,
        "lr_decay_start": 1.0,
        "instance_noise": 0.0,
        "instance_noise_end": 1.0,
        "ema_decay": 0.0,
    }
    return Settings(**{**constant, **settings})


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
    found = schedule_at(schedules(lr_decay_start=decay_start), iteration, total=100)
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
    found = schedule_at(schedules(instance_noise=0.4, instance_noise_end=end), iteration, total=100)
    assert found.instance_noise == pytest.approx(0.4 * fraction)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999, 0.99999])
def test_each_iteration_weighs_in_the_average_by_its_age_and_what_it_began_with_does_not(decay: float) -> None:
    average, began_with, values = 0.0, 1.0, range(1, 301)
    for iteration, value in enumerate(values):
        weight = schedule_at(schedules(ema_decay=decay), iteration, total=math.inf).ema_weight
        average, began_with = (1 - weight) * average + weight * value, (1 - weight) * began_with
    weights = [decay ** (300 - value) for value in values]
    assert average == pytest.approx(sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights))
    assert began_with == 0


def test_no_decay_hides_behind_another() -> None:
    """A larger one spans more of any run, however short."""
    for iteration in (10, 1000, 9380, 100_000):
        weights = [schedule_at(schedules(ema_decay=d), iteration, math.inf).ema_weight for d in (0.99, 0.999, 0.9995, 0.9999)]
        assert weights == sorted(weights, reverse=True)
        assert len(set(weights)) == len(weights)
    assert schedule_at(schedules(ema_decay=0.999), 10**6, math.inf).ema_weight == pytest.approx(0.001)


def test_nothing_falls_in_a_run_without_an_end() -> None:
    falling = schedules(lr_decay_start=0.0, instance_noise=0.4, instance_noise_end=0.1)
    first, late, ended = (
        schedule_at(falling, 0, math.inf),
        schedule_at(falling, 10**9, math.inf),
        schedule_at(falling, 100, total=100),
    )
    assert first == late == Schedule(d_lr=0.2, g_lr=0.1, instance_noise=0.4, ema_weight=1.0)
    assert ended == Schedule(d_lr=0.0, g_lr=0.0, instance_noise=0.0, ema_weight=1.0)


def test_nothing_goes_below_0_where_a_run_is_longer_than_it_was_to_be() -> None:
    falling = schedules(lr_decay_start=0.5, instance_noise=0.4, ema_decay=0.9)
    longer = schedule_at(falling, 150, total=100)
    assert longer == schedule_at(falling, 100, total=100)._replace(ema_weight=longer.ema_weight)
    assert min(longer) == 0


@pytest.mark.parametrize(
    ("settings", "iteration", "before", "now", "said"),
    [
        ({}, 50, 100, 200, ""),
        ({"lr_decay_start": 0.5}, 75, 100, 100, ""),
        ({"lr_decay_start": 0.5}, 75, 100, 200, "d_lr from 0.1 to 0.2, g_lr from 0.05 to 0.1"),
        ({"lr_decay_start": 0.5}, 100, 100, math.inf, "d_lr from 0 to 0.2, g_lr from 0 to 0.1"),
        ({"lr_decay_start": 0.5}, 50, 100, 200, ""),
        ({"lr_decay_start": 0.5}, 50, 200, 100, ""),
        ({"lr_decay_start": 0.5}, 75, 200, 100, "d_lr from 0.2 to 0.1, g_lr from 0.1 to 0.05"),
        ({"instance_noise": 1.0}, 50, 100, 200, "instance_noise from 0.5 to 0.75"),
        ({"instance_noise": 1.0}, 0, 100, 200, ""),
        ({"instance_noise": 1.0, "ema_decay": 0.9}, 50, math.inf, math.inf, ""),
    ],
)
def test_what_jumps_where_a_run_gets_another_length_is_said_with_its_numbers(
    settings: dict[str, Any], iteration: int, before: float, now: float, said: str
) -> None:
    assert jumps(schedules(**settings), iteration, before, now) == said
