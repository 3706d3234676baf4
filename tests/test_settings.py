"""Which settings and batches are refused, and in which words."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from bngan.errors import UsageError
from bngan.settings import Settings, check_batch, check_settings
from tests.test_gan import tiny


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    """The settings of a GAN that can be trained."""
    return dict(tiny().hparams)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"g_lr": 0.0}, "g_lr must be above 0, got 0.0"),
        ({"d_lr": math.inf}, "d_lr must be above 0, got inf"),
        ({"d_lr": math.nan}, "d_lr must be above 0, got nan"),
        ({"g_clip": 0.0}, "g_clip must be above 0"),
        ({"d_clip": -1.0}, "d_clip must be above 0"),
        ({"instance_noise_end": 0.0}, "instance_noise_end must be above 0"),
        ({"bn_eps": 0.0}, "bn_eps must be above 0"),
        ({"instance_noise": -0.1}, "instance_noise must be at least 0"),
        ({"r1": -1.0}, "r1 must be at least 0"),
        ({"r2": math.inf}, "r2 must be at least 0"),
        ({"gradient_penalty": math.nan}, "gradient_penalty must be at least 0"),
        ({"n_critic": 0}, "n_critic must be at least 1"),
        ({"ghost_groups": 0}, "ghost_groups must be at least 1"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\)"),
        ({"bn_momentum": 0.0}, "bn_momentum must be above 0 and at most 1"),
        ({"bn_momentum": 1.1}, "bn_momentum must be above 0 and at most 1"),
        ({"lr_decay_start": 1.1}, r"lr_decay_start must be in \[0, 1\]"),
        ({"batching": "mixed"}, "unknown batching 'mixed'; choose from joint, separate"),
        ({"ema_buffers": "recalibrate"}, "unknown ema_buffers 'recalibrate'; choose from copy, average, precise"),
        ({"eval_statistics": "moving"}, "unknown eval_statistics 'moving'; choose from running, batch, precise"),
        *(
            ({"d_norm": norm, penalty: 0.1}, f"d_norm '{norm}' cannot be combined with r1, r2 or gradient_penalty")
            for norm in ("batch", "reference", "ghost")
            for penalty in ("r1", "r2", "gradient_penalty")
        ),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], answer: str, sound: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=answer):
        check_settings(Settings(**{**sound, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"g_clip": None, "d_clip": 0.1},
        {"beta1": 0.0, "ema_decay": 0.0, "label_smoothing": 0.0},
        {"bn_momentum": 1.0, "lr_decay_start": 1.0, "instance_noise_end": 2.0},
        {"lr_decay_start": 0.0, "instance_noise": 0.0},
        {"d_norm": "layer", "r1": 0.1, "r2": 0.1, "gradient_penalty": 0.1},
        {"g_norm": "batch", "d_norm": "virtual", "r1": 0.1},
    ],
)
def test_settings_at_the_ends_of_their_ranges_are_taken(settings: dict[str, Any], sound: dict[str, Any]) -> None:
    check_settings(Settings(**{**sound, **settings}))


def answering(answer: str | None) -> AbstractContextManager[object]:
    return nullcontext() if answer is None else pytest.raises(UsageError, match=answer)


@pytest.mark.parametrize(
    ("size", "ranks", "groups", "synchronized", "answer"),
    [
        (2, 1, None, True, None),
        (1, 1, None, True, r"at least 2 images at a time on each device, and here has 1: raise --data.batch_size$"),
        (4, 2, None, True, None),
        (4, 2, None, False, None),
        (2, 2, None, False, "at least 2 images at a time on each device, and here has 1"),
        (4, 1, 1, True, None),
        (4, 2, 1, True, "a multiple of 2 where they are normalized together"),  # one group of two ranks' rows is on neither
        (4, 2, 1, False, None),
        (8, 1, 4, True, None),
        (8, 2, 4, True, None),
        (4, 1, 4, True, "and here has 1: raise --data.batch_size or lower --model.ghost_groups$"),
        (10, 1, 4, True, "ghost_groups 4 must divide the 10 images of --data.batch_size"),
        (12, 2, 3, True, "a multiple of 2 where they are normalized together"),
        (12, 2, 3, False, None),  # each rank cuts its 6 images into 3 groups
        (128, 2, 64, True, None),
        (128, 2, 64, False, "and here has 1: raise --data.batch_size or lower --model.ghost_groups$"),
    ],
)
def test_batches_that_batch_norm_cannot_be_trained_on_are_refused(
    size: int, ranks: int, groups: int | None, synchronized: bool, answer: str | None
) -> None:
    with answering(answer):
        check_batch(size, ranks, groups, synchronized=synchronized)
