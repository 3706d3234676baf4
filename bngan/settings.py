"""Which settings of a GAN mean something?"""

import math
from typing import Any

from bngan.batching import BATCHINGS
from bngan.batchnorm import EVAL_STATISTICS
from bngan.ema import EMA_BUFFERS
from bngan.errors import UsageError
from bngan.norms import BATCH_COUPLED


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse numbers out of range and combinations without meaning.

    Raises:
        UsageError: naming the setting and what is allowed.
    """
    for name in ("g_lr", "d_lr", "g_clip", "d_clip", "instance_noise_end", "bn_eps"):
        if settings[name] is not None and not 0 < settings[name] < math.inf:
            raise UsageError(f"{name} must be above 0, got {settings[name]}")
    for name in ("r1", "r2", "gradient_penalty", "instance_noise"):
        if not 0 <= settings[name] < math.inf:
            raise UsageError(f"{name} must be at least 0, got {settings[name]}")
    for name in ("n_critic", "ghost_groups", "latent_dim"):
        if settings[name] < 1:
            raise UsageError(f"{name} must be at least 1, got {settings[name]}")
    for name in ("beta1", "beta2", "label_smoothing", "ema_decay"):
        if not 0 <= settings[name] < 1:
            raise UsageError(f"{name} must be in [0, 1), got {settings[name]}")
    if not 0 < settings["bn_momentum"] <= 1:
        raise UsageError(f"bn_momentum must be above 0 and at most 1, got {settings['bn_momentum']}")
    if not 0 <= settings["lr_decay_start"] <= 1:
        raise UsageError(f"lr_decay_start must be in [0, 1], got {settings['lr_decay_start']}")
    for name, allowed in (("batching", BATCHINGS), ("ema_buffers", EMA_BUFFERS), ("eval_statistics", EVAL_STATISTICS)):
        if settings[name] not in allowed:
            raise UsageError(f"unknown {name} {settings[name]!r}; choose from {', '.join(allowed)}")
    if settings["d_norm"] in BATCH_COUPLED and any(settings[name] for name in ("r1", "r2", "gradient_penalty")):
        raise UsageError(
            f"d_norm {settings['d_norm']!r} cannot be combined with r1, r2 or gradient_penalty: a gradient penalty is defined "
            "for each image by itself, but batch norm makes D's output for one image depend on the others; use --model.d_norm "
            "layer, group, spectral or none"
        )


def check_batch(size: int, ranks: int, groups: int | None, *, synchronized: bool) -> None:
    """Refuse batches of a size that batch norm cannot be trained on.

    Args:
        size: images per update over all ranks.
        ranks: number of ranks.
        groups: groups into which ghost batch norm cuts what it normalizes, None where there is none.
        synchronized: whether that is the ranks' images together.

    Raises:
        UsageError: if the batch cannot be cut into the groups, each on one rank, or if they are too small.
    """
    groups_on_all_ranks = ranks if groups is None else groups if synchronized else groups * ranks
    if groups is not None and (size % groups_on_all_ranks or groups_on_all_ranks % ranks):
        raise UsageError(
            f"--model.ghost_groups {groups} must divide the {size} images of --data.batch_size on {ranks} devices, and be a "
            f"multiple of {ranks} where they are normalized together (--trainer.sync_batchnorm true)"
        )
    if size // groups_on_all_ranks < 2:
        raise UsageError(
            f"batch norm needs at least 2 images at a time on each device, and here has {size // groups_on_all_ranks}: raise "
            "--data.batch_size" + (" or lower --model.ghost_groups" if groups is not None else "")
        )
