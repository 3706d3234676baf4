"""`bngan sample`: the weights and the statistics that are asked for."""

from pathlib import Path

import numpy as np
import pytest

from bngan import GAN
from bngan.batchnorm.statistics import EVAL_STATISTICS
from bngan.checkpoint import load_gan
from bngan.cli import main
from bngan.images import to_uint8
from bngan.sampler import Weights
from tests.conftest import Command, only_run
from tests.test_gan import images, tiny, trainer

WEIGHTS: tuple[Weights, ...] = ("raw", "ema")


def saved(gan: GAN, folder: Path, iterations: int) -> Path:
    run = trainer(folder, max_steps=iterations)
    run.fit(gan, images())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def sampled(path: Path, *arguments: str) -> np.ndarray:
    """Return 20 samples that the command draws from a checkpoint, in 0 to 255."""
    output = path.parent / "samples.npz"
    assert main(["sample", str(path), "--num=20", f"--output={output}", "--force", *arguments]) == 0
    return np.load(output)["images"].astype(int)


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_command_samples_the_weights_and_by_the_statistics_that_are_asked_for(tmp_path: Path) -> None:
    gan = tiny(g_lr=0.05, ema_decay=0.9)
    path = saved(gan, tmp_path, iterations=20)
    found = {weights: sampled(path, f"--weights={weights}") for weights in WEIGHTS}
    assert furthest(found["raw"], found["ema"]) > 10
    assert np.array_equal(sampled(path), found["ema"])
    for weights in WEIGHTS:
        with gan.sampler(weights) as sampler:
            expected = to_uint8(sampler.samples(0, 20)).numpy().astype(int)
        assert furthest(found[weights], expected) <= 1
    running, batch, precise = (sampled(path, f"--statistics={statistics}") for statistics in EVAL_STATISTICS)
    assert np.array_equal(running, found["ema"])
    assert furthest(running, batch) > 1
    assert furthest(batch, precise) > 1


def test_command_cannot_sample_an_average_that_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tiny(ema_decay=0.0), tmp_path, iterations=3)
    for weights, status in (("raw", 0), ("ema", 2)):
        assert main(["sample", str(path), "--num=2", f"--weights={weights}", f"--output={tmp_path / weights}.npz"]) == status
    answer = capsys.readouterr().err
    assert "ema_decay" in answer
    assert "Traceback" not in answer


def test_statistics_are_no_choice_where_the_generator_has_no_batch_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for norm, status in (("batch", 0), ("layer", 2)):
        path = saved(tiny(g_norm=norm), tmp_path, iterations=1)
        assert main(["sample", str(path), "--num=2", "--statistics=precise", f"--output={tmp_path / norm}.npz"]) == status
    assert "this generator has no batch norm, so statistics have no effect on it; leave them out" in capsys.readouterr().err


@pytest.mark.parametrize(("synchronized", "together"), [pytest.param(True, 32, marks=pytest.mark.slow), (False, 16)])
def test_samples_of_two_ranks_are_normalized_in_one_process_as_they_were_in_training(
    synchronized: bool, together: int, train: Command, mnist_root: Path, tmp_path: Path
) -> None:
    flags = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    sizes = ("--data.batch_size=32", "--model.hidden_dim=8", "--metrics.num_samples=0")
    norms = (f"--trainer.sync_batchnorm={str(synchronized).lower()}", "--model.eval_statistics=batch")
    done = train("fit", *flags, *sizes, *norms, f"--data.root={mnist_root}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    path = only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    gan, found = load_gan(path), sampled(path)
    for size in (16, 32):
        with gan.sampler() as sampler:
            expected = to_uint8(sampler.generate(gan.sample_latents(0, size))).numpy().astype(int)
        assert (furthest(found[:16], expected[:16]) <= 1) == (size == together)
