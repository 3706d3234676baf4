"""Who has started the processes of a run, and where do they meet?

Processes that torchrun starts meet at a port of their start's own, agreed on through torchrun's store. torch would meet in that
store, which outlives processes and keeps the addresses of dead ones, for which others wait in vain.
"""

import os
import secrets
import socket
import time
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from bngan.distributed import FIRST_PROCESS
from bngan.errors import UsageError

TIMEOUT = timedelta(minutes=10)
STORE_TIMEOUT = timedelta(seconds=10)  # torchrun's store is there before its processes are
TORCHRUN = "TORCHELASTIC_RUN_ID"
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SET_BY_A_LAUNCHER = ("LOCAL_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID")


def check_environment() -> None:
    """Refuse what a launcher of other processes has left in the environment.

    Lightning believes it as soon as it is imported: a process takes itself for one of several, writes nothing, and waits for
    others that nobody starts.

    Raises:
        UsageError: naming the variable.
    """
    port, own = os.environ.get("MASTER_PORT", "29500"), str(os.getpid())
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"MASTER_PORT={port} is no port; set it to a number from 1 to 65535, or unset it")
    if TORCHRUN in os.environ:
        if missing := [name for name in SET_BY_TORCHRUN if name not in os.environ]:
            raise UsageError(f"{TORCHRUN} is set, as by torchrun, but {missing[0]} is not: unset it, or start by torchrun")
    elif "LOCAL_RANK" not in os.environ or os.environ.get(FIRST_PROCESS, own) == own:
        for name in SET_BY_A_LAUNCHER[: 3 if _is_step_of_slurm() else 4]:
            if name in os.environ and (name == "LOCAL_RANK" or os.environ[name] != "0"):
                raise UsageError(
                    f"{name}={os.environ[name]} is set, but neither torchrun nor srun has started this process: unset {name}, "
                    "or start by one of them"
                )
        os.environ[FIRST_PROCESS] = own


def launched() -> tuple[str, int, int] | None:
    """Return which launcher has started this process beside others, on each machine how many, and on how many machines.

    It is None where this process is alone or was started by the first one: also in a job of SLURM that starts it without srun.

    Raises:
        UsageError: if SLURM is not told the number of processes on each machine.
    """
    if TORCHRUN in os.environ:
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", each, int(os.environ["WORLD_SIZE"]) // each
    if not _is_step_of_slurm():
        return None
    tasks, machines = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UsageError(f"srun has started {tasks} tasks; say how many on each machine, srun --ntasks-per-node")
    return "srun", tasks // machines, machines


def _is_step_of_slurm() -> bool:
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"} <= os.environ.keys() and not interactive


def check_meeting_place(address: str, port: int) -> None:
    """Refuse an address and a port at which this machine cannot be reached by the run's other processes.

    Raises:
        UsageError: naming both, and what to set.
    """
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise UsageError(
            f"the processes of this run cannot meet at port {port} of {address or 'this machine'} ({reason}): set MASTER_PORT "
            "to a free port, or on a single machine unset MASTER_PORT and MASTER_ADDR"
        ) from error


def agree_on_port() -> None:
    """Let MASTER_PORT be a free port of the first process's machine, the same in all processes of this start and in no other.

    Raises:
        UsageError: if torchrun's store is not there, or not all processes come within 10 minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, ranks, token = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), secrets.token_hex(8)
    try:
        store = TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)
    except DistNetworkError as error:
        raise UsageError(
            f"no torchrun is at {address}:{port}: start by torchrun, or unset {TORCHRUN} and {', '.join(SET_BY_TORCHRUN)}"
        ) from error
    store.set_timeout(TIMEOUT)
    try:
        if rank == 0:
            port = _tell_port(store, ranks, start=token)
        else:
            store.set(f"bngan/call/{rank}", token)  # made up just now, so an answer to it is not left from an earlier start
            port, start = store.get(f"bngan/answer/{token}").decode().split()
            store.set(f"bngan/heard/{start}/{rank}", "")
    except (DistStoreError, TimeoutError) as error:
        raise UsageError(f"not all {ranks} processes came within 10 minutes; does the command run on every machine?") from error
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _tell_port(store: TCPStore, ranks: int, start: str) -> int:
    with socket.create_server(("", 0)) as server:
        port, deadline = server.getsockname()[1], time.monotonic() + TIMEOUT.total_seconds()
    for rank in range(1, ranks):
        while not store.check([f"bngan/heard/{start}/{rank}"]):
            if time.monotonic() > deadline:
                raise TimeoutError
            store.set(f"bngan/answer/{store.get(f'bngan/call/{rank}').decode()}", f"{port} {start}")
            time.sleep(0.05)
    return port
