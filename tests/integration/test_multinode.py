"""Several machines train as one, started by torchrun, by SLURM or by hand; a job that is started again goes on with its run.

Such jobs are started by --ckpt_path auto --run ID.

Two hosts are two network namespaces with addresses and host names of their own. SLURM is played by stand-ins for srun and
scontrol, which set the variables that the real ones set.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from bngan.cli import main
from tests.conftest import REPOSITORY, Command, only_run

TRAIN = str(REPOSITORY / "scripts" / "train.py")
# With -- before the script, or torchrun takes its --run for its own --run-path.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ADDRESSES = ("10.97.0.1", "10.97.0.2")
SETTINGS = (
    "--metrics.num_samples=0",
    "--trainer.accelerator=cpu",
    "--trainer.precision=64-true",
    "--trainer.log_every_n_steps=1",
    "--images.every_n_iterations=5",
    "--batchnorm.every_n_iterations=5",
    "--checkpoint.every_n_iterations=20",
    # Each of these checkpoints is one before a validation.
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.val_check_interval=20",
    "--trainer.limit_val_batches=2",
)
RESTARTABLE = ("--ckpt_path=auto", "--run=it")
SHORT, LONG = 10, 60
# A machine has a name of its own and knows the other's.
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'

# Starts the tasks of SLURM_NNODES machines, all of them this one, and ends as srun does.
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
command = [word for word in sys.argv[1:] if word not in ("--kill-on-bad-exit=1", "--cpus-per-task=1")]
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_NTASKS": str(nodes * each), "SLURM_PROCID": str(task),
                                   "SLURM_LOCALID": str(task % each), "SLURM_NODEID": str(task // each),
                                   "SLURM_STEP_ID": "0"})
    for task in range(nodes * each)
]
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) printf 'localhost\\nlocalhost\\n' ;;
  requeue) echo "$2" >> requeued ;;
esac
"""

Launch = Callable[..., list[subprocess.Popen[str]]]


class Host:
    """A machine as far as the network goes."""

    def __init__(self, namespace: str, number: int, names: Path) -> None:
        self.namespace, self.number, self.names = namespace, number, names

    def command(self, *arguments: str) -> list[str]:
        """Return what runs a command there."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", ENTER]
        return [*enter, f"host{self.number}", str(self.names), *arguments]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts, joined by a cable."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("two hosts are made by ip (iproute2) and unshare (util-linux), which are not here")
    names = tmp_path_factory.mktemp("hosts") / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} host{n}\n" for n, address in enumerate(ADDRESSES)))
    made = [Host(f"bngan-{uuid.uuid4().hex[:8]}-{number}", number, names) for number in (0, 1)]
    first, second = (host.namespace for host in made)
    steps = [["ip", "netns", "add", first], ["ip", "netns", "add", second]]
    steps.append(["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second])
    for host, address in zip(made, ADDRESSES, strict=True):
        steps.append(["ip", "-n", host.namespace, "address", "add", f"{address}/24", "dev", "cable"])
        steps += [["ip", "-n", host.namespace, "link", "set", device, "up"] for device in ("lo", "cable")]
        steps.append(host.command("true"))
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"two hosts cannot be made here: {' '.join(step[:3])}: {done.stderr.strip()}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start commands side by side, each in a folder of its own or a given one; what they leave behind is killed."""
    mark = f"BNGAN_TEST={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")

    def start(*commands: list[str], cwds: list[Path] | None = None, **variables: str) -> list[subprocess.Popen[str]]:
        processes = []
        for number, command in enumerate(commands):
            cwd = cwds[number] if cwds else tmp_path
            with (tmp_path / f"log-{number}").open("a") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=cwd,
                        env={**os.environ, "OMP_NUM_THREADS": "1", name: value, **variables},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                )
        return processes

    yield start
    for pid in processes_with(mark):
        os.kill(pid, signal.SIGKILL)


def processes_with(variable: str, words: str = "") -> list[int]:
    """Return the processes that have the variable in their environment and the words in their command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = variable.encode() in (folder / "environ").read_bytes().split(b"\0")
            if marked and words in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def workers(root: Path) -> list[tuple[int, int]]:
    """Return (rank, process) of the processes that train under a folder, lowest rank first."""
    found = []
    for name in ("RANK", "SLURM_PROCID"):
        for rank in (0, 1):
            for pid in processes_with(f"{name}={rank}", "scripts/train.py fit"):
                if str(root) in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append((rank, pid))
    return sorted(found)


def fit(mnist_root: Path, root: Path, steps: int, *settings: str) -> list[str]:
    """Return the words of a short training run in float64."""
    where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}")
    return [TRAIN, "fit", *RESTARTABLE, *where, *SETTINGS, *settings]


def finish(processes: list[subprocess.Popen[str]], folder: Path, timeout: float = 120) -> list[str]:
    """Wait for all of them and return what each printed."""
    for process in processes:
        process.wait(timeout)
    return [(folder / f"log-{number}").read_text() for number in range(len(processes))]


def wait_for_iteration(root: Path, number: int) -> None:
    for _ in range(900):
        if list(root.glob(f"*/*/samples/iteration-{number:06d}.png")):
            return
        time.sleep(0.1)
    raise AssertionError("training did not come that far")


def read(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def final_state(root: Path) -> dict[str, Tensor]:
    return read(only_run(root))


def starts(root: Path) -> list[int]:
    """Return the iterations from which the only run was started."""
    return [start["iteration"] for start in json.loads((only_run(root) / "run.json").read_text())["starts"]]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name].double(), value.double(), rtol=0, atol=1e-9, msg=name)


def assert_whole_series(root: Path, steps: int) -> None:
    """Check that TensorBoard shows each iteration once."""
    shown = EventAccumulator(str(only_run(root)), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=True)
    shown.Reload()
    every = {"train/": 1, "val/": 20, "bn/d_": 20, "bn/": 5}
    assert "val/d_loss" in shown.Tags()["scalars"]
    for tag in shown.Tags()["scalars"]:
        prefix = next((prefix for prefix in every if tag.startswith(prefix)), None)
        if prefix is not None:
            expected = list(range(every[prefix], steps + 1, every[prefix]))
            assert [event.step for event in shown.Scalars(tag)] == expected, tag
    assert [event.step for event in shown.Images("samples/fixed_z")] == list(range(0, steps + 1, 5))
    assert [event.step for event in shown.Images("samples/real")] == [0]


@pytest.fixture(scope="module")
def alone(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Tensor]]:
    """Return the state after a number of steps in one process without interruption."""
    known: dict[int, dict[str, Tensor]] = {}

    def state(steps: int) -> dict[str, Tensor]:
        if steps not in known:
            root = tmp_path_factory.mktemp("alone")
            assert main(fit(mnist_root, root, steps)[1:]) == 0
            known[steps] = final_state(root)
        return known[steps]

    return state


def slurm(task: int, number: str = "4711", **variables: str) -> list[str]:
    """Return what gives a command the variables of one of two tasks on two machines."""
    given = {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NAME": "bngan",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_NODELIST": "host[0-1]",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        **variables,
    }
    return ["env", *(f"{name}={value}" for name, value in given.items())]


def torchrun(kind: str, host: int, *options: str) -> list[str]:
    static = [f"--node-rank={host}", "--master-addr=host0"]
    c10d = ["--rdzv-backend=c10d", "--rdzv-endpoint=host0", "--rdzv-id=1"]
    return [*TORCHRUN, "--nnodes=2", *(static if kind == "static" else c10d), *options, "--"]


@pytest.mark.parametrize(
    "kind",
    ["variables", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("static", "c10d", "slurm"))],
)
def test_two_hosts_train_as_one_process_would(
    kind: str, hosts: list[Host], mnist_root: Path, tmp_path: Path, launch: Launch, alone: Callable[[int], dict[str, Tensor]]
) -> None:
    root, cwds = Path("runs"), [tmp_path / "0", tmp_path / "1"]
    commands = []
    for host, cwd in zip(hosts, cwds, strict=True):
        cwd.mkdir()
        words = fit(mnist_root, root, SHORT, "--trainer.num_nodes=2", "--trainer.devices=1")
        if kind == "slurm":
            words = [*slurm(host.number), sys.executable, *words]
        elif kind == "variables":
            given = ("MASTER_ADDR=host0", "MASTER_PORT=29400", f"NODE_RANK={host.number}")
            words = ["env", *given, sys.executable, *words]
        else:
            words = [*torchrun(kind, host.number), *words]
        commands.append(host.command(*words))
    processes = launch(*commands, cwds=cwds)
    logs = finish(processes, tmp_path)
    assert [process.returncode for process in processes] == [0, 0], logs
    assert "batch 128 over 2 x cpu" in logs[0]
    assert_same(alone(SHORT), final_state(cwds[0] / root))
    assert list(cwds[1].iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "victim"), [("standalone", 0), ("standalone", 1), ("c10d", 1), ("static", 0)])
def test_job_whose_worker_is_killed_goes_on_from_its_checkpoint(
    kind: str,
    victim: int,
    request: pytest.FixtureRequest,
    mnist_root: Path,
    tmp_path: Path,
    launch: Launch,
    alone: Callable[[int], dict[str, Tensor]],
) -> None:
    root = tmp_path / "runs"
    words = fit(mnist_root, root, LONG)
    if kind == "standalone":
        commands = [[*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--", *words, "--trainer.devices=2"]]
    else:
        words += ["--trainer.num_nodes=2", "--trainer.devices=1"]
        commands = [
            host.command(*torchrun(kind, host.number, "--max-restarts=1"), *words) for host in request.getfixturevalue("hosts")
        ]
    processes = launch(*commands)
    wait_for_iteration(root, 30)
    os.kill(dict(workers(root))[victim], signal.SIGKILL)
    logs = finish(processes, tmp_path)
    assert [process.returncode for process in processes] == [0] * len(processes), logs
    assert starts(root) in ([0, 20], [0, 40])
    assert_same(alone(LONG), final_state(root))
    assert_whole_series(root, LONG)


@pytest.mark.slow
def test_job_that_is_killed_before_its_first_checkpoint_begins_anew_in_its_folder(
    mnist_root: Path, tmp_path: Path, launch: Launch, alone: Callable[[int], dict[str, Tensor]]
) -> None:
    root = tmp_path / "runs"
    (process,) = launch([*TORCHRUN, "--standalone", "--max-restarts=1", "--", *fit(mnist_root, root, LONG)])
    wait_for_iteration(root, 5)
    os.kill(dict(workers(root))[0], signal.SIGKILL)
    (log,) = finish([process], tmp_path)
    assert process.returncode == 0, log
    assert starts(root) == [0, 0]
    assert_same(alone(LONG), final_state(root))
    assert_whole_series(root, LONG)


@pytest.mark.slow
def test_preempted_slurm_job_is_requeued_and_goes_on(
    mnist_root: Path, tmp_path: Path, launch: Launch, alone: Callable[[int], dict[str, Tensor]]
) -> None:
    root = tmp_path / "runs"
    programs = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    given = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "bngan",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "MASTER_PORT": str(free_port()),
    }
    own_words = [word for word in fit(mnist_root, root, LONG)[2:] if word not in RESTARTABLE]
    job = ["bash", str(REPOSITORY / "scripts" / "slurm.sbatch"), *own_words]
    (process,) = launch(job, **given)
    wait_for_iteration(root, 25)
    for _, pid in workers(root):
        os.kill(pid, signal.SIGTERM)
    (log,) = finish([process], tmp_path)
    assert process.returncode == 143, log
    assert "stopped at iteration" in log
    stopped = int(final_state(root)["iteration"])
    assert 20 < stopped < LONG
    assert (tmp_path / "requeued").read_text() == "4711\n"

    (process,) = launch(job, **given, SLURM_RESTART_COUNT="1")
    (log,) = finish([process], tmp_path)
    assert process.returncode == 0, log
    assert starts(root) == [0, stopped]
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert_same(alone(LONG), final_state(root))
    assert_whole_series(root, LONG)


@pytest.mark.slow
def test_processes_that_would_start_apart_are_refused(mnist_root: Path, tmp_path: Path, launch: Launch, train: Command) -> None:
    cwds = [tmp_path / "0", tmp_path / "1"]
    words = fit(mnist_root, Path("runs"), SHORT)
    for cwd in cwds:
        cwd.mkdir()
    done = train(*words[1:], cwd=cwds[0])
    assert done.returncode == 0
    words += ["--trainer.num_nodes=2", "--trainer.devices=1"]
    given = {"SLURM_RESTART_COUNT": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    processes = launch(*([*slurm(task, **given), sys.executable, *words] for task in (0, 1)), cwds=cwds)
    logs = finish(processes, tmp_path)
    assert [process.returncode for process in processes] == [2, 2], logs
    assert "process 1 would start at the beginning, but process 0 from it/checkpoints/last.ckpt" in logs[1]
    assert list(cwds[1].iterdir()) == []


def test_slurm_script_is_valid_bash() -> None:
    script = str(REPOSITORY / "scripts" / "slurm.sbatch")
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
