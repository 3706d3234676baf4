"""Jobs that torchrun or SLURM may start again, and the run with which such a job then goes on."""

import json
import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistStoreError, TCPStore

PATIENCE = timedelta(minutes=10)
FROM_AGENT = "TORCHELASTIC_USE_AGENT_STORE"


def join_job() -> list[str]:
    """Name the jobs that this process is part of: the same names in each of a job's processes, at each of its starts.

    SLURM numbers its jobs. torchrun does not (its run id is `none`, or what a person typed, again and again), and its restart
    count does not tell either: each machine counts for itself. But it keeps a store that outlives the processes it starts,
    and the first to come leaves a name there.

    Because that store also keeps the addresses of processes that have died, on which a second start's would wait in vain,
    the processes agree on a port of their own, where torch then makes them meet.

    Raises:
        TimeoutError: if not all of torchrun's processes come within 10 minutes.
    """
    jobs = []
    if "SLURM_JOB_ID" in os.environ:
        jobs.append(f"slurm {os.environ['SLURM_JOB_ID']}")
    if os.environ.get(FROM_AGENT) == "True":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
        jobs.append(f"torchrun {store.compare_set('bngan/job', '', secrets.token_hex(8)).decode()}")
        os.environ |= {"MASTER_PORT": _agree_on_port(store), FROM_AGENT: "False"}
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and os.environ["RANK"] == "0":
        print("torchrun started this job again, but keeps no store from start to start: a new run begins.", flush=True)
    return jobs


def interrupted_run(runs: Path, jobs: list[str], command: str) -> Path | None:
    """Return the newest of the folders in `runs` that this command began at an earlier start of one of these jobs."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        # Numbers come again after a cluster was set up anew, and this job cannot have begun anything yet.
        jobs = [job for job in jobs if not job.startswith("slurm")]
    if not jobs:
        return None
    found = []
    for path in runs.glob("*/run.json"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # another run may be writing it
        if set(record.get("job", [])) & set(jobs) and record["command"] == command:
            found.append(path.parent)
    return max(found, default=None)


def _agree_on_port(store: TCPStore) -> str:
    """Return a free port of the first process's machine, the same in all processes of this start and in no earlier one.

    Each of the others calls by a name that it has just made up, so an answer to it cannot be left from an earlier start.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    late = f"not all of the {ranks} processes came within 10 minutes; is the command running on every machine?"
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"bngan/call/{rank}", name)
        try:
            port, start = store.get(f"bngan/answer/{name}").decode().split()
        except DistStoreError as error:
            raise TimeoutError(late) from error
        store.add(f"bngan/heard/{start}", 1)
        return port
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    start, deadline = secrets.token_hex(8), time.monotonic() + PATIENCE.total_seconds()
    while store.add(f"bngan/heard/{start}", 0) < ranks - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(late)
        for call in [f"bngan/call/{other}" for other in range(1, ranks)]:
            if store.check([call]):
                store.set(f"bngan/answer/{store.get(call).decode()}", f"{port} {start}")
        time.sleep(0.05)
    return str(port)
