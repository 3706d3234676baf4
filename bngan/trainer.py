"""Which of the Trainer's settings can two raw optimizers honour?"""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch import Callback, LightningModule, callbacks
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.environments import LSFEnvironment, MPIEnvironment, SLURMEnvironment
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import distributed, nn

from bngan.batchnorm.layers import synchronize
from bngan.distributed import print0, world_size
from bngan.errors import UsageError, check_at_least
from bngan.rendezvous import check_meeting_place, launched

LEAVE_OUT = "bngan has no choice of it; leave it out"
# Settings of Lightning's Trainer that are not here, and what to use in their place.
COUNTERPARTS = {
    "gradient_clip_val": "it cannot tell G from D; use --model.g_clip and --model.d_clip",
    "gradient_clip_algorithm": "it cannot tell G from D; --model.g_clip and --model.d_clip limit the norm",
    "accumulate_grad_batches": "with batch norm it is another experiment: normalize groups of the batch by --model.g_norm and "
    "--model.d_norm ghost with --model.ghost_groups, or save memory by a smaller --data.batch_size",
    "enable_checkpointing": "checkpoints also serve to stop and go on; --trainer.fast_dev_run true writes nothing",
    "overfit_batches": "use --trainer.limit_train_batches",
    "barebones": "set what you mean, such as --trainer.logger false",
    "use_distributed_sampler": "bngan shares the images out itself; leave it out",
    "model_registry": "upload checkpoints/best.ckpt yourself",
    "inference_mode": LEAVE_OUT,
    "reload_dataloaders_every_n_epochs": LEAVE_OUT,
    "enable_autolog_hparams": LEAVE_OUT,
}
# Lightning's callbacks that would do harm here without a word, and what to use.
REFUSED_CALLBACKS: tuple[tuple[type[Callback], str], ...] = (
    (
        callbacks.ModelCheckpoint,
        "would save buffers that the devices do not agree on; use --checkpoint.every_n_iterations, --checkpoint.monitor, "
        "--checkpoint.mode and --checkpoint.keep_all",
    ),
    (callbacks.WeightAveraging, "averages D as well, by steps of one optimizer; use --model.ema_decay"),
    (callbacks.StochasticWeightAveraging, "averages D as well, by steps of one optimizer; use --model.ema_decay"),
    (callbacks.GradientAccumulationScheduler, COUNTERPARTS["accumulate_grad_batches"]),
    (callbacks.LearningRateFinder, "looks for one learning rate, and there are two; set --model.g_lr and --model.d_lr"),
    (callbacks.BatchSizeFinder, "would change what a GAN learns; set --data.batch_size"),
    (callbacks.ModelPruning, "replaces the weights that the optimizers hold; set --model.hidden_dim"),
    (callbacks.Timer, "cannot be recorded in config.yaml; use --trainer.max_time"),
)
# Lightning calls them around its own backward and step; an iteration here is one program.
UNCALLED_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


class Trainer(pl.Trainer):
    """Lightning's Trainer, with those settings that mean here what Lightning documents.

    configs/default.yaml says what each does. Checkpoints are kept by a callback, and the images are shared out by the data.

    Raises:
        UsageError: naming the setting that cannot be honoured, and what to use.
    """

    callbacks: list[Callback]

    def __init__(
        self,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        strategy: Literal["auto", "ddp", "ddp_notebook"] = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true",
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int = 2,
        log_every_n_steps: int = 50,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        profiler: Literal["simple", "advanced", "pytorch"] | Profiler | None = None,
        detect_anomaly: bool = False,
        fast_dev_run: int | bool = False,
        logger: bool | Logger | list[Logger] = True,
        callbacks: Callback | list[Callback] | None = None,
        plugins: ClusterEnvironment | list[ClusterEnvironment] | None = None,
        sync_batchnorm: bool = True,
        default_root_dir: str | None = None,
    ) -> None:
        _check_machine(accelerator, devices, num_nodes, precision, strategy)
        given: list[Callback] = as_list(callbacks)
        _check_callbacks(given)
        has_bar = any(isinstance(callback, ProgressBar) for callback in given)
        super().__init__(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            max_steps=max_steps,
            min_steps=min_steps,
            max_time=max_time,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in given),
            enable_progress_bar=enable_progress_bar or has_bar,  # Lightning refuses False beside a bar, which is disabled below
            enable_model_summary=enable_model_summary,
            deterministic=deterministic,
            benchmark=benchmark,
            profiler=profiler,
            detect_anomaly=detect_anomaly,
            fast_dev_run=fast_dev_run,
            logger=logger,
            callbacks=given,
            plugins=[*(as_list(plugins) or _own_launch()), *([BatchNormSync()] if sync_batchnorm else [])],
            use_distributed_sampler=False,
            default_root_dir=default_root_dir,
        )
        _check_lengths(self)
        _check_processes(self)
        if not enable_progress_bar and self.progress_bar_callback is not None:
            self.progress_bar_callback.disable()
        environment = getattr(self.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # which would save from within a signal handler; scripts/slurm.sbatch requeues
        if self.strategy.root_device.type == "cpu":
            # Lightning sets it, and then each step of an optimizer looks for a GPU's driver, which takes longer than the step.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


class BatchNormSync(LayerSync):
    """Plugin: batch norm over the batches of all ranks together."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the model's batch norm layers, if there is more than one rank."""
        assert isinstance(model, LightningModule)
        if world_size() > 1:
            synchronize(model, model.trainer.strategy.root_device)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: without other ranks they normalize by their own batch."""
        return model


@runtime_checkable
class Stopper(Protocol):
    """A callback that stops a run where it was asked to."""

    def stop_if_asked(self, trainer: pl.Trainer) -> None:
        """Stop the run here if any rank was asked to; all ranks must come here equally often."""
        ...


def stop_if_asked(trainer: pl.Trainer) -> None:
    """Stop here if any rank was asked to, in the middle of a validation, say; all ranks must come here equally often."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        if isinstance(callback, Stopper):
            callback.stop_if_asked(trainer)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the run's folder, or None in a fast_dev_run, which writes nothing.

    All ranks must ask, in `setup`: asking for the Trainer's log_dir is a message between them.
    """
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        return None
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)


def as_list(given: Any) -> list[Any]:
    """Return what a setting holds that may be nothing, one thing, or a list of them."""
    return given if isinstance(given, list) else [] if given is None else [given]


def _check_machine(accelerator: str, devices: int | str | list[int], num_nodes: int, precision: str, strategy: str) -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator == "cpu" or found is None else found.type
    counted = isinstance(devices, int | str) and str(devices).isdecimal()
    if devices in (0, "0", []) or (kind == "cpu" and not (counted or devices == "auto")):
        raise UsageError(f"--trainer.devices {devices} is not allowed; give a number of devices, 1 or more, or auto")
    if precision == "16-mixed" and kind != "cuda":
        raise UsageError("--trainer.precision 16-mixed needs a GPU of CUDA's; use --trainer.precision bf16-mixed")
    if kind == "mps" and precision == "64-true":
        raise UsageError("--trainer.precision 64-true: MPS has no float64; use 32-true, or --trainer.accelerator cpu")
    if kind == "mps" and (str(devices) not in ("auto", "1") or num_nodes > 1 or strategy != "auto"):
        raise UsageError("MPS trains by itself; leave out --trainer.devices, --trainer.num_nodes and --trainer.strategy")
    if strategy == "ddp_notebook" and "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError("--trainer.strategy ddp_notebook forks processes, which this system cannot do; use ddp")
    _check_machines(num_nodes)


def _check_machines(num_nodes: int) -> None:
    check_at_least(1, "--trainer.", num_nodes=num_nodes)
    number = os.environ.get("NODE_RANK", "0")
    if number not in map(str, range(num_nodes)):
        raise UsageError(
            f"NODE_RANK={number} is set, but --trainer.num_nodes is {num_nodes}: unset it, or give as many machines; their "
            "NODE_RANK counts from 0"
        )
    others = "MASTER_ADDR" in os.environ or launched() or any(kind.detect() for kind in (LSFEnvironment, MPIEnvironment))
    if num_nodes > 1 and not others:
        raise UsageError(
            f"--trainer.num_nodes {num_nodes} would wait for machines that nothing starts: use torchrun or srun, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine"
        )


def _own_launch() -> list[ClusterEnvironment]:
    """Let this process start the others in a job of SLURM that has not started it by srun."""
    return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ and launched() is None else []


def _check_processes(trainer: pl.Trainer) -> None:
    """Refuse other processes than the settings ask for, and a place where they cannot meet."""
    launcher, asked = launched(), (trainer.num_devices, trainer.num_nodes)
    if launcher is not None and launcher[1:] != asked:
        name, devices, machines = launcher
        raise UsageError(
            f"{name} has started processes for --trainer.devices {devices} --trainer.num_nodes {machines}, but asked for are "
            f"--trainer.devices {asked[0]} --trainer.num_nodes {asked[1]}: say the same to both"
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    by_torchrun = launcher is not None and launcher[0] == "torchrun"
    if environment is None or by_torchrun or distributed.is_initialized():
        return
    address, port = environment.main_address, environment.main_port
    if trainer.global_rank == 0:
        check_meeting_place("" if launcher or trainer.num_nodes > 1 else address, port)
    if trainer.local_rank == 0 and (launcher or trainer.num_nodes > 1):
        ranks = trainer.num_devices * trainer.num_nodes
        print(f"Process {trainer.global_rank} of {ranks} waits for the others at {address}:{port}", flush=True)


def _check_callbacks(given: list[Callback]) -> None:
    for callback in given:
        name = type(callback).__name__
        for kind, reason in REFUSED_CALLBACKS:
            if isinstance(callback, kind):
                raise UsageError(f"--trainer.callbacks {name}: {reason}")
        for hook in UNCALLED_HOOKS:
            if is_overridden(hook, callback, parent=Callback):
                print0(f"{name}.{hook} is never called: an iteration here is one program, without hooks within")


def _check_lengths(trainer: pl.Trainer) -> None:
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise UsageError(f"--trainer.{name} 0 leaves nothing to train; give 1 or more")
    for name, least, remark in (
        ("check_val_every_n_epoch", 1, "; --trainer.limit_val_batches 0 turns validation off"),
        ("num_sanity_val_steps", -1, ", which takes all batches"),
        ("log_every_n_steps", 0, ", which logs nothing"),
    ):
        value = getattr(trainer, name)
        if value is not None and value < least:
            raise UsageError(f"--trainer.{name} must be at least {least}{remark}, got {value}")
