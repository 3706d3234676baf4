"""The benchmark compares like with like, and says what it found."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import bare_gan
import benchmark
import pytest
import timed_fit
import torch
from lightning.pytorch import Trainer, seed_everything
from performance_page import Result, table, write_page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard.writer import SummaryWriter

from bngan import rng
from bngan.gan import GAN
from bngan.networks import ConvDiscriminator, ConvGenerator, Discriminator, Generator
from tests.conftest import REPOSITORY

BENCHMARK = str(REPOSITORY / "scripts" / "benchmark.py")


@pytest.mark.parametrize(("network", "hidden_dim", "shape"), [("mlp", 32, (784,)), ("conv", 4, (1, 28, 28))])
def test_bare_loop_ends_at_the_weights_of_fit(
    network: Literal["mlp", "conv"], hidden_dim: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    # In float64, because a bias in front of batch norm has a gradient of rounding errors alone, which Adam amplifies.
    seed_everything(0, verbose=False)
    count, batch = 20, 16
    gan = GAN(network=network, hidden_dim=hidden_dim, seed=3).double()
    generator, discriminator = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    assert isinstance(generator, Generator | ConvGenerator)
    assert isinstance(discriminator, Discriminator | ConvDiscriminator)
    bare = bare_gan.BareGAN(generator, discriminator)
    images = torch.rand(count, batch, 1, 28, 28, dtype=torch.float64) * 2 - 1
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(gan, DataLoader(images, batch_size=None))  # pyright: ignore[reportArgumentType]  # a tensor is a data set
    first = copy.deepcopy(bare.generator.state_dict())
    for done, real in enumerate(images):
        bare.schedule(done, count, lr=2e-3)
        bare.iterate(real.view(batch, *shape), rng.generator(3, rng.Stream.ITERATION, done))

    assert gan.generator_ema is not None
    for ours, theirs in (
        (gan.generator, bare.generator),
        (gan.discriminator, bare.discriminator),
        (gan.generator_ema, bare.generator_ema),
    ):
        torch.testing.assert_close(counted_out(theirs), counted_out(ours), rtol=0, atol=1e-9)
    assert max(float((bare.generator.state_dict()[name] - first[name]).abs().max()) for name in first) > 1e-3


def counted_out(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return a network's weights and statistics without what bare loops do not keep."""
    left_out = ("num_batches_tracked", "instance_noise")
    return {name: value for name, value in network.state_dict().items() if not name.endswith(left_out)}


@pytest.mark.gpu
def test_bare_loop_trains_the_same_as_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(eager_iterations: int) -> Tensor:
        monkeypatch.setattr(bare_gan, "EAGER_ITERATIONS", eager_iterations)
        torch.manual_seed(0)
        pixels = torch.randint(256, (1280, 784), dtype=torch.uint8).cuda()
        gan = bare_gan.BareGAN(Generator().cuda(), Discriminator().cuda())
        bare_gan.train(gan, pixels, batch=128, lr=2e-3, iterations=20, warm_up=5)
        return gan.generator_ema(torch.randn(64, 100, generator=torch.Generator().manual_seed(1)).cuda())

    torch.testing.assert_close(trained(eager_iterations=3), trained(eager_iterations=20), rtol=0, atol=0.05)


def test_fit_is_timed_by_what_its_run_recorded(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, clock in ((50, 103.0), (100, 104.0), (150, 106.0), (200, 107.0)):
            writer.add_scalar("train/d_loss", 0.5, step, walltime=clock)
    (tmp_path / "config.yaml").write_text("data: {batch_size: 128}\n")
    seen = timed_fit.recorded(tmp_path, started=100.0, warm_up=100)
    assert seen == {"first_iteration": 3.0, "images_per_s": pytest.approx(100 * 128 / 3)}
    assert timed_fit.recorded(tmp_path, started=100.0, warm_up=200) == {"first_iteration": 3.0}

    began = EventAccumulator(str(tmp_path)).Reload().FirstEventTimestamp()
    assert began is not None
    with SummaryWriter(str(tmp_path)) as writer:
        for step, fid, clock in ((100, 2.0, began + 10), (200, 3.0, began + 30)):
            writer.add_scalar("val/fid", fid, step, walltime=clock)
            writer.add_scalar("floor/fid", 0.5, step, walltime=clock)
    (tmp_path / "quality.json").write_text(json.dumps({"validation_seconds": 12.0}))
    seen = timed_fit.recorded(tmp_path, started=100.0, warm_up=100)
    assert (seen["fid"], seen["floor"]) == (2.0, 0.5)
    assert seen["training_seconds"] == pytest.approx(30 - 12)


def recorded(*, commit: str = "0123456789", machine: str = "2 cores of Some & Such") -> Result:
    return {
        "command": "python scripts/benchmark.py step --recipe default",
        "date": "2026-01-02",
        "commit": commit,
        "machine": machine,
        "software": "Python 3.11, torch 2.11",
        "figures": {
            "fit, images/s": [9000.0, 9500.0, 10100.0],
            "bare, images/s": [10000.0, 10000.0, 10000.0],
            "textbook, images/s": [2500.0, 2500.0, 5000.0],
            "fit / bare": [0.9, 0.95, 1.01],
            "fit / textbook": [3.6, 3.8, 2.0],
        },
    }


def test_goal_is_met_if_the_median_reaches_it() -> None:
    lines = table("step default cpu", recorded())
    assert "| fit, images/s | 9,500 (9,000 to 10,100) |  |  |" in lines
    assert "| fit / bare | 0.95 (0.9 to 1.01) | at least 0.9 | yes |" in lines
    assert "| fit / bare | 0.95 (0.9 to 1.01) | at least 0.97 | no |" in table("step dcgan cpu", recorded())
    slow: Result = {**recorded(), "figures": {"seconds": [151.0], "FID": [2.0]}}
    assert "| seconds | 151 | at most 150 | no |" in table("quality default cpu", slow)
    assert "| FID | 2 | at most 2.1 | yes |" in table("quality default cpu", slow)


def test_page_shows_tables_a_chart_and_what_was_not_measured(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    write_page({"step default cpu": recorded(), "step default cuda": recorded(machine="A Card")}, page)
    text = page.read_text()
    for key in ("step default cpu", "step default cuda"):
        assert "\n".join(table(key, recorded())[:-1]) in text
    assert "- step dcgan cpu: fit / bare at least 0.97" in text
    assert "- step default cpu" not in text

    chart = ElementTree.fromstring((tmp_path / "performance.svg").read_text())
    labels = {"".join(element.itertext()).strip() for element in chart.iter("{http://www.w3.org/2000/svg}text")}
    expected = {"fit", "bare", "textbook", "9,500", "images per second (median; whiskers: least to most)"}
    assert expected | {"default cpu: 2 cores of Some & Such", "default cuda: A Card"} <= labels


@pytest.mark.parametrize(
    ("second", "complaint"),
    [(recorded(commit="another"), "several commits"), (recorded(machine="another"), "several machines")],
)
def test_page_is_of_one_commit_and_machine(second: Result, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        write_page({"step default cpu": recorded(), "step dcgan cpu": second}, tmp_path / "performance.md")
    assert not list(tmp_path.iterdir())
    write_page({"step default cpu": recorded(), "step dcgan cpu": recorded()}, tmp_path / "performance.md")


def quickly(folder: Path, *arguments: str) -> str:
    """Run a subcommand on next to nothing, with results in a folder; return what it printed."""
    command = [sys.executable, BENCHMARK, *arguments, f"--output={folder / 'results.json'}"]
    command += [] if arguments[0] == "page" else ["--quick", "--rounds=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_step_compares_all_sides_and_records_it(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"step dcgan cpu": recorded()}))
    printed = quickly(tmp_path, "step")
    results: dict[str, Result] = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"step dcgan cpu", "step default cpu"}
    assert results["step dcgan cpu"] == recorded()
    figures = results["step default cpu"]["figures"]
    fit, bare, textbook = (figures[f"{side}, images/s"][0] for side in ("fit", "bare", "textbook"))
    assert min(fit, bare, textbook) > 0
    assert figures["fit / bare"][0] == pytest.approx(fit / bare, rel=1e-3)
    assert figures["fit / textbook"][0] == pytest.approx(fit / textbook, rel=1e-3)
    assert "\n".join(table("step default cpu", results["step default cpu"])) in printed
    assert str(tmp_path) not in json.dumps(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("step", "--recipe=dcgan"), "step dcgan cpu"),
        (("quality",), "quality default cpu"),
        (("startup",), "startup cpu"),
        (("scaling",), "scaling cpu"),
        (("study",), "study cpu"),
    ],
)
def test_every_subcommand_has_a_place_on_the_page(arguments: tuple[str, ...], key: str, tmp_path: Path) -> None:
    quickly(tmp_path, *arguments)
    quickly(tmp_path, "page")
    results: dict[str, Result] = json.loads((tmp_path / "results.json").read_text())
    assert all(value > 0 for name, values in results[key]["figures"].items() if "growth" not in name for value in values)
    assert "\n".join(table(key, results[key])) in (tmp_path / "results.md").read_text()


def test_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARK, "step", f"--output={tmp_path / 'results.json'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    found: list[int] = []
    try:
        for _ in range(600):
            found = descendants(process.pid)
            if len(found) > 1:  # a side and the command that it times
                break
            time.sleep(0.1)
        assert len(found) > 1
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        left = list(filter(alive, found))
    finally:
        process.kill()
        for pid in filter(alive, found):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert left == []
    assert not (tmp_path / "results.json").exists()


def descendants(pid: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [found for child in map(int, told.split()) for found in (child, *descendants(child))]


def alive(pid: int) -> bool:
    """Whether a process goes on: one that was killed may still be there for a moment, as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("step", "--rounds=0"), "--rounds must be at least 1, got 0"),
        (("step", "--recipe=best_mlp"), "invalid choice"),
        (("page",), "there are no results yet; run python scripts/benchmark.py step first"),
    ],
)
def test_mistake_is_told_in_a_line(
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [BENCHMARK, *arguments, f"--output={tmp_path / 'results.json'}"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            benchmark.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_side_that_fails_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.execute([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path)
    assert ended.value.code == 2
    assert "ended with status 1:\nno such luck" in capsys.readouterr().err
