"""Jobs that torchrun or SLURM may start again, and the run with which such a job then goes on."""

import json
import os
import secrets
from pathlib import Path

from torch.distributed import TCPStore


def own_jobs() -> list[str]:
    """Name the jobs that this process is part of: the same names in each of a job's processes, at each of its starts.

    SLURM numbers its jobs. torchrun does not (its run id is `none`, or what a person typed, again and again), and neither does
    its restart count tell: each machine counts for itself. But it keeps a store that outlives the processes it starts, and the
    first to come leaves a name there.
    """
    jobs = []
    if "SLURM_JOB_ID" in os.environ:
        jobs.append(f"slurm {os.environ['SLURM_JOB_ID']}")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        jobs.append(f"torchrun {store.compare_set('bngan/job', '', secrets.token_hex(8)).decode()}")
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
