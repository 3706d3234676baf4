"""Every flag of Lightning's Trainer works with two alternating optimizers, or is answered by its name and what to use."""

import inspect
import multiprocessing
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from bngan.cli import main
from bngan.errors import UsageError
from bngan.trainer import COUNTERPARTS, Trainer, run_folder, stop_if_asked
from tests.conftest import Command, only_run
from tests.test_rendezvous import JOB, SRUN, TORCHRUN

OFF = ("--metrics.num_samples=0", "--trainer.accelerator=cpu")
SHORT = ("--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--data.eval_batch_size=50")

# Settings that train: what is typed after --trainer.
WORKS: dict[str, list[tuple[str, ...]]] = {
    "accelerator": [("accelerator=auto",)],
    "strategy": [("strategy=auto",), ("strategy=ddp",), ("strategy=ddp_notebook",)],
    "devices": [("devices=1",), ("devices=auto",)],
    "num_nodes": [("num_nodes=1",)],
    "precision": [("precision=32-true",), ("precision=bf16-mixed",), ("precision=64-true",)],
    "logger": [
        ("logger=false",),
        ("logger=true",),
        ("logger=[]",),
        ("logger=[{class_path: CSVLogger, init_args: {save_dir: a}}, {class_path: CSVLogger, init_args: {save_dir: b}}]",),
    ],
    "callbacks": [
        ("callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/d_loss}}]",),
        ("callbacks=ModelSummary",),
        ("callbacks=LambdaCallback",),
    ],
    "fast_dev_run": [("fast_dev_run=3",)],
    "max_epochs": [("max_epochs=-1",), ("max_epochs=null",)],
    "min_epochs": [("min_epochs=1", "max_time=00:01:00:00")],
    "max_steps": [("max_steps=3",)],
    "min_steps": [("min_steps=2", "max_time=00:01:00:00")],
    "max_time": [("max_time=00:01:00:00",)],
    "limit_train_batches": [("limit_train_batches=2",), ("limit_train_batches=0.005",)],
    "limit_val_batches": [("limit_val_batches=0",), ("limit_val_batches=2",), ("limit_val_batches=0.01",)],
    "limit_test_batches": [],  # they are for other commands
    "limit_predict_batches": [],
    "val_check_interval": [("val_check_interval=2",), ("val_check_interval=0.005",)],
    "check_val_every_n_epoch": [("check_val_every_n_epoch=null", "val_check_interval=2"), ("check_val_every_n_epoch=1",)],
    "num_sanity_val_steps": [("num_sanity_val_steps=2",), ("num_sanity_val_steps=-1",)],
    "log_every_n_steps": [("log_every_n_steps=0",), ("log_every_n_steps=1",)],
    "enable_progress_bar": [("enable_progress_bar=false",), ("enable_progress_bar=true",)],
    "enable_model_summary": [("enable_model_summary=true",)],
    "deterministic": [("deterministic=true",), ("deterministic=warn",)],
    "benchmark": [("benchmark=true",)],
    "profiler": [("profiler=simple",), ("profiler=advanced",), ("profiler=SimpleProfiler",)],
    "detect_anomaly": [("detect_anomaly=true",)],
    "plugins": [("plugins=[]",), ("plugins=LightningEnvironment",)],
    "sync_batchnorm": [("sync_batchnorm=true",), ("sync_batchnorm=false",)],
    "default_root_dir": [("default_root_dir=runs",)],
}
# Settings of Lightning's that are not here: what is typed after --trainer., and words of the answer beside the flag's own name.
ABSENT: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "overfit_batches": [(("overfit_batches=2",), ("limit_train_batches",))],
    "enable_checkpointing": [(("enable_checkpointing=false",), ("fast_dev_run",))],
    "accumulate_grad_batches": [(("accumulate_grad_batches=2",), ("--model.ghost_groups", "--data.batch_size"))],
    "gradient_clip_val": [(("gradient_clip_val=1",), ("--model.g_clip", "--model.d_clip"))],
    "gradient_clip_algorithm": [(("gradient_clip_algorithm=value",), ("--model.g_clip", "--model.d_clip"))],
    "inference_mode": [(("inference_mode=false",), ("leave it out",))],
    "use_distributed_sampler": [(("use_distributed_sampler=true",), ("leave it out",))],
    "barebones": [(("barebones=true",), ("--trainer.logger",))],
    "reload_dataloaders_every_n_epochs": [(("reload_dataloaders_every_n_epochs=1",), ("leave it out",))],
    "enable_autolog_hparams": [(("enable_autolog_hparams=false",), ("leave it out",))],
    "model_registry": [(("model_registry=name",), ("best.ckpt",))],
}
# Values that are answered likewise.
REFUSED: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "accelerator": [(("accelerator=tpu",), ("tpu", "cpu, gpu"))],
    "strategy": [
        (("strategy=magic",), ("magic", "ddp")),
        (("strategy=FSDPStrategy",), ("FSDPStrategy", "auto, ddp")),
        (("strategy.class_path=FSDPStrategy",), ("strategy",)),
    ],
    "devices": [(("devices=0",), ("1 or more",)), (("devices=-1",), ("number",)), (("devices=[0]",), ("number",))],
    "num_nodes": [(("num_nodes=2",), ("torchrun", "MASTER_ADDR")), (("num_nodes=0",), ("at least 1",))],
    "precision": [
        (("precision=16-mixed",), ("16-mixed", "a GPU", "bf16-mixed")),
        *(((f"precision={name}",), (name, "bf16-mixed")) for name in ("16", "16-true", "bf16-true", "transformer-engine", "8")),
    ],
    "logger": [(("logger=banana",), ("banana",))],
    "callbacks": [
        (("callbacks=ModelCheckpoint",), ("--checkpoint.every_n_iterations",)),
        (("callbacks=ModelCheckpoint", "callbacks.every_n_train_steps=5"), ("--checkpoint.every_n_iterations",)),
        (
            ("callbacks=[{class_path: ModelCheckpoint, init_args: {train_time_interval: '00:00:01'}}]",),
            ("--checkpoint.every_n_iterations",),
        ),
        (("callbacks=EMAWeightAveraging",), ("--model.ema_decay",)),
        (("callbacks=StochasticWeightAveraging", "callbacks.swa_lrs=0.1"), ("--model.ema_decay",)),
        (("callbacks=GradientAccumulationScheduler", "callbacks.scheduling={0: 2}"), ("--model.ghost_groups",)),
        (("callbacks=LearningRateFinder",), ("--model.g_lr",)),
        (("callbacks=BatchSizeFinder",), ("--data.batch_size",)),
        (("callbacks=ModelPruning", "callbacks.pruning_fn=l1_unstructured"), ("--model.hidden_dim",)),
        (("callbacks=Timer", "callbacks.duration=00:00:01:00"), ("max_time",)),
    ],
    "fast_dev_run": [(("fast_dev_run=-1",), (">= 0",))],
    "max_epochs": [(("max_epochs=-2",), ("-2",)), (("max_epochs=0",), ("nothing to train",))],
    "max_steps": [(("max_steps=-2",), ("-2",)), (("max_steps=0",), ("nothing to train",))],
    "max_time": [(("max_time=soon",), ("soon",))],
    "limit_train_batches": [(("limit_train_batches=1.5",), ("1.5",)), (("limit_train_batches=0",), ("nothing to train",))],
    "limit_val_batches": [(("limit_val_batches=-1",), ("-1",))],
    "limit_test_batches": [(("limit_test_batches=2",), ("no effect on fit",))],
    "limit_predict_batches": [(("limit_predict_batches=2",), ("no effect on fit",))],
    "val_check_interval": [
        (("val_check_interval=1.5",), ("1.5",)),
        (("val_check_interval=1000",), ("1000", "check_val_every_n_epoch")),
        (("val_check_interval=00:00:00:01",), ("00:00:00:01", "int, float")),
        (("val_check_interval={minutes: 1}",), ("minutes", "int, float")),
    ],
    "check_val_every_n_epoch": [(("check_val_every_n_epoch=0",), ("at least 1",))],
    "num_sanity_val_steps": [(("num_sanity_val_steps=-2",), ("-2",))],
    "log_every_n_steps": [(("log_every_n_steps=-1",), ("at least 0",))],
    "deterministic": [(("deterministic=perhaps",), ("perhaps", "warn"))],
    "profiler": [(("profiler=xla",), ("simple, advanced",)), (("profiler=other",), ("simple, advanced",))],
    "plugins": [
        (("plugins=HalfPrecision", "plugins.precision=bf16-true"), ("plugins",)),
        (("plugins=TorchCheckpointIO",), ("TorchCheckpointIO",)),
        (("plugins=TorchSyncBatchNorm",), ("TorchSyncBatchNorm",)),
    ],
    "sync_batchnorm": [(("sync_batchnorm=maybe",), ("maybe",))],
}
WORKING = [(flag, given) for flag, cases in WORKS.items() for given in cases]
ANSWERED = [(flag, *case) for table in (ABSENT, REFUSED) for flag, cases in table.items() for case in cases]


def typed(given: tuple[str, ...]) -> list[str]:
    """The given flags after others that make a run short."""
    return ["fit", *OFF, *SHORT, *(f"--trainer.{flag}" for flag in given)]


@pytest.fixture(autouse=True)
def what_is_set_for_the_whole_process_is_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)
    environment = dict(os.environ)
    yield
    os.environ.clear()  # DDP leaves its address and ranks, which other tests' processes would believe
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def test_every_flag_of_lightnings_trainer_is_here_or_answered() -> None:
    assert parameters(Trainer) == WORKS.keys()
    assert parameters(pl.Trainer) - parameters(Trainer) == ABSENT.keys() == COUNTERPARTS.keys()
    assert parameters(Trainer) <= parameters(pl.Trainer)
    assert REFUSED.keys() <= WORKS.keys()


def test_what_is_not_said_is_as_lightning_has_it() -> None:
    own, lightnings = (kind(accelerator="cpu", logger=False) for kind in (Trainer, pl.Trainer))
    compared = {name for name in parameters(Trainer) if isinstance(getattr(lightnings, name, None), int | float | str)}
    assert {"precision", "max_steps", "limit_train_batches", "log_every_n_steps", "num_sanity_val_steps"} <= compared
    for name in compared:
        assert getattr(own, name) == getattr(lightnings, name), name


@pytest.mark.parametrize(("flag", "given"), WORKING, ids=[" ".join(given) for _, given in WORKING])
def test_flag_trains(flag: str, given: tuple[str, ...], mnist_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag in given[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main([*typed(given), f"--data.root={mnist_root}"])
    streams = capsys.readouterr()
    assert status == 0, streams.err
    if flag == "fast_dev_run":
        assert not Path("runs").exists()
        return
    folder = only_run(Path("runs"))
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(content["state_dict"]["iteration"]) == 3
    assert bool(list(folder.glob("events.*"))) == (given != ("logger=false",))
    if given == ("enable_progress_bar=false",):
        assert "iterations in" not in streams.out


@pytest.mark.parametrize(("flag", "given", "words"), ANSWERED, ids=[" ".join(given) for _, given, _ in ANSWERED])
def test_flag_is_answered_by_name(
    flag: str,
    given: tuple[str, ...],
    words: tuple[str, ...],
    mnist_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*typed(given), f"--data.root={mnist_root}"]) == 2
    answer = capsys.readouterr().err
    assert answer.startswith("bngan: error: ")
    assert len(answer.strip().splitlines()) <= 2
    assert flag in answer
    for word in words:
        assert word in answer
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


def test_ranks_end_together_when_their_time_is_over(train: Command, mnist_root: Path, tmp_path: Path) -> None:
    """The Trainer asks the first rank's clock alone."""
    endless = ("--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:02", "--trainer.limit_val_batches=0")
    done = train("fit", *OFF, *endless, "--trainer.devices=2", f"--data.root={mnist_root}", cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    content = torch.load(only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(content["state_dict"]["iteration"]) == content["global_step"] > 0


# In Python ------------------------------------------------------------------------------------------------------------


class Looker(Callback):
    """Looks at what an iteration here does not show."""

    def on_before_optimizer_step(self, *_: object) -> None:
        """Never called."""


class Asked(Callback):
    """Counts how often it was asked to stop."""

    def __init__(self) -> None:
        self.times = 0

    def stop_if_asked(self, trainer: pl.Trainer) -> None:
        self.times += 1


def test_callback_with_a_hook_that_is_never_called_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(accelerator="cpu", logger=False, callbacks=[Asked()])
    assert "never called" not in capsys.readouterr().out
    Trainer(accelerator="cpu", logger=False, callbacks=Looker())
    assert "Looker.on_before_optimizer_step is never called" in capsys.readouterr().out


def test_mistakes_are_usage_errors_in_python_too() -> None:
    with pytest.raises(UsageError, match=r"--model\.ema_decay"):
        Trainer(accelerator="cpu", callbacks=[EMAWeightAveraging()])
    with pytest.raises(UsageError, match="max_steps 0"):
        Trainer(accelerator="cpu", max_steps=0)


def test_each_callback_that_can_stop_a_run_is_asked() -> None:
    first, second = Asked(), Asked()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[first, Callback(), second])
    stop_if_asked(trainer)
    assert (first.times, second.times) == (1, 1)


def test_run_folder_is_the_loggers_or_the_root_and_none_where_nothing_is_written(tmp_path: Path) -> None:
    assert run_folder(Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path))) == tmp_path
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    assert run_folder(Trainer(accelerator="cpu", logger=logger, default_root_dir=str(tmp_path))) == tmp_path / "logs"
    assert run_folder(Trainer(accelerator="cpu", fast_dev_run=True, default_root_dir=str(tmp_path))) is None


def test_optimizers_do_not_look_for_a_driver_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    Trainer(accelerator="cpu", logger=False)
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


# Other processes, other machines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchrun", "srun"])
@pytest.mark.parametrize(("devices", "num_nodes"), [(2, 2), (1, 2), (2, 1), (4, 1)])
def test_launcher_must_have_started_what_is_asked_for(
    name: str, devices: int, num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (TORCHRUN if name == "torchrun" else SRUN).items():
        monkeypatch.setenv(variable, value)
    if (devices, num_nodes) == (2, 2):
        trainer = Trainer(accelerator="cpu", devices=devices, num_nodes=num_nodes, logger=False)
        assert trainer.world_size == 4
        return
    with pytest.raises(UsageError, match=rf"{name} has started .*devices 2 --trainer.num_nodes 2, but .*devices {devices} "):
        Trainer(accelerator="cpu", devices=devices, num_nodes=num_nodes, logger=False)


@pytest.mark.parametrize("given", [JOB, {**JOB, "SLURM_NTASKS_PER_NODE": "1"}, {**SRUN, "SLURM_JOB_NAME": "bash"}])
def test_plain_command_in_a_job_of_slurm_starts_its_processes_itself(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    for devices in (1, 2):
        trainer = Trainer(accelerator="cpu", devices=devices, logger=False)
        assert trainer.num_devices == devices
        environment = getattr(trainer.strategy, "cluster_environment", LightningEnvironment())
        assert not isinstance(environment, SLURMEnvironment)
        assert not environment.creates_processes_externally


@pytest.mark.parametrize(("number", "num_nodes"), [("1", 1), ("2", 2), ("-1", 2), ("banana", 2)])
def test_number_of_a_machine_that_is_none_of_them_is_refused(
    number: str, num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_RANK", number)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(UsageError, match=rf"NODE_RANK={number} is set, but --trainer.num_nodes is {num_nodes}: unset it"):
        Trainer(accelerator="cpu", num_nodes=num_nodes, logger=False)


def test_machine_says_for_whom_it_waits_and_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(accelerator="cpu", devices=2, logger=False)
    assert "waits" not in capsys.readouterr().out
    for name, value in {"MASTER_ADDR": "host0", "MASTER_PORT": "29400", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    Trainer(accelerator="cpu", devices=2, num_nodes=2, logger=False)
    assert "Process 2 of 4 waits for the others at host0:29400" in capsys.readouterr().out


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_taken_port_is_told_of_before_any_process_is_started(num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        Trainer(accelerator="cpu", logger=False)  # which needs none
        with pytest.raises(UsageError, match=f"port {port}"):
            Trainer(accelerator="cpu", devices=2, num_nodes=num_nodes, logger=False)
        monkeypatch.setenv("NODE_RANK", "1")  # not the one that opens it
        if num_nodes == 2:
            Trainer(accelerator="cpu", devices=2, num_nodes=num_nodes, logger=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "64-true"}, "no float64; use 32-true"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
        ({"devices": 2}, "leave out --trainer.devices"),
        ({"num_nodes": 2}, "leave out --trainer.devices, --trainer.num_nodes"),
        ({"strategy": "ddp"}, "leave out --trainer.devices, --trainer.num_nodes and --trainer.strategy"),
    ],
)
@pytest.mark.parametrize("accelerator", ["mps", "gpu", "auto"])
def test_what_mps_cannot_do_is_refused(
    given: dict[str, Any], words: str, accelerator: Literal["mps", "gpu", "auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    with pytest.raises(UsageError, match=words):
        Trainer(accelerator=accelerator, logger=False, **given)
    if given != {"precision": "16-mixed"}:
        Trainer(accelerator="cpu", logger=False, **{name: value for name, value in given.items() if name != "num_nodes"})


def test_system_that_cannot_fork_has_no_ddp_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(accelerator="cpu", strategy="ddp_notebook", logger=False)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UsageError, match="ddp_notebook forks"):
        Trainer(accelerator="cpu", strategy="ddp_notebook", logger=False)
