"""The benchmark compares like with like, and says what it found."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bare_gan
import benchmark
import pytest
import roofline
import torch
from lightning.pytorch import Trainer, seed_everything
from performance_page import TRIED_END, TRIED_START, UNMEASURED, text_table, write_page
from torch import Tensor

from bngan import GAN
from bngan.data.loader import ShardedBatches, TensorLoader, to_unit_range
from bngan.distributed import SharedDraws
from bngan.networks import Discriminator, Generator
from tests.conftest import REPOSITORY
from tests.test_signals import members

SHORT = ("--threads=1", "--limit=6", "--warm-up=2", "--epochs=1")


def run(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run one subcommand; return the JSON of its last line, and all that it printed."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "benchmark.py"), *arguments, f"--output={folder / 'results.json'}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_bare_loop_ends_at_the_weights_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64, because a bias in front of batch norm has a gradient of rounding errors alone, which Adam amplifies.
    seed_everything(0, verbose=False)
    count, batch = 20, 32
    gan = GAN().double()
    generator, discriminator = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    assert isinstance(generator, Generator)
    assert isinstance(discriminator, Discriminator)
    pair = bare_gan.players(generator, discriminator)
    pixels = torch.randint(256, (count * batch, 1, 28, 28), dtype=torch.uint8)
    rows = ShardedBatches(len(pixels), batch, train=True)
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
    drawn: list[Tensor] = []

    def remembered(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def remember(*arguments: Any) -> Tensor:
            values = draw(*arguments)
            drawn.append(values.clone())
            return values

        return remember

    monkeypatch.setattr(gan, "_draw", remembered(gan._draw))
    monkeypatch.setattr(SharedDraws, "rows", remembered(SharedDraws.rows))
    trainer.fit(gan, TensorLoader(pixels, torch.zeros(len(pixels), dtype=torch.long), rows))

    first = copy.deepcopy(pair.generator.state_dict())
    for done, (chosen, noise, z) in enumerate(zip(rows.tensors(), drawn[0::2], drawn[1::2], strict=True)):
        noise = noise.transpose(0, 1).reshape(2 * batch, -1)  # real images' first
        real = to_unit_range(pixels[chosen]).flatten(start_dim=1).double()
        bare_gan.alternate(pair, real, z, noise, bare_gan.schedule(done, count))

    assert gan.average is not None
    for ours, bare in (
        (gan.generator, pair.generator),
        (gan.discriminator, pair.discriminator),
        (gan.average.module, pair.average),
    ):
        expected = {name: value for name, value in ours.state_dict().items() if "num_batches" not in name}
        found = {name: value for name, value in bare.state_dict().items() if "num_batches" not in name}
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert max(float((pair.generator.state_dict()[name] - first[name]).abs().max()) for name in first) > 1e-3


def test_schedule_may_be_tensors_as_a_cuda_graph_reads_them() -> None:
    def trained(as_tensors: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        pair = bare_gan.players(Generator().double(), Discriminator().double())
        for done in range(4):
            now = bare_gan.schedule(done, 4)
            if as_tensors:
                now = bare_gan.Schedule(*(torch.tensor(value, dtype=torch.float64) for value in now))
            draws = (torch.rand(8, 784).double(), torch.randn(8, 100).double(), torch.randn(16, 784).double())
            bare_gan.alternate(pair, *draws, now)
        return pair.average.state_dict()

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-9)


@pytest.mark.gpu
def test_bare_loop_trains_as_a_cuda_graph() -> None:
    def trained(device: str) -> tuple[list[int], Tensor]:
        torch.manual_seed(0)
        seen: list[int] = []
        pixels = torch.randint(256, (1280, 784), dtype=torch.uint8).to(device)
        pair = bare_gan.train(pixels, epochs=2, batch=128, limit=None, on_alternation=seen.append)
        return seen, pair.average(torch.randn(64, 100, generator=torch.Generator().manual_seed(1)).to(device)).cpu()

    seen, images = trained("cuda")
    _, expected = trained("cpu")
    assert seen == list(range(1, 21))
    assert images.isfinite().all()
    # Other draws, so other weights; the same recipe, so much the same images.
    assert float((images.std() / expected.std()).detach()) == pytest.approx(1, abs=0.2)


def test_roofline_counts_every_product_once() -> None:
    batch = 16
    flops, shapes, moved = roofline.count(bare_gan.players(Generator(), Discriminator()), batch, "cpu")
    g_weights, d_weights = (100 * 128, 128 * 256, 256 * 784), (784 * 256, 256 * 128, 128)
    # Backward costs each layer two products, one for its weights and one for its input, unless nobody wants that.
    g_step = sum(2 * batch * weights * 3 for weights in g_weights) - 2 * batch * g_weights[0]
    d_step = sum(2 * 2 * batch * weights * 3 for weights in d_weights) - 2 * 2 * batch * d_weights[0]
    through_d = sum(2 * 2 * batch * weights * 2 for weights in d_weights)
    assert flops == g_step + d_step + through_d
    assert flops == sum(2 * m * k * n for m, k, n in shapes)
    assert moved > 4 * 7 * sum((*g_weights, *d_weights))


def test_never_is_above_every_number() -> None:
    assert benchmark.spread([3.0, None, 5.0]) == {"median": 5.0, "least": 3.0, "most": None, "all": [3.0, None, 5.0]}
    assert benchmark.spread([None, None, 5.0])["median"] is None


def test_goal_says_whether_the_median_meets_it() -> None:
    values = [0.9, 0.96, 1.0]
    assert benchmark.goal(values, (+1, 0.95))["met"]
    assert not benchmark.goal(values, (-1, 0.95))["met"]
    assert "met" not in benchmark.goal(values)


def recorded(device: str = "cpu") -> dict[str, Any]:
    speeds = {"fit": [9000.0, 9500.0, 10100.0], "bare": [10000.0], "textbook": [2500.0], "limit": [16000.0]}
    return {
        "command": "python scripts/benchmark.py step",
        "time": "2026-01-02T03:04:05+0000",
        "git": "0123456789" * 4 + "+changes",
        "machine": {"cpu": "Some & Such", "cores": 2, "system": "Linux"},
        "gpu": None if device == "cpu" else "A Card",
        "versions": {"python": "3.11", "bngan": "0.1.0", "torch": "2.11", "lightning": "2.6.4"},
        "settings": {"device": device, "threads": 2},
        "rows": {side: {"images/s": benchmark.spread(values)} for side, values in speeds.items()},
        "goals": {"fit / bare": benchmark.goal([0.95], (+1, 0.95))},
    }


def test_page_shows_tables_and_a_chart_and_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    write_page({"step on A Card": recorded("cuda"), "step": recorded()}, page)
    text = page.read_text()
    assert "| fit | 9,500 (9,000 to 10,100) |" in text
    assert "| fit / bare | 0.95 | at least 0.95 | yes |" in text
    assert text.index("## Images per second\n") < text.index("## Images per second, A Card\n")
    assert "commit 0123456789+changes" in text

    chart = ElementTree.fromstring((tmp_path / "performance.svg").read_text())
    drawn = "{http://www.w3.org/2000/svg}"
    labels = [element.text for element in chart.iter(f"{drawn}text")]
    widths = [float(element.attrib["width"]) for element in chart.iter(f"{drawn}rect")][1:]
    assert {"fit", "bare", "textbook", "limit", "9,500", "images/s; bar: median, line: least to most"} <= set(labels)
    assert widths == pytest.approx([widths[0] / 9500 * value for value in (9500, 10000, 2500, 16000)], abs=0.1)

    page.write_text(text.replace(f"{TRIED_START}\n\nSee", f"{TRIED_START}\n\nFused Adam: kept. See"))
    write_page({"step": recorded()}, page)
    kept = page.read_text()
    assert f"{TRIED_START}\n\nFused Adam: kept. See" in kept
    assert kept.count(TRIED_START) == kept.count(TRIED_END) == 1
    assert "A Card" not in kept
    assert UNMEASURED in kept
    assert UNMEASURED not in text


def test_step_compares_all_sides_and_records_it(tmp_path: Path) -> None:
    result, printed = run(tmp_path, "step", "--runs=1", *SHORT)
    assert list(result["rows"]) == ["fit", "fit, 1", "bare", "textbook", "limit"]
    assert all(row["images/s"]["median"] > 0 for row in result["rows"].values())
    assert result["goals"]["fit / bare"]["goal"] == "at least 0.95"
    speeds = {side: row["images/s"]["all"][0] for side, row in result["rows"].items()}
    assert result["goals"]["fit / bare"]["median"] == pytest.approx(speeds["fit"] / speeds["bare"], rel=1e-3)
    for side, row in result["rows"].items():
        assert re.search(rf"^{side} +{row['images/s']['median']:,.0f}", printed, re.MULTILINE)
    assert {"cpu", "cores"} <= result["machine"].keys()
    assert result["versions"]["torch"] == version("torch")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", result["git"])
    assert str(tmp_path) not in json.dumps(result)
    assert json.loads((tmp_path / "results.json").read_text()) == {"step": result}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("startup", "--runs=1", "--threads=1"), 3),
        (("fit", "--runs=1", "--samples=200", *SHORT), 2),
        (("memory", "--runs=1", "--samples=200", *SHORT), 3),
        (("quality", "--recipes", "default", "--seeds", "1", "2", "--samples=200", *SHORT), 1),
        (("scaling", "--runs=1", "--limit=16", "--warm-up=2", "--epochs=1"), 4),
        (("scaling", "--images", "--sizes", "1000", "5000", "--runs=1", "--alternations=20", "--warm-up=5", "--threads=1"), 2),
        (("scaling", "--folder", "--count=160", "--runs=1", "--threads=1", "--limit=2", "--warm-up=1", "--epochs=1"), 2),
    ],
)
def test_every_subcommand_adds_its_result_to_the_file_and_the_page(
    arguments: tuple[str, ...], rows: int, tmp_path: Path
) -> None:
    modes = {"--images": "images", "--folder": "folder", "--recipes": "default"}
    key = " ".join([arguments[0], *(modes[flag] for flag in arguments if flag in modes)])
    (tmp_path / "results.json").write_text(json.dumps({"step": recorded()}))
    result, printed = run(tmp_path, *arguments)
    assert len(result["rows"]) == rows
    known = json.loads((tmp_path / "results.json").read_text())
    assert known == {"step": json.loads(json.dumps(recorded())), key: result}
    for line in text_table(benchmark.rows_table(result)):
        assert line in printed
    command = [sys.executable, str(REPOSITORY / "scripts" / "benchmark.py"), "report", f"--output={tmp_path / 'results.json'}"]
    subprocess.run(command, check=True)
    assert all(f"| {side} |" in (tmp_path / "results.md").read_text() for side in result["rows"])


def test_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "benchmark.py"), "step", f"--output={tmp_path / 'results.json'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children: list[int] = []
    try:
        for _ in range(300):
            found = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
            )
            children = [int(pid) for pid in found.stdout.split()]
            if children:
                break
            time.sleep(0.1)
        assert children
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    finally:
        for pid in [*children, *members(process.pid)]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("step", "--runs=0"), "--runs must be at least 1, got 0"),
        (("report",), "holds no results; run python scripts/benchmark.py step first"),
        (("scaling", "--images", "--folder"), "not allowed with"),
        (("scaling", "--limit=6"), "multiple of 8"),
    ],
)
def test_mistake_is_told_in_a_line(arguments: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "benchmark.py"),
        *arguments,
        f"--output={tmp_path / 'results.json'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_side_that_fails_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys_argv, sys.argv = sys.argv, ["benchmark.py", "step", *SHORT]
    try:
        args = benchmark.parse()
    finally:
        sys.argv = sys_argv
    args.work = tmp_path
    with pytest.raises(SystemExit) as ended:
        benchmark.run([sys.executable, "-c", "raise SystemExit('no such luck')"], args)
    assert ended.value.code == 2
    assert "ended with status 1:\nno such luck" in capsys.readouterr().err
