"""Where do the processes that torchrun starts meet? At a port of this start's own, agreed on through torchrun's store.

torch would meet in that store, which outlives processes and keeps the addresses of dead ones, for which others wait in vain.
"""

import os
import secrets
import socket
import time
from datetime import timedelta

from torch.distributed import DistStoreError, TCPStore

from bngan.errors import UsageError

TIMEOUT = timedelta(minutes=10)


def agree_on_port() -> None:
    """Let MASTER_PORT be a free port of the first process's machine, the same in all processes of this start and in no other.

    Raises:
        UsageError: if not all processes come within 10 minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    rank, ranks, token = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), secrets.token_hex(8)
    try:
        if rank == 0:
            port = _tell_port(store, ranks, start=token)
        else:
            store.set(f"bngan/call/{rank}", token)  # made up just now, so an answer to it is not left from an earlier start
            port, start = store.get(f"bngan/answer/{token}").decode().split()
            store.set(f"bngan/heard/{start}/{rank}", "")
    except (DistStoreError, TimeoutError) as error:
        raise UsageError(f"not all {ranks} processes came within 10 minutes; does the command run on every machine?") from error
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _tell_port(store: TCPStore, ranks: int, start: str) -> str:
    with socket.create_server(("", 0)) as server:
        port, deadline = server.getsockname()[1], time.monotonic() + TIMEOUT.total_seconds()
    for rank in range(1, ranks):
        while not store.check([f"bngan/heard/{start}/{rank}"]):
            if time.monotonic() > deadline:
                raise TimeoutError
            store.set(f"bngan/answer/{store.get(f'bngan/call/{rank}').decode()}", f"{port} {start}")
            time.sleep(0.05)
    return str(port)
