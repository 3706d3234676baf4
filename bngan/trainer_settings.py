"""Which of the Trainer's settings a GAN can do with, and what to use in the place of the others."""

import os
import pkgutil
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy

# Settings that manual optimization or bngan's own callbacks leave no room for: what may be given, and what to use.
TAKEN: dict[str, tuple[tuple[object, ...], str]] = {
    "gradient_clip_val": ((None,), "cannot tell G from D; use --model.g_clip and --model.d_clip"),
    "gradient_clip_algorithm": ((None,), "cannot tell G from D; --model.g_clip and --model.d_clip limit the norm"),
    "accumulate_grad_batches": ((1,), "cannot tell G from D; use --model.accumulate"),
    "use_distributed_sampler": ((False,), "would deal the images out once more, after bngan has; leave it out"),
    "enable_checkpointing": (
        (None, True),
        "false would leave out what also stops a run on Ctrl-C; --trainer.fast_dev_run true writes nothing",
    ),
    "barebones": (
        (False,),
        "leaves out the callbacks that measure and save; set what you mean, such as --trainer.logger false",
    ),
    "model_registry": (
        (None,),
        "takes the checkpoints of a ModelCheckpoint, which bngan does not use; upload best.ckpt yourself",
    ),
    "overfit_batches": ((0, 0.0), "is not possible with bngan's loaders; use --trainer.limit_train_batches"),
}
SPLIT = "cuts a network up over devices, and these fit on any; use ddp"
TPU = "is for TPUs, where bngan was never run; use auto for one device, or ddp"
# Strategies that Lightning knows and bngan does not take, by how their names or their classes' names begin.
STRATEGIES_REFUSED = {
    "fsdp": SPLIT,
    "deepspeed": SPLIT,
    "modelparallel": SPLIT,
    "xla": TPU,
    "single_xla": TPU,
    "single_tpu": TPU,
    "singledevicexla": TPU,
    "single": "is what auto takes for one device; use auto",
}
STRATEGIES = "auto, ddp, ddp_spawn, ddp_fork, ddp_notebook, each ddp also with _find_unused_parameters_true, or a DDPStrategy"
DDP_NAME = r"ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?"
PRECISIONS = "32-true, 64-true, bf16-mixed, and 16-mixed on a GPU"
HALF = "would keep weights and running statistics in 16 bits, where small updates and the moving average are rounded away"
PRECISIONS_REFUSED = {
    "bf16-true": f"{HALF}; use bf16-mixed",
    "16-true": f"{HALF}; use 16-mixed on a GPU, or bf16-mixed",
    "transformer-engine": "speeds up transformers' layers, and there are none; use bf16-mixed",
    "transformer-engine-float16": "speeds up transformers' layers, and there are none; use 16-mixed on a GPU, or bf16-mixed",
}
AVERAGE = "averages D as well, by steps of two optimizers; use --model.ema_decay"
# Lightning's callbacks that do not work here, or not as their name says, and what to use.
CALLBACKS_REFUSED: tuple[tuple[type, str], ...] = (
    (
        callbacks.Checkpoint,
        "would save buffers that the devices do not agree on; use --checkpoint.every_n_iterations, --checkpoint.monitor, "
        "--checkpoint.mode and --checkpoint.keep_all",
    ),
    (callbacks.WeightAveraging, AVERAGE),
    (callbacks.StochasticWeightAveraging, AVERAGE),
    (callbacks.GradientAccumulationScheduler, "cannot tell G from D; use --model.accumulate"),
    (callbacks.BaseFinetuning, "thaws a trained backbone, and a GAN has none; leave it out"),
    (callbacks.LearningRateFinder, "looks for one learning rate, and there are two; set --model.g_lr and --model.d_lr"),
    (callbacks.BatchSizeFinder, "would change what a GAN learns; set --data.batch_size, and --model.accumulate to save memory"),
    (callbacks.LearningRateMonitor, "looks at schedulers; bngan logs train/g_lr, and D's falls alike"),
    (callbacks.ModelPruning, "replaces the weights that the optimizers hold; set --model.hidden_dim"),
    (callbacks.Timer, "cannot be recorded in config.yaml; use --trainer.max_time"),
    (callbacks.ProgressBar, "would be a second bar; --trainer.enable_progress_bar false turns off bngan's own"),
    (callbacks.ThroughputMonitor, "counts samples and steps of one optimizer; bngan prints images/s itself"),
)
PROFILERS = ("simple", "advanced", "pytorch")
PLAIN = (type(None), bool, int, float, str, Enum, Path, timedelta, torch.device, torch.dtype)


def check_trainer_settings(trainer: Namespace) -> None:
    """Refuse Trainer settings that mean nothing here or would run code, naming what to use.

    Raises:
        ValueError: naming the setting, the reason, and another setting.
    """
    for name, (allowed, reason) in TAKEN.items():
        if trainer[name] not in allowed:
            raise ValueError(f"--trainer.{name} {reason}")
    _check_length(trainer)
    named = [
        (f"--trainer.{name}", given)
        for name in ("callbacks", "logger", "plugins", "strategy", "accelerator", "profiler")
        for given in as_list(trainer[name])
        if not isinstance(given, bool | str)
    ]
    for setting, given in named:
        _check_names_a_class(setting, given)
    on_processor = _check_devices(trainer.accelerator, trainer.devices)
    _check_strategy(trainer.strategy)
    _check_precision(trainer.precision, on_processor=on_processor)
    for given in as_list(trainer.callbacks):
        for kind, reason in CALLBACKS_REFUSED:
            if issubclass(_class(given), kind):
                raise ValueError(f"--trainer.callbacks {_class(given).__name__} {reason}")
    for given in as_list(trainer.plugins):
        _check_plugin(given)
    for setting, given in named:
        _check_plain_values(setting, given)
    if isinstance(trainer.profiler, str) and trainer.profiler not in PROFILERS:
        raise ValueError(f"--trainer.profiler {trainer.profiler!r} is not allowed; choose from {', '.join(PROFILERS)}")
    _check_nodes(trainer.num_nodes)


def _check_length(trainer: Namespace) -> None:
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} 0 leaves nothing to train; give 1 or more")
    if trainer.check_val_every_n_epoch == 0:
        raise ValueError(
            "--trainer.check_val_every_n_epoch must be at least 1; --trainer.limit_val_batches 0 turns validation off"
        )
    if trainer.num_sanity_val_steps is not None and trainer.num_sanity_val_steps < -1:
        raise ValueError(
            f"--trainer.num_sanity_val_steps must be at least 0, or -1 for all, got {trainer.num_sanity_val_steps}"
        )
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        raise ValueError(f"--trainer.log_every_n_steps must be at least 0, got {trainer.log_every_n_steps}")
    if not isinstance(trainer.val_check_interval, int | float | None):
        raise ValueError(
            f"--trainer.val_check_interval {trainer.val_check_interval} would be told by each device's own clock, and they "
            "would wait for one another; give a number of batches, or a share of an epoch such as 0.5"
        )


def _check_devices(accelerator: Any, devices: Any) -> bool:
    """Return whether training is on the processor."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
        raise ValueError(f"--trainer.accelerator {accelerator!r} is not allowed; choose from auto, cpu, gpu, cuda, mps")
    on_processor = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_processor and not (devices == "auto" or re.fullmatch(r"\d+", str(devices))):
        raise ValueError(f"--trainer.devices {devices} is not allowed; on processors give a number, 1 or more, or auto")
    return on_processor


def _check_strategy(strategy: Any) -> None:
    named = isinstance(strategy, str)
    if not named and {**(strategy.get("init_args") or {}), **(strategy.get("dict_kwargs") or {})}.get("static_graph"):
        raise ValueError("--trainer.strategy static_graph is for gradients that DDP sends, and bngan sends them; leave it out")
    if strategy == "auto" or (re.fullmatch(DDP_NAME, strategy.lower()) if named else issubclass(_class(strategy), DDPStrategy)):
        return
    name = strategy if named else _class(strategy).__name__
    for beginning, reason in STRATEGIES_REFUSED.items():
        if name.lower().replace("model_parallel", "modelparallel").startswith(beginning):
            raise ValueError(f"--trainer.strategy {name} {reason}")
    raise ValueError(f"unknown --trainer.strategy {name}; choose from {STRATEGIES}")


def _check_precision(precision: Any, *, on_processor: bool) -> None:
    if precision in PRECISIONS_REFUSED:
        raise ValueError(f"--trainer.precision {precision} {PRECISIONS_REFUSED[precision]}")
    if precision in (16, "16", "16-mixed") and on_processor:
        raise ValueError(
            f"--trainer.precision {precision} needs a GPU, and Lightning would take bf16-mixed in its place; say "
            "--trainer.precision bf16-mixed"
        )


def _check_plugin(plugin: Any) -> None:
    kind = _class(plugin)
    if issubclass(kind, ClusterEnvironment):
        return
    for word, reason in (
        ("Precision", f"use --trainer.precision: {PRECISIONS}"),
        ("CheckpointIO", "bngan writes checkpoints itself, whole or not at all; see --checkpoint"),
        ("Sync", "use --trainer.sync_batchnorm"),
    ):
        if word in kind.__name__:
            raise ValueError(f"--trainer.plugins {kind.__name__} is not possible: {reason}")
    raise ValueError(f"--trainer.plugins {kind.__name__} is not possible: only a ClusterEnvironment is")


def _check_nodes(num_nodes: int) -> None:
    launchers = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    if num_nodes > 1 and "MASTER_ADDR" not in os.environ and not any(kind.detect() for kind in launchers):
        raise ValueError(
            f"--trainer.num_nodes {num_nodes} would wait for machines that nothing starts: use torchrun or SLURM, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine"
        )


# Settings name classes and hold plain values -----------------------------------------------------------------------------


def _check_names_a_class(setting: str, given: Any) -> None:
    """Refuse functions that return an object, and objects that a module has ready."""
    if not isinstance(given, Namespace) or not isinstance(_resolved(given.class_path), type):
        what = given.class_path if isinstance(given, Namespace) else given
        raise ValueError(f"{setting} must name a class, and {what} is none")


def _check_plain_values(setting: str, given: Namespace) -> None:
    """Refuse what would call more than a named class with plain values: functions, and classes within its arguments."""
    parameters = signature(_class(given)).parameters
    for group in ("init_args", "dict_kwargs"):
        for name, value in _leaves(given.get(group) or {}):
            own = name in parameters and value is parameters[name].default
            if not own and (not isinstance(value, PLAIN) or name.endswith("class_path")):
                raise ValueError(
                    f"{setting} {given.class_path}: {name} would run code ({value}); settings may hold numbers, words and "
                    "lists of them"
                )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of everything that is no mapping, list, tuple or set."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _class(given: Any) -> type:
    return _resolved(given.class_path)


def _resolved(path: str) -> Any:
    return pkgutil.resolve_name(path)


def as_list(given: Any) -> list[Any]:
    """Return what a setting holds that may be nothing, one thing, or a list of them."""
    return given if isinstance(given, list) else [] if given is None else [given]
