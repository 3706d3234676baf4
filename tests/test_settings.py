"""Which settings and batches are refused, and in which words."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from bngan.errors import UsageError
from bngan.settings import Settings, check_batch, check_settings, check_update
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
        ({"g_steps": 0}, "g_steps must be at least 1"),
        ({"pack": 0}, "pack must be at least 1"),
        ({"g_depth": 0}, "g_depth must be at least 1"),
        ({"g_depth": 65}, "g_depth must be at least 1 and at most 64, got 65"),
        ({"image_shape": (1, 0, 4)}, "image_shape must be of numbers that are at least 1"),
        ({"minibatch_stddev": 1}, "minibatch_stddev must be 0 or at least 2, got 1"),
        ({"minibatch_stddev": -4}, "minibatch_stddev must be 0 or at least 2, got -4"),
        ({"d_norm": "virtual", "pack": 2}, "d_norm virtual cannot be combined with pack or minibatch_stddev"),
        ({"d_norm": "virtual", "minibatch_stddev": 4}, "d_norm virtual cannot be combined with pack or minibatch_stddev"),
        ({"classes": -1}, "classes must be at least 0, got -1"),
        ({"classes": 10, "pack": 2}, "classes 10 cannot be combined with pack 2: D judges a pack by one logit"),
        ({"initialization": "xavier"}, "unknown initialization 'xavier'; choose from default, he"),
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
            for norm in ("batch", "reference", "ghost", "noisy")
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
        {"g_norm": "virtual", "pack": 2, "minibatch_stddev": 2},
        {"g_depth": 64},
        {"g_depth": 1, "g_steps": 2, "initialization": "he", "d_norm_first": False},
        {"d_norm": "batch", "r1": 0.1, "r2": 0.1, "gradient_penalty": 0.1, "allow_batch_coupled_penalty": True},
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


@pytest.mark.parametrize(
    ("settings", "size", "ranks", "answer"),
    [
        ({}, 2, 1, None),
        ({}, 1, 1, "batch norm needs at least 2 images at a time on each device, and here has 1"),
        ({"g_norm": "layer", "d_norm": "none"}, 1, 1, None),
        ({"d_norm": "none", "pack": 3}, 6, 1, None),
        (
            {"g_norm": "none", "d_norm": "none", "pack": 3},
            8,
            1,
            "--data.batch_size 8 must be a multiple of 3, for --model.pack 3",
        ),
        ({"pack": 2}, 6, 2, "--data.batch_size 6 must be a multiple of 4, for --model.pack 2 on 2 devices"),
        ({"pack": 2}, 8, 2, None),
        # D has a row for a pack, and G for an image.
        (
            {"g_norm": "none", "pack": 2},
            2,
            1,
            "batch norm needs at least 2 packs of 2 images at a time on each device, and here has 1",
        ),
        ({"d_norm": "none", "pack": 2}, 2, 1, None),
        ({"d_norm": "ghost", "ghost_groups": 4, "pack": 2}, 8, 1, "and here has 1: raise --data.batch_size or lower"),
        ({"d_norm": "ghost", "ghost_groups": 4, "pack": 2}, 12, 1, "ghost_groups 4 must divide the 6 packs of 2 images"),
        ({"g_norm": "ghost", "ghost_groups": 4, "pack": 2}, 8, 1, None),
        ({"g_norm": "none", "d_norm": "none", "minibatch_stddev": 4}, 12, 1, None),
        (
            {"g_norm": "none", "d_norm": "none", "minibatch_stddev": 4},
            12,
            2,
            "4 must divide the 6 images that each of 2 devices has",
        ),
        (
            {"minibatch_stddev": 4, "pack": 2},
            12,
            1,
            "minibatch_stddev 4 must divide the 6 packs of 2 images that each of 1 devices",
        ),
        ({"minibatch_stddev": 3, "pack": 2}, 12, 1, None),
    ],
)
def test_updates_that_cannot_be_packed_grouped_and_normalized_are_refused(
    settings: dict[str, Any], size: int, ranks: int, answer: str | None, sound: dict[str, Any]
) -> None:
    with answering(answer):
        check_update(Settings(**{**sound, **settings}), size, ranks, synchronized=True)


def test_settings_of_a_checkpoint_from_before_mean_what_they_did(sound: dict[str, Any]) -> None:
    new = {"g_depth", "initialization", "d_norm_first", "minibatch_stddev", "pack", "allow_batch_coupled_penalty", "g_steps"}
    assert new < sound.keys()
    before = Settings(**{name: value for name, value in sound.items() if name not in new})
    assert before == Settings(**sound)
    assert before != Settings(**{**sound, "pack": 2})
