"""When the iteration is captured and replayed, with stand-ins for CUDA; and, on a GPU, that replays train as calls do."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from bngan import GAN, rng
from bngan.cuda_graph import CudaGraph
from bngan.iteration import Draws, Observed
from bngan.schedules import Schedule

# What was run, on which image, learning rate, draws and label.
Step = tuple[str, float, float, list[float], int | None]


class StandIn:
    """An iteration and what CudaGraph asks of torch.cuda, on a processor: a capture runs nothing, a replay reads its inputs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool) -> None:
        self.log: list[Step] = []
        self.capturable, self.inputs = capturable, None
        self.capturing, self.registered = False, 0
        pieces = {"Stream": Mock, "current_stream": Mock, "stream": nullcontext, "graph": self.capture}
        for name, piece in {**pieces, "CUDAGraph": lambda: self}.items():
            monkeypatch.setattr(torch.cuda, name, piece)

    @contextmanager
    def capture(self, graph: object, capture_error_mode: str) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def iteration(self, images: Tensor, schedule: Schedule[Tensor], draws: Draws, labels: Tensor | None) -> Observed:
        if self.capturing:
            self.inputs = (images, schedule, draws, labels)
        else:
            self.note("called", images, schedule, draws, labels)
        return Observed(*torch.zeros(len(Observed._fields)))

    def replay(self) -> None:
        assert self.inputs is not None
        self.note("replayed", *self.inputs)

    def note(self, how: str, images: Tensor, schedule: Schedule[Tensor], draws: Draws, labels: Tensor | None) -> None:
        label = None if labels is None else int(labels)
        self.log.append((how, float(images), float(schedule.g_lr), draws.uniform(images).flatten().tolist(), label))

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.registered += 1


def run_on_stand_in(cuda: StandIn, iterations: int, runs: int | None = None, *, labelled: bool = False) -> list[Step]:
    """Return what was run in that many iterations, the n-th on image n, of class n, with rate n / 8 and seeds from n on."""
    graph = CudaGraph(Mock(side_effect=cuda.iteration), torch.device("cpu"), runs)
    for number in range(iterations):
        seeds = range(number, number + (runs or 1))
        labels = torch.tensor([number]) if labelled else None
        graph(torch.tensor([float(number)]), torch.tensor([0.0, number / 8, 0.0, 0.0]), *seeds, labels=labels)
    return cuda.log


def expected(how: str, number: int, runs: int | None = None, *, labelled: bool = False) -> Step:
    draws = [float(torch.rand(1, generator=torch.Generator().manual_seed(number + run))) for run in range(runs or 1)]
    return how, float(number), number / 8, draws, number if labelled else None


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("runs", [None, 1, 3])
def test_fourth_iteration_is_captured_and_it_and_all_later_ones_are_replayed(
    runs: int | None, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = StandIn(monkeypatch, capturable=True)
    log = run_on_stand_in(cuda, 7, runs, labelled=labelled)
    called, replayed = ([expected(how, n, runs, labelled=labelled) for n in range(7)] for how in ("called", "replayed"))
    assert log == [*called[:3], *replayed[3:]]
    assert cuda.registered == (runs or 1)


def test_what_cannot_be_captured_is_said_in_one_line_and_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_on_stand_in(StandIn(monkeypatch, capturable=False), 7)
    assert log == [expected("called", n) for n in range(7)]
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be captured as a CUDA graph" in line
    assert "operation not permitted when stream is capturing" in line


# On a GPU -------------------------------------------------------------------------------------------------------------

ITERATIONS, BATCH = 200, 16
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "conv": {"network": "conv", "image_shape": (1, 16, 16), "hidden_dim": 8},
    "conv, separate, dropout": {
        "network": "conv",
        "image_shape": (1, 16, 16),
        "hidden_dim": 8,
        "batching": "separate",
        "d_dropout": 0.2,
    },
    "n_critic 2, R1, spectral, clipped": {"n_critic": 2, "r1": 0.1, "d_norm": "spectral", "d_clip": 1.0, "g_clip": 1.0},
    "WGAN-GP": {"loss": "wasserstein", "d_norm": "layer", "ema_buffers": "copy"},
    "classes, n_critic 2": {"classes": 3, "n_critic": 2},
    "virtual": {"d_norm": "virtual", "g_norm": "virtual"},
    "reference, ghost": {"d_norm": "reference", "g_norm": "ghost", "ghost_groups": 2},
}
CALLED_TO_CAPTURE = 4  # three eager iterations and the capture itself


class Calls:
    """Counts how often Python passes through D's first layer, which a replay does not."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


def trained(settings: dict[str, Any], *callbacks: Callback, hook: Any = None, strategy: str = "auto") -> GAN:
    """Return a GAN after ITERATIONS on a GPU, in float64, with a hook at D's first layer."""
    torch.manual_seed(0)
    gan = GAN(**settings)
    if hook is not None:
        gan.discriminator.net[0].register_forward_hook(hook)
    size = 64 if settings.get("d_norm") == "virtual" else BATCH
    shape = (ITERATIONS, size * gan.settings.n_critic, *gan.settings.image_shape)
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        strategy=strategy,
        precision="64-true",
        max_steps=ITERATIONS,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.rand(shape, generator=rng.generator(1), dtype=torch.float64) * 2 - 1
    labels = torch.randint(3, shape[:2], generator=rng.generator(2))  # which only a GAN with classes reads
    given = [*zip(batches, labels, strict=True)]
    trainer.fit(gan, DataLoader(given, batch_size=None))  # pyright: ignore[reportArgumentType]  # a list is a data set, too
    return gan.cpu()


def furthest(one: GAN, other: GAN) -> float:
    """Return the largest difference between weights and buffers."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_training_is_the_called_one(recipe: str) -> None:
    replays, calls = Calls(), Calls()
    replayed = trained(RECIPES[recipe], hook=replays)
    called = trained({**RECIPES[recipe], "cuda_graph": False}, hook=calls)
    assert calls.count % ITERATIONS == 0
    assert replays.count == calls.count // ITERATIONS * CALLED_TO_CAPTURE
    assert furthest(replayed, called) < 1e-9
    assert furthest(replayed, trained({**RECIPES[recipe], "seed": 1})) > 1e-6
    assert replayed.observed is not None
    assert called.observed is not None
    torch.testing.assert_close(tuple(replayed.observed), tuple(called.observed), rtol=0, atol=1e-9)


class LookInto(Callback):
    """Has some iterations called, as a callback does whose hooks are to see them."""

    def __init__(self, *iterations: int) -> None:
        self.iterations, self.blocks = iterations, ExitStack()

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: Tensor, batch_idx: int) -> None:
        if trainer.global_step in self.iterations:
            self.blocks.enter_context(gan.eager())

    def on_train_batch_end(self, trainer: Trainer, gan: GAN, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.blocks.close()


@pytest.mark.gpu
def test_iterations_that_are_looked_into_are_called_and_change_nothing() -> None:
    replays, looked = Calls(), Calls()
    replayed = trained({}, hook=replays)
    looked_into = trained({}, LookInto(0, 1, 10, 11, 12, 150, ITERATIONS - 1), hook=looked)
    assert looked.count == replays.count // CALLED_TO_CAPTURE * (CALLED_TO_CAPTURE + 7)
    assert furthest(replayed, looked_into) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])  # which draws from torch's own generator
def test_training_that_reads_a_value_back_says_so_and_goes_on(dropout: float, capsys: pytest.CaptureFixture[str]) -> None:
    def read_back(module: object, inputs: object, output: Tensor) -> None:
        float(output.detach().mean())

    called = trained({"d_dropout": dropout, "cuda_graph": False}, hook=read_back)
    assert "cannot be captured" not in capsys.readouterr().out
    fallen_back = trained({"d_dropout": dropout}, hook=read_back)
    assert capsys.readouterr().out.count("cannot be captured as a CUDA graph") == 1
    assert furthest(fallen_back, called) < 1e-9


@pytest.mark.gpu
def test_one_rank_under_nccl_is_captured_too_and_trains_alike() -> None:
    replays = Calls()
    try:
        one_rank = trained({}, hook=replays, strategy="ddp")
        assert distributed.get_backend() == "nccl"
    finally:
        distributed.destroy_process_group()
    assert replays.count == 2 * CALLED_TO_CAPTURE
    assert furthest(one_rank, trained({})) < 1e-9
