"""Compiled networks train as the others do, are compiled once, and leave no trace in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bngan.cli import main
from tests.conftest import only_run

RUN = ("--trainer.accelerator=cpu", "--metrics.num_samples=0", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1")


def fit(folder: Path, mnist_root: Path, *settings: str) -> dict[str, Any]:
    assert main(["fit", *RUN, *settings, f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}"]) == 0
    return torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("--model.r1=1", "--model.d_norm=layer"), "compile cannot be combined with r1, r2 or gradient_penalty"),
        (("--model.d_dropout=0.1",), "compile cannot be combined with d_dropout"),
        (("--trainer.devices=2", "--trainer.accelerator=cpu"), "add --trainer.sync_batchnorm false"),
    ],
    ids=["penalties", "dropout", "devices"],
)
def test_compile_is_refused_where_torch_would_fail(
    settings: tuple[str, ...], reason: str, mnist_root: Path, tmp_path: Path, train: Any
) -> None:
    arguments = ("--model.compile=true", *settings, f"--data.root={mnist_root}", "--trainer.max_steps=1")
    result = train("fit", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_compile_without_a_compiler_is_refused(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--model.compile=true", f"--data.root={mnist_root}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *RUN, *arguments]) == 2
    assert "needs a C++ compiler, and there is no no-such-compiler" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [(), ("--model.batching=separate", "--model.loss=hinge", "--model.n_critic=2"), ("--model.d_norm=spectral",)]
    + [("--model.network=conv", "--model.hidden_dim=8", f"--model.g_norm={norm}") for norm in ("batch", "virtual", "instance")],
    ids=" ".join,
)
def test_a_compiled_run_equals_an_eager_one_and_is_compiled_once(
    settings: tuple[str, ...], mnist_root: Path, tmp_path: Path
) -> None:
    # Looking into batch norm, a validation and an epoch's end come after warm-up.
    settings = (
        *settings,
        "--trainer.precision=64-true",
        "--trainer.limit_train_batches=6",
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=1",
        "--batchnorm.every_n_iterations=4",
    )
    eager = fit(tmp_path / "eager", mnist_root, *settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = fit(tmp_path / "compiled", mnist_root, *settings, "--model.compile=true")
    # G once; D in its own turn, where its input needs no gradient, and in G's, where joint images do and separate fakes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 if "--model.batching=separate" in settings else 3)
    assert compiled["state_dict"].keys() == eager["state_dict"].keys()
    # A bias that a normalization takes away again has no gradient but rounding's, whose sign Adam follows.
    free = [name for name in eager["state_dict"] if not name.endswith(("bias", "running_mean"))]
    for name in free:
        torch.testing.assert_close(compiled["state_dict"][name], eager["state_dict"][name], rtol=1e-6, atol=1e-6, msg=name)
    assert any(not torch.equal(compiled["state_dict"][name], eager["state_dict"][name]) for name in free)
