"""Each run of an ensemble ends where it would by itself; it can be taken out, stopped, and may diverge alone."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bngan import GAN, rng
from bngan.checkpoint import load_gan
from bngan.data.loader import ShardedBatches, TensorLoader
from bngan.images import to_minus1_1
from bngan.iteration import Draws, OptimizerUpdate
from bngan.losses import LOSSES
from bngan.networks import needs_reference, set_reference
from bngan.schedules import Schedule, schedule_at
from bngan.study.ensemble import Adam, Ensemble, chunk_size, structure

RUNS, BATCH = 3, 8
BASE: dict[str, Any] = {"image_shape": (1, 4, 4), "latent_dim": 3, "hidden_dim": 4, "ghost_groups": 2, "beta1": 0.5}
CONV: dict[str, Any] = {"network": "conv", "image_shape": (1, 16, 16)}
# What the runs of an ensemble may differ in. The second is compared after 200 iterations, at rates at which rounding is still
# rounding by then: at ten times these a run by itself ends as far from where it does if one weight starts a last bit away.
OWN: tuple[dict[str, Any], ...] = (
    {"g_lr": 1e-3, "d_lr": 2e-3},
    {
        "g_lr": 3e-4,
        "d_lr": 5e-4,
        "instance_noise": 0.5,
        "instance_noise_end": 0.5,
        "ema_decay": 0.9,
        "lr_decay_start": 0.2,
    },
    {"g_lr": 3e-3, "d_lr": 1e-3},
)
NORMS = ("batch", "none", "layer", "group", "spectral", "reference", "ghost")
# Each of these at least once, and those together that touch each other.
CASES: dict[str, dict[str, Any]] = {
    "batch, separate, conv, n_critic 2": {**CONV, "batching": "separate", "loss": "non_saturating", "n_critic": 2},
    "classes, n_critic 2": {"classes": 3, "n_critic": 2},
    "classes, conv, spectral, separate, WGAN-GP": {
        **CONV,
        "classes": 3,
        "d_norm": "spectral",
        "batching": "separate",
        "gradient_penalty": 2.0,
    },
    "none, R1, packs": {"d_norm": "none", "g_norm": "none", "loss": "minimax", "r1": 0.5, "pack": 2},
    "layer, WGAN-GP, packs, conv": {**CONV, "d_norm": "layer", "g_norm": "layer", "loss": "wasserstein", "pack": 2},
    "group, separate, R1 and R2, clipped": {
        "d_norm": "group",
        "g_norm": "group",
        "batching": "separate",
        "loss": "least_squares",
        "r1": 0.5,
        "r2": 0.3,
        "d_clip": 0.3,
        "g_clip": 0.05,
    },
    "spectral, conv, n_critic 2": {**CONV, "d_norm": "spectral", "loss": "hinge", "n_critic": 2},
    "spectral, EMA copied": {"g_norm": "spectral", "loss": "non_saturating", "ema_buffers": "copy"},
    "reference, D's statistics move in G's steps": {
        "d_norm": "reference",
        "g_norm": "reference",
        "loss": "non_saturating",
        "g_steps": 2,
        "update_d_stats_in_g_step": True,
    },
    "ghost, conv, packs, no average": {
        **CONV,
        "d_norm": "ghost",
        "g_norm": "ghost",
        "loss": "hinge",
        "pack": 2,
        "ema_decay": 0.0,
    },
    "batch, R1 coupled, no noise": {"r1": 0.5, "allow_batch_coupled_penalty": True, "instance_noise": 0.0, "loss": "hinge"},
    "batch, minibatch stddev, separate": {"minibatch_stddev": 4, "batching": "separate", "loss": "hinge"},
    "virtual": {"d_norm": "virtual", "g_norm": "virtual", "loss": "hinge"},
    "points": {"network": "points", "image_shape": (2, 1, 1), "loss": "non_saturating", "hidden_dim": 8},
    "pacgan, G updated twice": {
        "network": "pacgan",
        "image_shape": (1, 28, 28),
        "loss": "hinge",
        "g_steps": 2,
        "hidden_dim": 2,
    },
}
EXTRAS: dict[str, dict[str, Any]] = {
    ", n_critic 2": {"n_critic": 2},
    ", R1": {"r1": 0.5, "allow_batch_coupled_penalty": True},
    ", packs": {"pack": 2},
    ", G updated twice": {"g_steps": 2},
}
PRODUCT: dict[str, dict[str, Any]] = {
    f"{norm}, {batching}, {loss}, {network}{extra}": {
        **(CONV if network == "conv" else {}),
        **{"g_norm": norm, "d_norm": norm, "batching": batching, "loss": loss, "allow_batch_coupled_penalty": True},
        **EXTRAS.get(extra, {}),
    }
    for norm, batching, network in product(NORMS, ("joint", "separate"), ("mlp", "conv"))
    for loss, extra in [*((loss, "") for loss in LOSSES), *(("non_saturating", extra) for extra in EXTRAS)]
}


def settings_of(run: int, case: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in OWN[run].items() if case.get(name) != 0}  # what none of them has, none has of its own
    return {**BASE, "seed": run, **case, **own}


def build(run: int, case: dict[str, Any]) -> GAN:
    torch.manual_seed(run)
    return GAN(**settings_of(run, case)).double()


def together(case: dict[str, Any], total: int, momenta: tuple[float, ...] = ()) -> Ensemble:
    return Ensemble([build(run, case) for run in range(RUNS)], total, momenta)


def images_of(run: int, done: int, case: dict[str, Any]) -> Tensor:
    """Return images (n_critic * N, C, H, W) in [-1, 1]."""
    # A virtual norm's reference batch is the first 64 images. D has as many packs as images: of two, all that ghost groups of
    # half of them leave is which is larger.
    size = 64 if case.get("d_norm") == "virtual" else BATCH * case.get("pack", 1)
    shape = (size * case.get("n_critic", 1), *case.get("image_shape", BASE["image_shape"]))
    return torch.rand(shape, generator=rng.generator(7, run, done), dtype=torch.float64) * 2 - 1


def labels_of(run: int, done: int, case: dict[str, Any]) -> Tensor | None:
    """Return the classes (n_critic * N,) of these images, None where there are none."""
    if not case.get("classes"):
        return None
    return torch.randint(case["classes"], (len(images_of(run, done, case)),), generator=rng.generator(8, run, done))


def train(ensemble: Ensemble, case: dict[str, Any], until: int) -> None:
    def together(of: Callable[[int, int, dict[str, Any]], Any]) -> Callable[[int], Tensor]:
        return lambda done: torch.stack([of(run, done, case) for run in range(RUNS)], dim=1)

    ensemble.train(together(images_of), until, together(labels_of) if case.get("classes") else None)


def trained_alone(run: int, case: dict[str, Any], total: int) -> GAN:
    gan, draws = build(run, case), Draws()
    if needs_reference(gan.discriminator):
        set_reference(gan.discriminator, images_of(run, 0, case))
    d_optimizer, g_optimizer = gan.configure_optimizers()
    iteration = gan.build_iteration(
        OptimizerUpdate(d_optimizer, gan.settings.d_clip), OptimizerUpdate(g_optimizer, gan.settings.g_clip)
    )
    for done in range(total):
        schedule = torch.tensor(schedule_at(gan.settings, done, total), dtype=torch.float64)
        draws.seeded(rng.key(run, rng.Stream.ITERATION, done))
        iteration(images_of(run, done, case), Schedule(*schedule), draws, labels_of(run, done, case))
    return gan


def furthest(one: GAN, other: GAN) -> float:
    """Return the largest difference between weights and buffers of two GANs, their iterations aside."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    apart = {"iteration", "normalized_together"}
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours.keys() - apart)


def equal(one: GAN, other: GAN) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# Each as if alone -----------------------------------------------------------------------------------------------------


def assert_runs_are_as_if_alone(case: dict[str, Any], total: int, runs: tuple[int, ...] = (0, 1, 2)) -> None:
    ensemble = together(case, total)
    train(ensemble, case, total)
    assert not ensemble.failed.any()
    for run in runs:
        alone = trained_alone(run, case, total)
        assert furthest(ensemble.member(run), alone) < 1e-9
        assert furthest(ensemble.member((run + 1) % RUNS), alone) > 1e-3
        assert int(ensemble.member(run).iteration) == total


@pytest.mark.parametrize("case", CASES)
def test_each_run_ends_where_it_would_alone(case: str) -> None:
    assert_runs_are_as_if_alone(CASES[case], total=10)


def test_each_run_ends_where_it_would_alone_after_200_iterations() -> None:
    assert_runs_are_as_if_alone({"loss": "non_saturating"}, total=200, runs=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT)
def test_each_run_of_every_kind_ends_where_it_would_alone(case: str) -> None:
    assert_runs_are_as_if_alone(PRODUCT[case], total=200, runs=(1,))


def test_a_member_is_what_fit_trains_with_its_seed() -> None:
    case, pixels = {"loss": "hinge"}, torch.randint(256, (80, 1, 4, 4), generator=rng.generator(1), dtype=torch.uint8)
    ensemble = together(case, total=10)
    rows = [[*ShardedBatches(len(pixels), BATCH, train=True, seed=run).rows()] for run in range(RUNS)]
    ensemble.train(lambda done: torch.stack([to_minus1_1(pixels[own[done]]).double() for own in rows], dim=1), until=10)
    for run in range(RUNS):
        seed_everything(run, verbose=False)
        gan = GAN(**settings_of(run, case))
        batches = ShardedBatches(len(pixels), BATCH, train=True, seed=run)
        trainer = Trainer(
            accelerator="cpu",
            precision="64-true",
            max_steps=10,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(gan, TensorLoader(pixels, torch.zeros(len(pixels), dtype=torch.long), batches))
        assert furthest(ensemble.member(run), gan) < 1e-9


@pytest.mark.parametrize("settings", [{"d_dropout": 0.3}, {"g_norm": "noisy", "d_norm": "noisy"}])
def test_runs_whose_layers_draw_have_draws_of_their_own_that_come_again(settings: dict[str, Any]) -> None:
    twins = [build(0, settings) for _ in range(2)]
    ends: list[Ensemble] = []
    for _ in range(2):
        ends.append(Ensemble([copy.deepcopy(twin) for twin in twins], total=3))
        torch.manual_seed(len(ends))  # which does not matter
        ends[-1].train(lambda done: torch.stack([images_of(0, done, settings)] * 2, dim=1), until=3)
    assert equal(ends[0].member(0), ends[1].member(0))
    assert furthest(ends[0].member(0), ends[0].member(1)) > 1e-5


# Alone with its misfortune --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["batch, separate, conv, n_critic 2", "group, separate, R1 and R2, clipped", "spectral, EMA copied"]
)
def test_a_run_that_diverges_changes_no_bit_of_the_others(case: str) -> None:
    healthy, struck = together(CASES[case], total=6), together(CASES[case], total=6)
    for ensemble in (healthy, struck):
        train(ensemble, CASES[case], until=2)
    with torch.no_grad():
        next(struck.gan.discriminator.parameters())[1].fill_(float("nan"))
    for ensemble in (healthy, struck):
        train(ensemble, CASES[case], until=6)
    assert healthy.failed.tolist() == [False, False, False]
    assert struck.failed.tolist() == [False, True, False]
    assert [equal(healthy.member(run), struck.member(run)) for run in range(RUNS)] == [True, False, True]


# Stopped, and taken out -----------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_saved_state_to_the_same_bits() -> None:
    case = {"loss": "non_saturating", "d_clip": 0.3}
    whole, stopped, resumed = (together(case, total=9, momenta=(0.01,)) for _ in range(3))
    train(whole, case, until=9)
    train(stopped, case, until=4)
    saved = io.BytesIO()
    torch.save(stopped.state_dict(), saved)
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert resumed.done == 4
    train(resumed, case, until=9)
    for run in range(RUNS):
        assert equal(resumed.member(run), whole.member(run))
        assert not equal(stopped.member(run), whole.member(run))
    torch.testing.assert_close(resumed.also[0].statistics, whole.also[0].statistics, rtol=0, atol=0)


def test_a_member_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    case = {"loss": "hinge"}
    ensemble = together(case, total=4)
    train(ensemble, case, until=4)
    state = torch.get_rng_state()
    ensemble.save_member(1, tmp_path / "runs" / "one.ckpt")
    assert torch.equal(torch.get_rng_state(), state)
    gan, member = load_gan(tmp_path / "runs" / "one.ckpt"), ensemble.member(1)  # both in float64
    assert gan.settings == member.settings
    assert (int(gan.iteration), int(gan.normalized_together)) == (4, BATCH)
    with gan.sampler("ema") as ours, member.sampler("ema") as theirs:
        assert torch.equal(ours.samples(0, 5), theirs.samples(0, 5))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    loader = DataLoader(TensorDataset(images_of(0, 0, case).float()), batch_size=BATCH)
    (found,) = Trainer(**quiet).validate(gan, loader, tmp_path / "runs" / "one.ckpt", verbose=False, weights_only=True)
    assert found["step"] == 4


def test_running_statistics_of_another_momentum_are_those_of_a_training_with_it() -> None:
    case = {"loss": "non_saturating", "bn_momentum": 0.1, "n_critic": 2}
    ensemble, other = together(case, total=6, momenta=(0.01, 0.5)), together({**case, "bn_momentum": 0.01}, total=6)
    for trained in (ensemble, other):
        train(trained, case, until=6)
    slow, _ = ensemble.also
    latents = torch.ones(4, 3, dtype=torch.float64)
    for run in range(RUNS):
        found, expected = ensemble.member(run).generator.eval(), other.member(run).generator.eval()
        before = copy.deepcopy(found.state_dict())
        with torch.no_grad():
            assert float((found(latents) - expected(latents)).abs().max()) > 1e-4
            with slow.within(found, run):
                torch.testing.assert_close(found(latents), expected(latents), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.state_dict(), before, rtol=0, atol=0)


# Its parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.9)])
def test_adam_takes_torchs_steps_for_each_run(clip: float | None, betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    rates, starts = torch.tensor([1e-2, 3e-3], dtype=torch.float64), [torch.randn(2, 3, 4).double(), torch.randn(2, 5).double()]
    ours = [start.clone().requires_grad_() for start in starts]
    adam = Adam(ours, runs=2, betas=betas, clip=clip)
    alone = [[start[run].clone().requires_grad_() for start in starts] for run in range(2)]
    updates = [OptimizerUpdate(torch.optim.Adam(weights, betas=betas, fused=True), clip) for weights in alone]

    def losses(weights: list[Tensor], number: int) -> Tensor:
        """Return the loss of each run's weights (runs,)."""
        return sum((number * weight.flatten(start_dim=1) + 1).sin().sum(dim=1) for weight in weights)  # pyright: ignore

    for number in range(1, 20):
        norms = adam(losses(ours, number).mean(), rates)
        for run, (update, weights) in enumerate(zip(updates, alone, strict=True)):
            norm = update(losses([weight.unsqueeze(0) for weight in weights], number).sum(), rates[run])
            torch.testing.assert_close(norms[run], norm, rtol=1e-12, atol=1e-12)
    for weight, *theirs in zip(ours, *alone, strict=True):
        torch.testing.assert_close(weight, torch.stack(theirs), rtol=0, atol=1e-12)
    assert all(float((weight - start).abs().min()) > 1e-4 for weight, start in zip(ours, starts, strict=True))


def test_adam_leaves_frozen_weights_alone() -> None:
    frozen, free = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    Adam([frozen, free], runs=2, betas=(0.0, 0.9), clip=None)((frozen * free).mean(), torch.tensor([0.1, 0.1]))
    assert torch.equal(frozen, torch.ones(2, 3))
    assert not torch.equal(free, torch.ones(2, 3))


def test_runs_that_cannot_train_as_one_are_refused() -> None:
    for other in ({"loss": "hinge"}, {"instance_noise": 0.0}, {"ema_decay": 0.0}, {"beta1": 0.9}, {"bn_momentum": 0.2}):
        gans = [build(0, {}), build(0, other)]
        with pytest.raises(ValueError, match="runs differ"):
            Ensemble(gans, total=1)
    settings = build(0, {}).settings
    alike = replace(settings, seed=5, g_lr=1.0, d_lr=0.1, instance_noise=0.1, ema_decay=0.1, lr_decay_start=0.0)
    assert structure(alike) == structure(settings)


def test_as_many_runs_as_memory_holds_with_room_to_spare_are_trained_at_once() -> None:
    assert chunk_size(free=1000, bytes_a_run=100) == 8
    assert chunk_size(free=10, bytes_a_run=100) == 1


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ["batch, separate, conv, n_critic 2", "group, separate, R1 and R2, clipped", "spectral, EMA copied"]
)
def test_runs_replayed_as_a_graph_end_where_called_ones_do(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends: list[Ensemble] = []
    for cuda_graph in (True, False):
        settings = {**CASES[case], "cuda_graph": cuda_graph}
        ends.append(Ensemble([build(run, settings).cuda() for run in range(RUNS)], total=12, momenta=(0.01,)))
        ends[-1].train(
            lambda done: torch.stack([images_of(run, done, CASES[case]) for run in range(RUNS)], dim=1).cuda(), until=12
        )
    assert "cannot be captured" not in capsys.readouterr().out
    for run in range(RUNS):
        assert furthest(ends[0].member(run), ends[1].member(run)) < 1e-9
    torch.testing.assert_close(ends[0].also[0].statistics, ends[1].also[0].statistics, rtol=0, atol=1e-9)
