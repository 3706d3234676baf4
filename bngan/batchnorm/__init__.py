"""Batch normalization: the layers, which statistics normalize, and what they do to a GAN."""

from bngan.batchnorm.diagnostics import batch_dependence, kl_floor, kl_to_running, shift_blindness
from bngan.batchnorm.layers import (
    BatchNorm,
    GhostBatchNorm,
    ReferenceBatchNorm,
    VirtualBatchNorm,
    at_least_float32,
    batch_norm_layers,
    batch_statistics,
    ghost_groups,
    is_synchronized,
    local_batches,
    normalize,
    running_statistics,
    synchronize,
)
from bngan.batchnorm.statistics import (
    EVAL_STATISTICS,
    BatchStatistics,
    EvalStatistics,
    evaluation_statistics,
    frozen_statistics,
    recorded_statistics,
    set_precise_statistics,
)

__all__ = [
    "EVAL_STATISTICS",
    "BatchNorm",
    "BatchStatistics",
    "EvalStatistics",
    "GhostBatchNorm",
    "ReferenceBatchNorm",
    "VirtualBatchNorm",
    "at_least_float32",
    "batch_dependence",
    "batch_norm_layers",
    "batch_statistics",
    "evaluation_statistics",
    "frozen_statistics",
    "ghost_groups",
    "is_synchronized",
    "kl_floor",
    "kl_to_running",
    "local_batches",
    "normalize",
    "recorded_statistics",
    "running_statistics",
    "set_precise_statistics",
    "shift_blindness",
    "synchronize",
]
