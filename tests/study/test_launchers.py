"""Launchers: processes side by side, which may be killed and never outlive who started them, and jobs of a cluster."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from bngan.distributed import FIRST_PROCESS
from bngan.errors import UsageError
from bngan.study.launchers import Cluster, Launcher, Processes, is_memory_full, ray, slurm
from bngan.study.record import Record
from bngan.study.runner import run_study
from bngan.study.spec import Result, Run, first_choice, runs_of
from tests.conftest import REPOSITORY
from tests.study.stand_ins import at_once, failed_once, small_study, wrong

STUDY = small_study()
RUNS = runs_of(STUDY, STUDY.blocks[0])
FIRST = first_choice(STUDY, STUDY.blocks[1])


def all_done(launcher: Launcher[Result], waiting: list[Run]) -> list[Result]:
    """Do runs that nobody kills."""
    results: list[Result] = []
    while waiting or launcher.busy:
        while waiting and launcher.room:
            runs = launcher.take(waiting)
            launcher.start(runs)
            waiting = waiting[len(runs) :]
        for ended in launcher.ended():
            assert ended.outcomes is not None
            results += ended.outcomes
    return results


def test_processes_do_every_run_and_one_that_is_killed_or_out_of_memory_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(STUDY, tmp_path)
    run_study(STUDY, record, Processes(2, functools.partial(failed_once, tmp_path)), lambda block, pilots: FIRST)
    told = capsys.readouterr().out
    assert "F/T/a0/0.001/3: its process ended: Killed; once more by itself when the others have ended." in told
    assert "A/B/a3/0.001/101: memory was full; once more by itself" in told
    assert len(record.results) == 12 + 11
    assert all(result.failure is None for result in record.results.values())
    processes = {result.measured[0]["process"] for result in record.results.values()}
    assert len(processes) in (2, 3)  # one of the three may have ended nothing
    assert os.getpid() not in processes
    if sys.platform == "linux":
        assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_what_goes_wrong_in_a_process_is_told_here() -> None:
    launcher = Processes(1, wrong)
    try:
        for run, words in zip(RUNS, ("no such data; give others", "AssertionError: never"), strict=False):
            with pytest.raises(RuntimeError, match=words):
                all_done(launcher, [run])
        with pytest.raises(OSError, match="No space left") as full:
            all_done(launcher, [run for run in RUNS if (run.arm, run.seed) == ("a3", 101)])
        assert full.value.filename == "a.png"
        assert "in wrong" in full.value.__notes__[0]
    finally:
        launcher.close()


def test_idle_process_that_is_killed_is_a_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(connection: Connection, runs: list[Run]) -> None:
        raise ConnectionResetError

    launcher = Processes(1, at_once)
    try:
        (result,) = all_done(launcher, RUNS[:1])
        os.kill(result.measured[0]["process"], signal.SIGKILL)
        time.sleep(0.2)
        launcher.start(RUNS[:1])
        ended = []
        while not ended:
            ended = launcher.ended()
        assert (ended[0].outcomes, ended[0].fault) == (None, "its process ended: Killed")
        monkeypatch.setattr(Connection, "send", reset)  # as some systems say the same
        launcher.start(RUNS[:1])
        assert launcher.busy
    finally:
        launcher.close()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: tried 4 GB"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_full_memory_is_told_from_defects(error: Exception, full: bool) -> None:
    assert is_memory_full(error) is full


PARENT = """
import os, time
from bngan.study.launchers import Processes
from tests.study.stand_ins import asleep, small_study
from bngan.study.spec import runs_of

if __name__ == "__main__":
    study = small_study()
    launcher = Processes(1, asleep)
    launcher.start(runs_of(study, study.blocks[0])[:1])
    while not os.path.exists("worker"):
        time.sleep(0.05)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    another = {FIRST_PROCESS: str(os.getpid())}  # as in a notebook that has trained, and starts a study
    environment = {**os.environ, **another, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "parent.py"], cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
    worker = int((tmp_path / "worker").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_cluster_jobs_share_what_waits_and_what_is_lost_comes_back_as_nothing() -> None:
    sizes: list[int] = []

    def work(runs: list[Run]) -> list[Result]:
        sizes.append(len(runs))
        if any(run.seed == 102 for run in runs[:1]):
            raise ConnectionError("the machine is gone")
        return [at_once(run) for run in runs]

    with ThreadPoolExecutor() as pool:
        cluster: Cluster[Result] = Cluster(3, lambda runs: pool.submit(work, list(runs)))
        chunk = cluster.take(RUNS)
        assert len(chunk) == 4
        cluster.start(chunk)
        cluster.start([run for run in RUNS if run.seed == 102])
        assert cluster.room == 1
        assert cluster.busy
        ended = []
        while cluster.busy:
            ended += cluster.ended()
    assert sorted((len(one.outcomes or []), one.fault) for one in ended) == [
        (0, "ConnectionError: the machine is gone"),
        (4, ""),
    ]
    assert sorted(sizes) == [4, 6]


def test_cluster_job_is_of_few_runs_so_that_little_is_lost_with_it() -> None:
    with ThreadPoolExecutor() as pool:
        cluster: Cluster[Result] = Cluster(1, lambda runs: pool.submit(lambda: [at_once(run) for run in runs]))
        assert [run.id for run in cluster.take(RUNS)] == [run.id for run in RUNS[:8]]
        assert len(cluster.take(RUNS[:3])) == 3


@pytest.mark.parametrize(("engine", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_engine_that_is_not_installed_is_told_with_what_to_install(engine: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UsageError, match=rf"pip install 'bngan\[{engine}\]'"):
        slurm(1, at_once, tmp_path) if engine == "slurm" else ray(1, at_once)


def test_runs_go_through_submitit(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    results = all_done(slurm(2, at_once, tmp_path, cluster="local"), RUNS)
    assert sorted(result.run.id for result in results) == sorted(run.id for run in RUNS)


def test_without_slurm_jobs_go_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # on which there is no srun
    with pytest.raises(UsageError, match="this machine has no SLURM"):
        slurm(2, at_once, tmp_path)


@pytest.mark.slow
def test_runs_go_through_ray() -> None:
    pytest.importorskip("ray")
    results = all_done(ray(2, at_once), RUNS)
    assert sorted(result.run.id for result in results) == sorted(run.id for run in RUNS)
