"""Each precision trains with each loss and batching on one rank and on two; batch norm's statistics stay in full precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngan.batchnorm.layers import ReferenceBatchNorm, VirtualBatchNorm
from bngan.cli import main
from tests.conftest import only_run
from tests.integration.ranks import launch

RANKS = (1, 2)
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "64-true": torch.float64}
BATCHINGS = ("joint", "separate")
LOSSES = ("non_saturating", "minimax", "least_squares", "hinge", "wasserstein", "relativistic")
CASES: dict[tuple[str, ...], dict[str, Any]] = {
    (precision, batching, loss): {
        "precision": precision,
        "batching": batching,
        "loss": loss,
        **({"d_norm": "layer"} if loss == "wasserstein" else {}),
    }
    for precision in PRECISIONS
    for batching in BATCHINGS
    for loss in LOSSES
}
QUIET = {"precision": "32-true", "g_norm": "layer", "d_norm": "layer", "count": True}
# Updates in an iteration, each of which needs one message.
MESSAGES: dict[tuple[str, ...], tuple[dict[str, Any], int]] = {
    ("one of each",): (QUIET, 2),
    ("three of D",): ({**QUIET, "n_critic": 3}, 4),
    ("clipped",): ({**QUIET, "g_clip": 0.1, "d_clip": 0.1}, 2),
}
ALL = {**CASES, **{case: settings for case, (settings, _) in MESSAGES.items()}}
Results = dict[tuple[int, int], dict[tuple[str, ...], dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What came out, by (number of ranks, rank) and case."""
    folder = tmp_path_factory.mktemp("precisions")
    found: Results = {}
    for ranks in RANKS:
        for rank, cases in enumerate(launch("tests.integration.precisions", ranks, folder, list(ALL.values()), timeout=600)):
            found[ranks, rank] = dict(zip(ALL, cases, strict=True))
    return found


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_precision_trains(case: tuple[str, ...], ranks: int, results: Results) -> None:
    dtype = PRECISIONS[case[0]]
    for rank in range(ranks):
        result = results[ranks, rank][case]
        assert all(torch.tensor(result["losses"]).isfinite())
        # A bias that a normalization takes away again has no gradient but rounding's.
        assert [name for name in result["unmoved"] if not name.endswith("bias")] == []
        for name, value in result["state"].items():
            assert not value.is_floating_point() or (value.dtype == dtype and value.isfinite().all()), name
        # That batch norm was really given half precision is what makes the statistics' dtype worth testing.
        assert result["seen"] == [str(torch.bfloat16 if case[0] == "bf16-mixed" else dtype)]


def statistics(result: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value for name, value in result["state"].items() if "running_" in name and not name.startswith("generator_ema")
    }


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batching", BATCHINGS)
def test_running_statistics_of_mixed_precision_are_those_of_full_precision(batching: str, ranks: int, results: Results) -> None:
    mixed, full = (statistics(results[ranks, 0][precision, batching, "hinge"]) for precision in ("bf16-mixed", "32-true"))
    assert len(full) == 8
    for name, value in full.items():
        moved = float((value - (1 if name.endswith("var") else 0)).abs().max())
        assert 0 < float((mixed[name] - value).abs().max()) < 2**-8 < 0.05 < moved, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks_train_like_one_in_each_precision(precision: str, results: Results) -> None:
    tolerance = {"32-true": 1e-4, "bf16-mixed": 2**-8, "64-true": 1e-9}[precision]
    one, two = (statistics(results[ranks, 0][precision, "joint", "hinge"]) for ranks in RANKS)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", MESSAGES, ids=" ".join)
def test_gradients_of_an_update_travel_once_in_one_message(case: tuple[str, ...], results: Results) -> None:
    _, updates = MESSAGES[case]
    for rank in range(2):
        result = results[2, rank][case]
        # The broadcast is of one number, by which Lightning tells whether the first rank was asked to stop.
        assert result["messages"] == {"c10d::allreduce_": 3 * updates, "c10d::broadcast_": 3}
    assert results[1, 0][case]["messages"] == {}


@pytest.mark.parametrize("synchronized", [False, True])
def test_statistics_of_half_precision_input_are_worked_out_in_float32(synchronized: bool) -> None:
    # With a mean of 30, a mean in bfloat16 would be off by up to 1/16, a sixteenth of the standard deviation.
    z = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    ours = ReferenceBatchNorm(8, eps=1e-5, momentum=0.1, synchronized=synchronized)
    torchs = nn.BatchNorm1d(8, eps=1e-5, momentum=0.1)
    output = ours(z)
    expected = torchs(z.float())
    assert output.dtype == torch.bfloat16
    assert ours.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=2**-8)
    ours.eval()
    assert ours(z).dtype == torch.bfloat16


def test_virtual_batch_norm_of_half_precision_input_is_worked_out_in_float32() -> None:
    z = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    layer = VirtualBatchNorm(8, reference_size=32, eps=1e-5)
    output = layer(z)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(z.float()), rtol=2**-8, atol=2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_trains_on_a_gpu(
    precision: str, tmp_path: Path, mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--trainer.precision={precision}", "--trainer.accelerator=gpu", "--trainer.max_steps=20"]
    assert main(["fit", *flags, "--metrics.num_samples=0", f"--data.root={mnist_root}"]) == 0
    content = torch.load(only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in content["state_dict"].items():
        assert not value.is_floating_point() or (value.dtype == torch.float32 and value.isfinite().all()), name
