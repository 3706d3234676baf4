"""What launchers have left in the environment is refused; the processes of a start meet at a port of that start's own."""

import multiprocessing
import os
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from bngan import rendezvous
from bngan.distributed import FIRST_PROCESS
from bngan.errors import UsageError
from bngan.rendezvous import agree_on_port, check_environment, check_meeting_place, launched

RANKS = 3
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "it",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "it", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}
SRUN = {**JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
# What a process may find in its environment: who has started it, beside others, and how many on how many machines.
SOUND: dict[str, tuple[dict[str, str], tuple[str, int, int] | None]] = {
    "nothing": ({}, None),
    "a pod of its own": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}, None),
    "the first process": ({"LOCAL_RANK": "1", FIRST_PROCESS: "1"}, None),
    "torchrun": (TORCHRUN, ("torchrun", 2, 2)),
    "srun": (SRUN, ("srun", 2, 2)),
    "torchrun in srun": ({**SRUN, **TORCHRUN}, ("torchrun", 2, 2)),
    "a job without srun": ({**JOB, "SLURM_PROCID": "0"}, None),
    "a shell in a job": ({**SRUN, "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, None),
}
# What is left from something else: the variable that is named.
LEFT: dict[str, tuple[dict[str, str], str]] = {
    "a local rank": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
    "the first local rank": ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
    "this process's own": ({"LOCAL_RANK": "0", FIRST_PROCESS: str(os.getpid())}, "LOCAL_RANK=0"),
    "a rank": ({"RANK": "1"}, "RANK=1"),
    "no rank at all": ({"RANK": "banana"}, "RANK=banana"),
    "a machine": ({"GROUP_RANK": "1"}, "GROUP_RANK=1"),
    "a task": ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3"),
    "a rank of another launcher": ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK=0"),
    "a part of torchrun's": ({"TORCHELASTIC_RUN_ID": "it"}, "TORCHELASTIC_RUN_ID"),
    "no port": ({"MASTER_PORT": "banana"}, "MASTER_PORT=banana"),
    "port 0": ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
    "a port too high": ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*TORCHRUN, *SRUN, FIRST_PROCESS, "TORCHELASTIC_USE_AGENT_STORE"}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("case", SOUND)
def test_launcher_is_known_by_all_that_it_sets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = SOUND[case]
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    check_environment()
    assert launched() == expected
    own = str(os.getpid())
    assert os.environ.get(FIRST_PROCESS) == (None if "torchrun" in case else given.get(FIRST_PROCESS, own))


@pytest.mark.parametrize("case", LEFT)
def test_variable_that_is_left_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, named = LEFT[case]
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"{named} is .*unset"):
        check_environment()


def test_tasks_whose_share_of_a_machine_slurm_does_not_say_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UsageError, match="--ntasks-per-node"):
        launched()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert launched() == ("srun", 1, 1)


def test_taken_port_and_foreign_address_are_refused() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        for address in ("localhost", ""):
            with pytest.raises(UsageError, match=rf"port {port} of .*in use.*MASTER_PORT to a free port"):
                check_meeting_place(address, port)
    for address in ("localhost", ""):
        check_meeting_place(address, port)
    for address in ("192.0.2.1", "no-such-machine.invalid"):
        with pytest.raises(UsageError, match=rf"{address}.*unset MASTER_PORT and MASTER_ADDR"):
            check_meeting_place(address, port)


def test_torchrun_that_is_gone_is_told_of_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "STORE_TIMEOUT", timedelta(seconds=0.5))
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    for name, value in {**TORCHRUN, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"no torchrun is at localhost:{port}.*unset TORCHELASTIC_RUN_ID"):
        agree_on_port()


def ports_of_a_start(store_port: int) -> list[str]:
    """Return the port that each of three processes that a torchrun starts ends up with."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def join(rank: int) -> None:
        given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store_port), "WORLD_SIZE": str(RANKS), "RANK": str(rank)}
        os.environ |= {**given, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        agree_on_port()
        results.put(os.environ["MASTER_PORT"])

    processes = [context.Process(target=join, args=(rank,), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.kill()


def test_each_start_meets_at_a_port_of_its_own() -> None:
    store = TCPStore("localhost", 0, is_master=True)
    store.set("bngan/call/1", "dead")  # left by a process that died before it was answered
    first, second = ports_of_a_start(store.port), ports_of_a_start(store.port)
    for start in (first, second):
        assert len(start) == RANKS
        assert len(set(start)) == 1
    assert len({first[0], second[0], str(store.port)}) == 3


def test_nothing_changes_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    agree_on_port()
    assert os.environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_told_of(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=1))
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "RANK": str(rank)}
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="not all 2 processes"):
        agree_on_port()
