"""What a run shows, measures and keeps."""

from bngan.callbacks.batchnorm import BatchNormStatistics
from bngan.callbacks.images import SampleImages
from bngan.callbacks.metrics import MeasureSamples
from bngan.callbacks.progress import RunProgress
from bngan.callbacks.saving import AtomicCheckpointIO, CheckpointSaver
from bngan.callbacks.tensorboard import TensorBoardLayout

__all__ = [
    "AtomicCheckpointIO",
    "BatchNormStatistics",
    "CheckpointSaver",
    "MeasureSamples",
    "RunProgress",
    "SampleImages",
    "TensorBoardLayout",
]
