"""Which settings have an effect: on a command, and beside the other settings?"""

from inspect import signature

from jsonargparse import Namespace

from bngan.callbacks import BatchNormStatistics, CheckpointSaver, MeasureSamples, SampleImages
from bngan.distributed import print0
from bngan.errors import UsageError
from bngan.networks import LAYOUTS
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
    for names, is_idle, reason in rules(config):
        for name in names.split() if is_idle else ():
            if name in changed:
                line = f"{name} {changed[name]} has no effect where {reason}"
                if name in typed:
                    raise UsageError(f"--{line}; leave it out, or change that")
                print0(line)


def rules(config: Namespace) -> tuple[tuple[str, bool, str], ...]:
    """Return settings that do nothing beside some others, whether these are so in `config`, and that in words."""
    model, trainer = config.model, config.trainer
    norms, coupled = {model.g_norm, model.d_norm}, f"none of {', '.join(sorted(BATCH_COUPLED))}"
    in_batches = "model.batching model.update_d_stats_in_g_step model.allow_batch_coupled_penalty"
    intervals = "trainer.val_check_interval trainer.check_val_every_n_epoch trainer.num_sanity_val_steps"
    no_end = "neither trainer.max_time nor trainer.callbacks can stop the run early"
    histograms = "batchnorm.every_n_iterations batchnorm.histograms"
    measuring = "metrics.feature metrics.chunk metrics.seed metrics.mode_threshold"
    return (
        ("model.g_depth", model.network in LAYOUTS, f"network is {' or '.join(LAYOUTS)}"),
        (
            "model.initialization",
            model.network == "conv" and norms == {"none"},
            "network is conv without norms, which is so anyway",
        ),
        ("model.d_norm_first", model.d_norm in ("none", "spectral"), "d_norm is none or spectral"),
        ("model.bn_eps", norms.isdisjoint(BATCH_COUPLED | {"virtual"}), f"g_norm and d_norm are {coupled} or virtual"),
        (f"model.bn_momentum {histograms}", norms.isdisjoint(BATCH_COUPLED), f"g_norm and d_norm are {coupled}"),
        ("model.ghost_groups", "ghost" not in norms, "g_norm and d_norm are not ghost"),
        (in_batches, model.d_norm not in BATCH_COUPLED, f"d_norm is {coupled}"),
        ("model.eval_statistics model.ema_buffers", model.g_norm not in BATCH_COUPLED, f"g_norm is {coupled}"),
        ("model.ema_buffers", model.ema_decay == 0, "ema_decay is 0"),
        ("model.instance_noise_end", model.instance_noise == 0, "instance_noise is 0"),
        ("trainer.min_epochs trainer.min_steps", not trainer.callbacks and trainer.max_time is None, no_end),
        (intervals, trainer.limit_val_batches == 0, "trainer.limit_val_batches is 0"),
        (f"{histograms} trainer.log_every_n_steps", trainer.logger is False, "trainer.logger is false"),
        (measuring, config.metrics.num_samples == 0, "metrics.num_samples is 0"),
    )
