"""Every flag of Lightning's Trainer works with two alternating optimizers, or is answered by its name and what to use."""

import inspect
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from bngan.cli import main
from tests.conftest import Command, only_run

OFF = ("--metrics.num_samples=0", "--trainer.accelerator=cpu")
SHORT = ("--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--data.eval_batch_size=50")

# Settings that train: what is typed after --trainer., and how many alternations are done then.
WORKS: dict[str, list[tuple[str, ...]]] = {
    "accelerator": [("accelerator=auto",)],
    "strategy": [
        ("strategy=auto",),
        ("strategy=ddp",),
        ("strategy=ddp_notebook",),
        ("strategy.class_path=DDPStrategy", "strategy.init_args.find_unused_parameters=true"),
    ],
    "devices": [("devices=1",), ("devices=auto",)],
    "num_nodes": [("num_nodes=1",)],
    "precision": [("precision=null",), ("precision=32-true",), ("precision=bf16-mixed",), ("precision=64-true",)],
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
    "min_epochs": [("min_epochs=1",)],
    "max_steps": [("max_steps=3",)],
    "min_steps": [("min_steps=2",)],
    "max_time": [("max_time=00:01:00:00",)],
    "limit_train_batches": [("limit_train_batches=2",), ("limit_train_batches=0.005",)],
    "limit_val_batches": [("limit_val_batches=0",), ("limit_val_batches=2",), ("limit_val_batches=0.01",)],
    "limit_test_batches": [("limit_test_batches=2",), ("limit_test_batches=0.5",)],
    "limit_predict_batches": [("limit_predict_batches=2",), ("limit_predict_batches=0.5",)],
    "overfit_batches": [("overfit_batches=0",)],
    "val_check_interval": [("val_check_interval=2",), ("val_check_interval=0.005",)],
    "check_val_every_n_epoch": [("check_val_every_n_epoch=null", "val_check_interval=2"), ("check_val_every_n_epoch=1",)],
    "num_sanity_val_steps": [("num_sanity_val_steps=2",), ("num_sanity_val_steps=-1",)],
    "log_every_n_steps": [("log_every_n_steps=0",), ("log_every_n_steps=1",)],
    "enable_checkpointing": [("enable_checkpointing=true",)],
    "enable_progress_bar": [("enable_progress_bar=false",), ("enable_progress_bar=true",)],
    "enable_model_summary": [("enable_model_summary=true",)],
    "accumulate_grad_batches": [("accumulate_grad_batches=1",)],
    "gradient_clip_val": [("gradient_clip_val=null",)],
    "gradient_clip_algorithm": [("gradient_clip_algorithm=null",)],
    "deterministic": [("deterministic=true",), ("deterministic=warn",)],
    "benchmark": [("benchmark=true",)],
    "inference_mode": [("inference_mode=false",)],
    "use_distributed_sampler": [("use_distributed_sampler=false",)],
    "profiler": [("profiler=simple",), ("profiler=advanced",)],
    "detect_anomaly": [("detect_anomaly=true",)],
    "barebones": [("barebones=false",)],
    "plugins": [("plugins=[]",), ("plugins=LightningEnvironment",)],
    "sync_batchnorm": [("sync_batchnorm=true",), ("sync_batchnorm=false",)],
    "reload_dataloaders_every_n_epochs": [("reload_dataloaders_every_n_epochs=1", "limit_train_batches=2")],
    "default_root_dir": [("default_root_dir=runs",)],
    "enable_autolog_hparams": [("enable_autolog_hparams=false",)],
    "model_registry": [("model_registry=null",)],
}
SPLIT = ("fit on any", "ddp")
# Settings that are answered: what is typed after --trainer., and words of the answer beside the flag's own name.
REFUSED: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "accelerator": [(("accelerator=tpu",), ("tpu", "cpu, gpu"))],
    "strategy": [
        (("strategy=magic",), ("magic", "ddp_spawn")),
        (("strategy=model_parallel",), SPLIT),
        (("strategy=FSDPStrategy",), SPLIT),
        (("strategy.class_path=FSDPStrategy",), SPLIT),
        (("strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",), SPLIT),
        (("strategy.class_path=SingleDeviceStrategy",), ("use auto",)),
        (("strategy.class_path=DDPStrategy", "strategy.init_args.static_graph=true"), ("static_graph", "leave it out")),
    ],
    "devices": [(("devices=0",), ("1 or more",)), (("devices=-1",), ("number",)), (("devices=[0]",), ("number",))],
    "num_nodes": [(("num_nodes=2",), ("torchrun", "MASTER_ADDR"))],
    "precision": [
        *(((f"precision={name}",), (name, "bf16-mixed")) for name in ("16", "16-mixed", "16-true", "bf16-true")),
        (("precision=transformer-engine",), ("transformers", "bf16-mixed")),
        (("precision=8",), ("bf16-mixed",)),
    ],
    "logger": [(("logger=banana",), ("banana",))],
    "callbacks": [
        (("callbacks=ModelCheckpoint",), ("--checkpoint.every_n_iterations",)),
        (("callbacks=ModelCheckpoint", "callbacks.every_n_train_steps=5"), ("--checkpoint.every_n_iterations",)),
        (
            ("callbacks=[{class_path: ModelCheckpoint, init_args: {train_time_interval: '00:00:01'}}]",),
            ("--checkpoint.every_n_iterations",),
        ),
        (("callbacks=OnExceptionCheckpoint", "callbacks.dirpath=a"), ("--checkpoint",)),
        (("callbacks=EMAWeightAveraging",), ("--model.ema_decay",)),
        (("callbacks=StochasticWeightAveraging", "callbacks.swa_lrs=0.1"), ("--model.ema_decay",)),
        (("callbacks=GradientAccumulationScheduler", "callbacks.scheduling={0: 2}"), ("--model.accumulate",)),
        (("callbacks=BackboneFinetuning",), ("backbone",)),
        (("callbacks=LearningRateFinder",), ("--model.g_lr",)),
        (("callbacks=BatchSizeFinder",), ("--data.batch_size",)),
        (("callbacks=LearningRateMonitor",), ("train/g_lr",)),
        (("callbacks=ModelPruning", "callbacks.pruning_fn=l1_unstructured"), ("--model.hidden_dim",)),
        (("callbacks=RichProgressBar",), ("enable_progress_bar",)),
        (("callbacks=Timer",), ("max_time",)),
    ],
    "fast_dev_run": [(("fast_dev_run=-1",), (">= 0",))],
    "max_epochs": [(("max_epochs=-2",), ("-2",)), (("max_epochs=0",), ("nothing to train",))],
    "max_steps": [(("max_steps=-2",), ("-2",)), (("max_steps=0",), ("nothing to train",))],
    "max_time": [(("max_time=soon",), ("soon",))],
    "limit_train_batches": [(("limit_train_batches=1.5",), ("1.5",)), (("limit_train_batches=0",), ("nothing to train",))],
    "limit_val_batches": [(("limit_val_batches=-1",), ("-1",))],
    "limit_test_batches": [(("limit_test_batches=1.5",), ("1.5",))],
    "limit_predict_batches": [(("limit_predict_batches=1.5",), ("1.5",))],
    "overfit_batches": [(("overfit_batches=2",), ("limit_train_batches",))],
    "val_check_interval": [
        (("val_check_interval=1.5",), ("1.5",)),
        (("val_check_interval=1000",), ("1000", "check_val_every_n_epoch")),
        (("val_check_interval=00:00:00:01",), ("00:00:00:01", "number of batches")),
        (("val_check_interval={minutes: 1}",), ("clock", "number of batches")),
    ],
    "check_val_every_n_epoch": [(("check_val_every_n_epoch=0",), ("at least 1",))],
    "num_sanity_val_steps": [(("num_sanity_val_steps=-2",), ("-2",))],
    "log_every_n_steps": [(("log_every_n_steps=-1",), ("at least 0",))],
    "enable_checkpointing": [(("enable_checkpointing=false",), ("fast_dev_run",))],
    "accumulate_grad_batches": [(("accumulate_grad_batches=2",), ("--model.accumulate",))],
    "gradient_clip_val": [(("gradient_clip_val=1",), ("--model.g_clip", "--model.d_clip"))],
    "gradient_clip_algorithm": [(("gradient_clip_algorithm=value",), ("--model.g_clip", "--model.d_clip"))],
    "deterministic": [(("deterministic=perhaps",), ("perhaps", "warn"))],
    "use_distributed_sampler": [(("use_distributed_sampler=true",), ("leave it out",))],
    "profiler": [(("profiler=xla",), ("simple, advanced",)), (("profiler=other",), ("simple, advanced",))],
    "barebones": [(("barebones=true",), ("--trainer.logger",))],
    "plugins": [
        (("plugins=HalfPrecision", "plugins.precision=bf16-true"), ("--trainer.precision",)),
        (("plugins=BitsandbytesPrecision", "plugins.mode=nf4"), ("--trainer.precision",)),
        (("plugins=TorchCheckpointIO",), ("--checkpoint",)),
        (("plugins=TorchSyncBatchNorm",), ("--trainer.sync_batchnorm",)),
    ],
    "sync_batchnorm": [(("sync_batchnorm=maybe",), ("maybe",))],
    "reload_dataloaders_every_n_epochs": [(("reload_dataloaders_every_n_epochs=-1",), ("-1",))],
    "model_registry": [(("model_registry=name",), ("best.ckpt",))],
}
WORKING = [(flag, given) for flag, cases in WORKS.items() for given in cases]
ANSWERED = [(flag, *case) for flag, cases in REFUSED.items() for case in cases]


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


def test_every_flag_of_the_trainer_is_decided_on() -> None:
    assert set(inspect.signature(Trainer).parameters) == WORKS.keys()
    assert REFUSED.keys() <= WORKS.keys()


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


@pytest.mark.parametrize("name", StrategyRegistry.available_strategies())
def test_every_strategy_that_lightning_knows_is_decided_on(
    name: str, mnist_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of DDP are run on ranks by tests/test_strategies.py."""
    if name.startswith("ddp"):
        return
    assert main([*typed((f"strategy={name}",)), f"--data.root={mnist_root}"]) == 2
    answer = capsys.readouterr().err
    assert f"--trainer.strategy {name} " in answer
    assert re.search(r"; use (auto|ddp)", answer)
