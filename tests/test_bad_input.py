"""A person's mistake gets a line or two on stderr that say what is wrong and what is allowed, status 2 and no traceback."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bngan.checkpoint import RENAMED
from bngan.cli import main
from bngan.commands import COMMANDS, Command, Parser
from bngan.data import mnist

FIT = ("fit", "--trainer.max_steps=2", "--metrics.num_samples=0")


def no_files(_: Path) -> None:
    pass


def wrote(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width), dtype=np.uint8)).save(path)


def pictures_of_two_sizes(folder: Path) -> None:
    picture(folder / "pictures" / "a.png", 32, 32)
    picture(folder / "pictures" / "b.png", 40, 32)


def oblong_pictures(folder: Path) -> None:
    for name in ("a", "b"):
        picture(folder / "pictures" / f"{name}.png", 64, 32)


def odd_pictures(folder: Path) -> None:
    for number in range(8):
        picture(folder / "pictures" / f"{number}.png", 30, 30)


def a_damaged_picture(folder: Path) -> None:
    picture(folder / "pictures" / "a.png", 32, 32)
    content = (folder / "pictures" / "a.png").read_bytes()
    (folder / "pictures" / "b.png").write_bytes(content[: len(content) // 2])


def an_empty_folder(folder: Path) -> None:
    (folder / "pictures").mkdir()


def a_damaged_data_file(folder: Path) -> None:
    raw = folder / "broken" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.MD5:
        (raw / name).write_bytes(b"not digits")


def a_truncated_checkpoint(folder: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1000)}, "hyper_parameters": {}}, folder / "whole.ckpt")
    content = (folder / "whole.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(content[: len(content) // 2])


def a_foreign_checkpoint(folder: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.ckpt")


def a_checkpoint_of_other_networks(folder: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "hyper_parameters": {"banana": 3}}, folder / "other.ckpt")


def a_run(folder: Path) -> None:
    (folder / "runs" / "mnist" / "first").mkdir(parents=True)
    (folder / "runs" / "mnist" / "first" / "run.json").write_text('{"id": "first", "parent": null, "starts": []}')


def a_file_in_the_way(folder: Path) -> None:
    (folder / "occupied").write_text("a file")


CASES = {
    # what is typed, what must exist first, words that must be in the answer
    "no such command": (("fti",), no_files, ("fti", "fit")),
    "config before the command": (("--config", "a.yaml", "fit"), no_files, ("--config", "after")),
    "unknown flag": ((*FIT, "--model.learning_rate=1"), no_files, ("model.learning_rate", "--help")),
    "abbreviated flag": ((*FIT, "--trainer.max_epoch=1"), no_files, ("trainer.max_epoch",)),
    "unknown group": ((*FIT, "--modle.g_lr=1"), no_files, ("modle.g_lr",)),
    **{
        f"{group} as a whole": ((*FIT, f"--{group}", "{}"), no_files, (f"--{group}.NAME", "one by one", "--config"))
        for group in ("model", "data", "trainer", "images", "batchnorm", "metrics", "progress", "checkpoint")
    },
    "group as a whole in one word": (("test", "--data={batch_size: 64}"), no_files, ("--data.NAME", "one by one", "--config")),
    "group as a file of its own": ((*FIT, "--model", "a.yaml"), wrote("a.yaml", "g_lr: 1"), ("--model.NAME", "--config")),
    "stray word": ((*FIT, "quickly"), no_files, ("quickly",)),
    "float expected": ((*FIT, "--model.g_lr=fast"), no_files, ("--model.g_lr", "float", "fast")),
    "int expected": ((*FIT, "--model.n_critic=1.5"), no_files, ("--model.n_critic", "int", "1.5")),
    "int or nothing expected": ((*FIT, "--trainer.max_epochs=many"), no_files, ("--trainer.max_epochs", "int", "many")),
    **{
        f"null for {setting}": ((*FIT, "--config=null.yaml"), wrote("null.yaml", text), (f"--{setting}", "null is not allowed"))
        for setting, text in (
            ("model.g_lr", "model: {g_lr: null}"),
            ("data.batch_size", "data: {batch_size: null}"),
            ("trainer.devices", "trainer: {devices: null}"),
            ("metrics.chunk", "metrics: {chunk: null}"),
            ("images.seed", "images: {seed: null}"),
        )
    },
    "bool expected": (
        (*FIT, "--model.update_d_stats_in_g_step=maybe"),
        no_files,
        ("update_d_stats_in_g_step", "bool", "maybe"),
    ),
    "learning rate zero": ((*FIT, "--model.g_lr=0"), no_files, ("g_lr", "above 0")),
    "learning rate negative": ((*FIT, "--model.d_lr=-1"), no_files, ("d_lr", "above 0", "-1")),
    "learning rate infinite": ((*FIT, "--model.d_lr=inf"), no_files, ("d_lr", "inf")),
    "learning rate NaN": ((*FIT, "--model.g_lr=nan"), no_files, ("g_lr", "nan")),
    "no hidden units": ((*FIT, "--model.hidden_dim=0"), no_files, ("hidden_dim", "at least 1")),
    "no latents": ((*FIT, "--model.latent_dim=0"), no_files, ("latent_dim", "at least 1")),
    "no critic steps": ((*FIT, "--model.n_critic=0"), no_files, ("n_critic", "at least 1")),
    "no groups": ((*FIT, "--model.g_norm=ghost", "--model.ghost_groups=0"), no_files, ("ghost_groups", "at least 1")),
    "beta out of range": ((*FIT, "--model.beta1=1"), no_files, ("beta1", "[0, 1)")),
    "dropout out of range": ((*FIT, "--model.d_dropout=1"), no_files, ("dropout", "[0, 1)")),
    "negative noise": ((*FIT, "--model.instance_noise=-0.1"), no_files, ("instance_noise", "at least 0")),
    "negative clip": ((*FIT, "--model.g_clip=-1"), no_files, ("g_clip", "above 0")),
    "decay out of range": ((*FIT, "--model.lr_decay_start=2"), no_files, ("lr_decay_start", "[0, 1]")),
    "unknown loss": ((*FIT, "--model.loss=vanilla"), no_files, ("vanilla", "hinge", "relativistic")),
    "unknown norm": ((*FIT, "--model.g_norm=bach"), no_files, ("bach", "batch", "layer")),
    "unknown network": ((*FIT, "--model.network=unet"), no_files, ("unet", "mlp", "conv")),
    "unknown batching": ((*FIT, "--model.batching=both"), no_files, ("both", "joint", "separate")),
    "norm without pixels": ((*FIT, "--model.g_norm=instance"), no_files, ("instance", "layer")),
    "penalty with batch norm in D": ((*FIT, "--model.r1=1"), no_files, ("d_norm", "penalty", "layer")),
    "wasserstein with batch norm in D": ((*FIT, "--model.loss=wasserstein"), no_files, ("d_norm", "penalty", "layer")),
    "smoothing without labels": (
        (*FIT, "--model.loss=hinge", "--model.label_smoothing=0.1"),
        no_files,
        ("label_smoothing", "hinge", "non_saturating"),
    ),
    "batch of one": ((*FIT, "--data.batch_size=1"), no_files, ("batch norm", "at least 2", "--data.batch_size")),
    "batch of none": ((*FIT, "--data.batch_size=0"), no_files, ("batch_size", "at least 1")),
    "batch larger than the data": ((*FIT, "--data.batch_size=70000"), no_files, ("70000", "60000", "--data.batch_size")),
    "batch that cannot be cut into groups": (
        (*FIT, "--model.d_norm=ghost", "--model.ghost_groups=3"),
        no_files,
        ("128", "3", "--data.batch_size"),
    ),
    "unknown data set": ((*FIT, "--data.name=cifar"), no_files, ("cifar", "mnist", "folder")),
    "folder not named": ((*FIT, "--data.name=folder"), no_files, ("--data.folder",)),
    "folder without its name": ((*FIT, "--data.folder=pictures"), an_empty_folder, ("--data.name folder",)),
    "folder missing": ((*FIT, "--data.name=folder", "--data.folder=gone"), no_files, ("gone", "--data.folder")),
    "folder empty": ((*FIT, "--data.name=folder", "--data.folder=pictures"), an_empty_folder, ("pictures", "png")),
    "pictures of two sizes": (
        (*FIT, "--data.name=folder", "--data.folder=pictures"),
        pictures_of_two_sizes,
        ("a.png", "b.png", "40 x 32", "--data.image_size"),
    ),
    "pictures not square": (
        (*FIT, "--data.name=folder", "--data.folder=pictures"),
        oblong_pictures,
        ("64 x 32", "--data.image_size"),
    ),
    "picture damaged": (
        (*FIT, "--data.name=folder", "--data.folder=pictures", "--data.batch_size=2", "--data.image_size=32"),
        a_damaged_picture,
        ("b.png", "remove"),
    ),
    "size that convolutions cannot make": (
        (*FIT, "--data.name=folder", "--data.folder=pictures", "--model.network=conv"),
        odd_pictures,
        ("30", "28 or 32", "--data.image_size"),
    ),
    "channels": ((*FIT, "--data.channels=2"), no_files, ("channels", "1", "3")),
    "data file damaged": ((*FIT, "--data.root=broken"), a_damaged_data_file, ("broken", "corrupt", "delete")),
    "data folder cannot be written": ((*FIT, "--data.root=occupied"), a_file_in_the_way, ("occupied",)),
    "run folder cannot be written": (
        (*FIT, "--trainer.default_root_dir=occupied"),
        a_file_in_the_way,
        ("occupied", "--trainer.default_root_dir"),
    ),
    "run that is no folder name": ((*FIT, "--run=../up"), no_files, ("--run", "../up", "letters")),
    "run without an ID": ((*FIT, "--run"), no_files, ("--run", "--help")),
    "run that is there": ((*FIT, "--run=first"), a_run, ("runs/mnist/first", "--ckpt_path auto --run first")),
    "run of a measurement": (("test", "--run=first", "--ckpt_path=a.ckpt"), no_files, ("--run",)),
    "auto without a run": ((*FIT, "--ckpt_path=auto"), no_files, ("--ckpt_path auto", "--run ID")),
    "folder without a checkpoint": ((*FIT, "--ckpt_path=pictures"), an_empty_folder, ("pictures", "checkpoints/")),
    "last of no run": ((*FIT, "--ckpt_path=last"), no_files, ("runs/*", "a run's folder")),
    "name that is no folder name": ((*FIT, "--name=../up"), no_files, ("../up", "letters")),
    "config missing": ((*FIT, "--config=gone.yaml"), no_files, ("gone.yaml",)),
    "recipe that is not shipped": ((*FIT, "--config", "resnet"), no_files, ("resnet", "best_mlp, conditional, dcgan, default")),
    "config without a name": (("fit", "--config"), no_files, ("--config", "YAML")),
    "config missing, joined to its flag": ((*FIT, "-cgone.yaml"), no_files, ("gone.yaml", "YAML")),
    "config not YAML": ((*FIT, "--config=a.yaml"), wrote("a.yaml", "model: [1"), ("a.yaml", "YAML", "line")),
    "config not text": ((*FIT, "--config=a.yaml"), wrote("a.yaml", bytes(range(128, 256))), ("a.yaml", "YAML")),
    "config empty": ((*FIT, "--config=a.yaml"), wrote("a.yaml", ""), ("a.yaml", "no settings")),
    "config with an unknown group": ((*FIT, "--config=a.yaml"), wrote("a.yaml", "modle: {g_lr: 1}"), ("modle", "model")),
    "config with an unknown setting": ((*FIT, "--config=a.yaml"), wrote("a.yaml", "model: {glr: 1}"), ("model.glr",)),
    "config with a number for a group": ((*FIT, "--config=a.yaml"), wrote("a.yaml", "model: 3"), ("model", "3")),
    "config with a wrong type": ((*FIT, "--config=a.yaml"), wrote("a.yaml", "model: {g_lr: fast}"), ("g_lr", "fast")),
    "checkpoint missing": ((*FIT, "--ckpt_path=gone.ckpt"), no_files, ("gone.ckpt",)),
    "checkpoint junk": ((*FIT, "--ckpt_path=a.ckpt"), wrote("a.ckpt", "junk"), ("a.ckpt", "damaged")),
    "checkpoint empty": (("test", "--ckpt_path=a.ckpt"), wrote("a.ckpt", ""), ("a.ckpt", "damaged")),
    "checkpoint truncated": (("test", "--ckpt_path=truncated.ckpt"), a_truncated_checkpoint, ("truncated.ckpt", "damaged")),
    "checkpoint of something else": (("validate", "--ckpt_path=foreign.ckpt"), a_foreign_checkpoint, ("foreign.ckpt", "bngan")),
    "checkpoint without its option": (("test", "a.ckpt"), wrote("a.ckpt", ""), ("a.ckpt stands by itself", "--ckpt_path")),
    "name too long for a file": (("sample", "x" * 300), no_files, ("name too long",)),
    "shell's variable in a path": (("fit", "--trainer.default_root_dir=$HOME/runs"), no_files, ("$HOME/runs", "write out")),
    "class with a wrong argument": (
        ("fit", "--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/d_loss, mode: up}}"),
        no_files,
        ("mode", "up"),
    ),
    "number too large for a machine": (("fit", f"--data.batch_size={10**20}"), no_files, ("--data.batch_size",)),
    "checkpoint too many": (("test", "--ckpt_path=a.ckpt", "b.ckpt"), no_files, ("b.ckpt stands by itself", "--ckpt_path")),
    "checkpoint not given": (("test",), no_files, ("test", "--ckpt_path")),
    "sample without a checkpoint": (("sample",), no_files, ("checkpoint", "--help")),
    "sample of a missing checkpoint": (("sample", "gone.ckpt"), no_files, ("gone.ckpt",)),
    "sample of junk": (("sample", "a.ckpt"), wrote("a.ckpt", "junk"), ("a.ckpt", "damaged")),
    "sample of other networks": (("sample", "other.ckpt"), a_checkpoint_of_other_networks, ("other.ckpt", "bngan")),
    "sample of none": (("sample", "gone.ckpt", "--num=0"), no_files, ("--num", "at least 1")),
    "sample of a word": (("sample", "gone.ckpt", "--num=many"), no_files, ("--num", "many")),
    "sample with an unknown flag": (("sample", "gone.ckpt", "--number=3"), no_files, ("--number",)),
    "precision": ((*FIT, "--trainer.precision=8"), no_files, ("--trainer.precision", "bf16-mixed")),
    "strategy": ((*FIT, "--trainer.strategy=magic"), no_files, ("magic", "ddp")),
    "accelerator": ((*FIT, "--trainer.accelerator=abacus"), no_files, ("abacus", "cpu")),
    "no devices": ((*FIT, "--trainer.accelerator=cpu", "--trainer.devices=0"), no_files, ("--trainer.devices", "1 or more")),
    "clipping by the Trainer": ((*FIT, "--trainer.gradient_clip_val=1"), no_files, ("--model.g_clip", "--model.d_clip")),
    "accumulation by the Trainer": (
        (*FIT, "--trainer.accumulate_grad_batches=2"),
        no_files,
        ("--model.ghost_groups", "--data.batch_size"),
    ),
    "parts of a batch": ((*FIT, "--model.accumulate=2"), no_files, ("--model.accumulate", "--model.ghost_groups")),
    "compilation": ((*FIT, "--model.compile=true"), no_files, ("--model.compile", "--model.cuda_graph")),
    "steps of several iterations": (
        (*FIT, "--data.alternations_per_step=4"),
        no_files,
        ("alternations_per_step", "leave it out"),
    ),
    **{
        f"old name {old}": ((*FIT, f"--model.{old}=1"), no_files, (f"--model.{old};", f"--model.{new} "))
        for old, new in RENAMED.items()
    },
    "old name in a file": (
        (*FIT, "--config=a.yaml"),
        wrote("a.yaml", "model: {noise: 1}"),
        ("noise", "--model.instance_noise"),
    ),
    "old value of ema_buffers": ((*FIT, "--model.ema_buffers=recalibrate"), no_files, ("recalibrate", "precise")),
    "old option of sample": (("sample", "gone.ckpt", "--sampling=batch"), no_files, ("--sampling",)),
    "old weights of sample": (("sample", "gone.ckpt", "--weights=average"), no_files, ("average", "ema")),
    "too few samples to measure": ((*FIT[:2], "--metrics.num_samples=3"), no_files, ("num_samples", "128")),
    "mode threshold of 0": ((*FIT[:2], "--metrics.mode_threshold=0"), no_files, ("mode_threshold", "above 0")),
    "negative number of samples": ((*FIT[:2], "--metrics.num_samples=-1"), no_files, ("num_samples", "at least 0")),
    "unknown feature net": ((*FIT[:2], "--metrics.feature=vgg"), no_files, ("vgg", "digits", "inception", "package.module")),
    "feature net of no module": ((*FIT[:2], "--metrics.feature=gone.Net"), no_files, ("gone",)),
    "feature net that is none": ((*FIT[:2], "--metrics.feature=pathlib.Path"), no_files, ("pathlib.Path", "torch.nn.Module")),
    "feature net that needs arguments": ((*FIT[:2], "--metrics.feature=torch.nn.Linear"), no_files, ("arguments",)),
    "feature net of the wrong rank": (
        (*FIT[:2], "--metrics.feature=torch.nn.Identity"),
        no_files,
        ("torch.nn.Identity", "(1, d)", "(1, 1, 28, 28)"),
    ),
    "feature net of another shape": (
        (*FIT[:2], "--metrics.feature=bngan.metrics.digit_net.DigitNet", "--data.image_size=32"),
        no_files,
        ("(N, 1, 28, 28)", "(1, 1, 32, 32)"),
    ),
    "too few pictures to measure": (
        (*FIT[:2], "--data.name=folder", "--data.folder=pictures", "--data.batch_size=4", "--metrics.feature=torch.nn.Flatten"),
        odd_pictures,
        ("at least 6 training images", "there are 3 of each"),
    ),
    "average's decay": ((*FIT, "--model.ema_decay=1"), no_files, ("ema_decay", "[0, 1)")),
    "average's buffers": ((*FIT, "--model.ema_buffers=none"), no_files, ("none", "copy", "average", "precise")),
    "sampling policy": ((*FIT, "--model.eval_statistics=best"), no_files, ("best", "running", "batch", "precise")),
    "momentum of 0": ((*FIT, "--model.bn_momentum=0"), no_files, ("bn_momentum", "above 0")),
    "eps of 0": ((*FIT, "--model.bn_eps=0"), no_files, ("bn_eps", "above 0")),
    "sample by an unknown policy": (("sample", "gone.ckpt", "--statistics=best"), no_files, ("best", "precise")),
    "doctor without a patient": (("doctor",), no_files, ("path", "--help")),
    "doctor of nothing": (("doctor", "gone"), no_files, ("gone", "recipe")),
    "doctor of an empty folder": (("doctor", "pictures"), an_empty_folder, ("pictures", "checkpoints/")),
    "doctor of junk": (("doctor", "a.ckpt"), wrote("a.ckpt", "junk"), ("a.ckpt", "damaged")),
    "doctor of a bad recipe": (("doctor", "a.yaml"), wrote("a.yaml", "model: 3"), ("model", "3")),
    "doctor of a recipe with an unknown setting": (("doctor", "a.yaml"), wrote("a.yaml", "model: {glr: 1}"), ("glr",)),
    "picture interval": ((*FIT, "--images.every_n_iterations=0"), no_files, ("images.every_n_iterations", "at least 1")),
    "statistics interval": ((*FIT, "--batchnorm.every_n_iterations=0"), no_files, ("batchnorm.every_n_iterations",)),
    "checkpoint interval": ((*FIT, "--checkpoint.every_n_iterations=0"), no_files, ("checkpoint.every_n_iterations",)),
    "checkpoint mode": ((*FIT, "--checkpoint.mode=least"), no_files, ("checkpoint.mode", "min", "max")),
}


@pytest.mark.parametrize("case", CASES)
def test_mistake_gets_a_short_answer(
    case: str, tmp_path: Path, mnist_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, prepare, words = CASES[case]
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)
    if arguments[0] == "fit" and not any("data.root" in argument for argument in arguments):
        arguments = (*arguments, f"--data.root={mnist_root}")

    status = main(list(arguments))

    answer = capsys.readouterr().err
    assert status == 2, answer
    assert "Traceback" not in answer
    assert answer.startswith("bngan: error: ")
    assert len(answer.strip().splitlines()) <= 2
    for word in words:
        assert word in answer
    assert [folder for folder in tmp_path.glob("runs/*/*") if not any(folder.iterdir())] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_absent_gpu_gets_a_short_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.accelerator=gpu"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_job_that_was_started_again_does_not_silently_begin_anew(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)
    monkeypatch.setenv(launcher, "1")
    for arguments in ((), ("--run=first",), ("--ckpt_path=last",)):
        assert main([*FIT, *arguments]) == 2
        answer = capsys.readouterr().err
        assert len(answer.strip().splitlines()) <= 2
        assert "started again" in answer
        assert "bngan fit --ckpt_path auto --run ID" in answer
    assert main([*FIT, "--ckpt_path=auto", "--run=first", "--print_config"]) == 0
    monkeypatch.setenv(launcher, "0")
    assert main([*FIT, "--print_config"]) == 0


def test_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BNGAN_TRACEBACK", "1")
    assert main(["sample", "gone.ckpt"]) == 2
    answer = capsys.readouterr().err
    assert "Traceback" in answer
    assert "gone.ckpt" in answer.splitlines()[-1]


def test_defect_of_the_program_shows_its_traceback_and_another_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(parser: Parser, arguments: list[str]) -> None:
        raise AssertionError("a defect")

    monkeypatch.setitem(COMMANDS, "sample", Command("", broken))
    assert main(["sample", "a.ckpt"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_table_holds_at_least_forty_cases() -> None:
    assert len(CASES) >= 40
