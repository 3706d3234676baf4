"""Runs that are killed, disks that are full, and runs beside one another: no checkpoint is lost."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from bngan.cli import main
from tests.conftest import REPOSITORY, only_run
from tests.integration.test_resume import assert_same, last, series

TINY = (
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=-1", "--trainer.max_steps=1000000", "--metrics.num_samples=0"),
    # Nothing depends on how long the run is to be: it ends some steps after the last kill, whenever that is.
    *("--model.instance_noise=0", "--model.lr_decay_start=1"),
    *("--data.batch_size=16", "--model.hidden_dim=16", "--checkpoint.every_n_iterations=5", "--trainer.log_every_n_steps=100"),
    *("--batchnorm.every_n_iterations=500", "--images.every_n_iterations=500", "--trainer.limit_val_batches=1"),
)


def fit_quietly(arguments: tuple[str, ...], output: Path) -> None:
    """Run the command in this process, which does nothing else, with its words in a file."""
    torch.set_num_threads(1)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os._exit(main(["fit", *arguments]))


def saved_iteration(folder: Path) -> int:
    """Return the iteration of the only run's last.ckpt, which must be whole; 0 if there is none."""
    paths = list(folder.glob("*/*/checkpoints/last.ckpt"))
    assert len(paths) <= 1
    return torch.load(paths[0], weights_only=True)["global_step"] if paths else 0


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(kills: int, mnist_root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bngan.lightning_cli", "tests.integration.test_crash"])
    moments = random.Random(0)

    def start(folder: Path, *more: str) -> BaseProcess:
        where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}", "--run=it", "--ckpt_path=auto")
        process = context.Process(target=fit_quietly, args=((*TINY, *where, *more), tmp_path / f"{folder.name}.txt"))
        process.start()
        return process

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = reached = went_on = 0
    for number in range(10 * kills):
        process = start(killed)
        # Every other kill comes at any moment of the start, the others when training is under way.
        deadline = time.monotonic() + moments.uniform(0.0, 2.0)
        while number % 2 and saved_iteration(killed) <= reached and process.is_alive():
            time.sleep(0.01)
            deadline = time.monotonic() + moments.uniform(0.0, 0.3)
        time.sleep(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
        done += process.exitcode == -signal.SIGKILL
        before, reached = reached, saved_iteration(killed)
        assert reached >= before
        went_on += reached > before
        if done == kills:
            break
    assert done == kills
    assert went_on > kills // 4
    end = f"--trainer.max_steps={reached + 50}"
    for process in (start(killed, end), start(whole, end)):
        process.join()
        assert process.exitcode == 0
    one, other = last(whole), last(killed)
    assert one["global_step"] == reached + 50
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["optimizer_states"], other["optimizer_states"])
    assert "train/d_loss" in series(only_run(whole))
    assert series(only_run(killed)) == series(only_run(whole))


def test_full_disk_leaves_the_checkpoint_before(mnist_root: Path, tmp_path: Path) -> None:
    """On a real one, of 24 MB, in a mount namespace of its own."""
    (tmp_path / "runs").mkdir()
    apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = "mount -t tmpfs -o size=24m tmpfs runs"
    tried = subprocess.run([*apart, "sh", "-c", mount], cwd=tmp_path, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", f"--data.root={mnist_root}"]
    keep = ("--checkpoint.keep_all=true", "--checkpoint.every_n_iterations=5", "--trainer.max_steps=100")
    fit = " ".join([*command, "--metrics.num_samples=0", "--trainer.accelerator=cpu", *keep])
    script = f"{mount} && {fit}; echo status $?; cp -r runs kept"
    done = subprocess.run([*apart, "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "status 2" in done.stdout, done.stderr
    assert "could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    files = list((tmp_path / "kept").glob("*/*/checkpoints/*"))
    assert all(not path.name.startswith(".") for path in files)
    for path in files:
        torch.load(path, weights_only=True)
    kept = [int(path.stem[-6:]) for path in files if path.stem.startswith("iteration")]
    assert saved_iteration(tmp_path / "kept") >= max(kept) - 5


def test_two_runs_at_once_do_not_meet(mnist_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", f"--data.root={mnist_root}", *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*command, "--trainer.max_steps=20", f"--seed_everything={seed}"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for seed in (1, 2)
    ]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    found = [path.parent for path in (tmp_path / "runs").glob("*/*/config.yaml")]
    assert len(found) == 2
    contents = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in found]
    assert {content["hyper_parameters"]["seed"] for content in contents} == {1, 2}
    assert {content["global_step"] for content in contents} == {20}
    assert all(len(list(folder.glob("events*"))) == 1 for folder in found)
