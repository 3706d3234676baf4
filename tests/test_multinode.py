"""Two machines train as one, started by torchrun, by SLURM or by hand; a job that is started again goes on with its run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TRAIN = str(REPOSITORY / "scripts" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = ("10.97.0.1", "10.97.0.2")
SETTINGS = (
    "--metrics.num_samples=0",
    "--trainer.accelerator=cpu",
    "--trainer.precision=64-true",
    "--trainer.max_steps=12",
    "--trainer.log_every_n_steps=1",
)
# A machine has a name of its own, and knows the other's.
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class Host:
    """A machine as far as the network goes: a network namespace with an address and a host name."""

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
    made = [Host(f"bngan-{os.getpid()}-{number}", number, names) for number in (0, 1)]
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
