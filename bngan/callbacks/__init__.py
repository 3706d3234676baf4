"""What a run shows, measures and keeps."""

from bngan.callbacks.checkpoints import Checkpoints, WholeCheckpoints
from bngan.callbacks.dashboard import Dashboard
from bngan.callbacks.images import SampleImages
from bngan.callbacks.progress import RunProgress
from bngan.callbacks.quality import Quality
from bngan.callbacks.statistics import BatchNormStatistics

__all__ = ["BatchNormStatistics", "Checkpoints", "Dashboard", "Quality", "RunProgress", "SampleImages", "WholeCheckpoints"]
