"""The processes of each start by torchrun meet at a port of that start's own."""

import multiprocessing
import os
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from bngan import rendezvous
from bngan.errors import UsageError
from bngan.rendezvous import agree_on_port

RANKS = 3


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
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
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
