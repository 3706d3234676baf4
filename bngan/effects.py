"""Which settings have an effect: on a command, and beside the other settings?"""

from collections.abc import Callable
from inspect import signature

from jsonargparse import Namespace

from bngan.callbacks import BatchNormStatistics, CheckpointSaver, MeasureSamples, SampleImages
from bngan.distributed import print0
from bngan.errors import UsageError
from bngan.norms import BATCH_COUPLED
from bngan.recipes import DEFAULT_CONFIG, flatten, read_config

TRAINING = {
    *(f"trainer.{name}" for name in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches")),
    *(f"trainer.{name}" for name in ("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps")),
    *(f"trainer.{name}" for name in ("log_every_n_steps", "detect_anomaly")),
    *(f"images.{name}" for name in signature(SampleImages).parameters),
    *(f"batchnorm.{name}" for name in signature(BatchNormStatistics).parameters),
    *(f"checkpoint.{name}" for name in signature(CheckpointSaver).parameters),
}
METRICS = {f"metrics.{name}" for name in signature(MeasureSamples).parameters}
VAL, TEST, PREDICT = (f"trainer.limit_{stage}_batches" for stage in ("val", "test", "predict"))
# Settings that do nothing in a command.
IDLE_IN = {
    "fit": {TEST, PREDICT},
    "validate": TRAINING | {TEST, PREDICT},
    "test": TRAINING | {VAL, PREDICT},
    "predict": TRAINING | METRICS | {VAL, TEST},
}

Norms = frozenset[str]
COUPLED = f"none of {', '.join(sorted(BATCH_COUPLED))}"
# Settings of a network's norms: these settings, whose norms they are of, which norms have them, and what lacks in words.
OF_NORMS: tuple[tuple[str, str, Norms, str], ...] = (
    ("model.bn_eps", "g_norm d_norm", BATCH_COUPLED | {"virtual"}, f"{COUPLED} or virtual"),
    ("model.bn_momentum batchnorm.every_n_iterations batchnorm.histograms", "g_norm d_norm", BATCH_COUPLED, COUPLED),
    ("model.ghost_groups", "g_norm d_norm", frozenset({"ghost"}), "not ghost"),
    ("model.batching model.update_d_stats_in_g_step", "d_norm", BATCH_COUPLED, COUPLED),
    ("model.eval_statistics model.ema_buffers", "g_norm", BATCH_COUPLED, COUPLED),
)
# Other settings that do nothing beside some: these settings, when, and that in words.
IDLE: tuple[tuple[str, Callable[[Namespace], bool], str], ...] = (
    ("model.ema_buffers", lambda config: config.model.ema_decay == 0, "ema_decay is 0"),
    ("model.instance_noise_end", lambda config: config.model.instance_noise == 0, "instance_noise is 0"),
    (
        "trainer.min_epochs trainer.min_steps",
        lambda config: not config.trainer.callbacks and config.trainer.max_time is None,
        "neither trainer.max_time nor trainer.callbacks can stop the run early",
    ),
    (
        "trainer.val_check_interval trainer.check_val_every_n_epoch trainer.num_sanity_val_steps",
        lambda config: config.trainer.limit_val_batches == 0,
        "trainer.limit_val_batches is 0",
    ),
    (
        "batchnorm.every_n_iterations batchnorm.histograms",
        lambda config: config.trainer.logger is False,
        "trainer.logger is false",
    ),
    (
        "metrics.feature metrics.chunk metrics.seed metrics.mode_threshold",
        lambda config: config.metrics.num_samples == 0,
        "metrics.num_samples is 0",
    ),
)


def check_effects(command: str, config: Namespace, given: Namespace, typed: Namespace) -> None:
    """Refuse a setting that was typed and does nothing; of one in a file say so, since files are laid one over the other.

    A setting that is as by default does no harm.

    Args:
        command: fit, validate, test or predict.
        config: all settings.
        given: those of the command line and of its files.
        typed: those of the command line.

    Raises:
        UsageError: naming the setting, and why it does nothing.
    """
    default = flatten(read_config(DEFAULT_CONFIG))
    changed = {name: value for name, value in config.items() if name in given and value != default.get(name)}
    for name in changed:
        if name in typed and name in IDLE_IN[command]:
            raise UsageError(f"--{name} has no effect on {command}; leave it out")
    for name, reason in _idle(config):
        if name in changed:
            line = f"{name} {changed[name]} has no effect where {reason}"
            if name in typed:
                raise UsageError(f"--{line}; leave it out, or change that")
            print0(line)


def _idle(config: Namespace) -> list[tuple[str, str]]:
    """Return the settings that do nothing beside the others, and why."""
    found = []
    for names, networks, having, lacking in OF_NORMS:
        norms = {network: config.model[network] for network in networks.split()}
        if not having.intersection(norms.values()):
            found += [(name, f"{' and '.join(norms)} {'is' if len(norms) == 1 else 'are'} {lacking}") for name in names.split()]
    for names, does_nothing, reason in IDLE:
        if does_nothing(config):
            found += [(name, reason) for name in names.split()]
    return found
