"""The iteration is the papers', for a naive loop ends at the same weights; and a pure tensor program, for its recording does.

What one process cannot show, that many ranks train as one, is in tests/integration.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, count, product
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader

from bngan import GAN, rng
from bngan.iteration import Draws, Iteration, Observed, OptimizerUpdate
from bngan.losses import LOSSES
from bngan.networks import set_reference
from bngan.norms import NORMS
from bngan.schedules import Schedule, schedule_at
from tests.naive_gan import NaiveGAN, Recipe, Seen

ITERATIONS, BATCH = 20, 8
# Everything is on, so that every case tests all of it.
BASE: dict[str, Any] = {
    "network": "mlp",
    "image_shape": (1, 4, 4),
    "latent_dim": 3,
    "hidden_dim": 8,
    "g_norm": "batch",
    "d_norm": "batch",
    "loss": "non_saturating",
    "label_smoothing": 0.0,
    "r1": 0.0,
    "r2": 0.0,
    "gradient_penalty": 0.0,
    "batching": "joint",
    "update_d_stats_in_g_step": False,
    "pack": 1,
    "n_critic": 2,
    "g_steps": 1,
    "g_lr": 1e-2,
    "d_lr": 1.5e-2,
    "beta1": 0.5,
    "beta2": 0.99,
    "lr_decay_start": 0.5,
    "instance_noise": 0.5,
    "instance_noise_end": 0.75,
    "g_clip": None,
    "d_clip": None,
    "ema_decay": 0.6,
    "ema_buffers": "average",
}
# Adam makes weights of the rounding in gradients that a norm makes 0, of which convolutions have more: lower rates.
CONV: dict[str, Any] = {"network": "conv", "image_shape": (1, 16, 16), "hidden_dim": 4, "g_lr": 1e-3, "d_lr": 1e-3}
PENALTIES: dict[str, dict[str, Any]] = {
    "no penalty": {},
    "R1": {"d_norm": "layer", "r1": 0.5},
    "R2": {"d_norm": "layer", "r2": 0.5},
    "WGAN-GP": {"d_norm": "spectral", "gradient_penalty": 2.0},
}
LOSS_CASES: dict[str, dict[str, Any]] = {
    f"{loss}, {batching}, {penalty}": {"loss": loss, "batching": batching, "n_critic": 1, **PENALTIES[penalty]}
    for loss, batching, penalty in product(LOSSES, ("joint", "separate"), PENALTIES)
}
SETTING_CASES: dict[str, dict[str, Any]] = {
    "n_critic 3": {"n_critic": 3},
    "two updates of G": {"g_steps": 2},
    "three updates of G, separate, no noise": {"g_steps": 3, "batching": "separate", "instance_noise": 0.0},
    "packs of 4": {"pack": 4},
    "packs of 2, separate": {"pack": 2, "batching": "separate"},
    "packs of 2, conv, G updated twice": {**CONV, "pack": 2, "g_steps": 2},
    "packs of 2, three penalties": {"pack": 2, "d_norm": "none", "r1": 0.3, "r2": 0.2, "gradient_penalty": 0.5},
    "D's statistics move in G's step": {"update_d_stats_in_g_step": True},
    "D's statistics move in G's step, separate": {"update_d_stats_in_g_step": True, "batching": "separate"},
    "other learning rates": {"g_lr": 1e-3, "d_lr": 5e-3},
    "learning rates that never fall": {"lr_decay_start": 1.0},
    "learning rates that fall at once": {"lr_decay_start": 0.0},
    "beta1 0": {"beta1": 0.0},
    "beta2 0.9": {"beta2": 0.9},
    "no noise": {"instance_noise": 0.0},
    "noise to the end": {"instance_noise_end": 1.0},
    "noise beyond the end": {"instance_noise_end": 2.0},
    "clipped": {"g_clip": 0.05, "d_clip": 0.3},
    "EMA, buffers copied": {"ema_buffers": "copy"},
    "EMA, precise buffers": {"ema_buffers": "precise"},
    "EMA, as short as at the start": {"ema_decay": 0.999},
    "no EMA": {"ema_decay": 0.0},
    "smoothed labels": {"label_smoothing": 0.2},
    "smoothed labels, minimax": {"label_smoothing": 0.2, "loss": "minimax"},
    "smoothed labels, least squares": {"label_smoothing": 0.2, "loss": "least_squares"},
    "dropout": {"d_dropout": 0.3},
    "no norm, three penalties": {"d_norm": "none", "r1": 0.3, "r2": 0.2, "gradient_penalty": 0.5},
    "layer norm, three penalties, clipped": {"d_norm": "layer", "r1": 0.3, "r2": 0.2, "gradient_penalty": 0.5, "d_clip": 0.5},
}
NORM_CASES: dict[str, dict[str, Any]] = {
    f"{norm} norm, {network}": {**settings, "g_norm": norm, "d_norm": norm, "ghost_groups": 2}
    for norm, (network, settings) in product(NORMS, (("mlp", {}), ("conv", CONV)))
    if (norm, network) != ("instance", "mlp")  # which needs pixels
}
CLASS_CASES: dict[str, dict[str, Any]] = {
    "classes": {"classes": 3},
    "classes, separate, hinge, G updated twice": {"classes": 3, "batching": "separate", "loss": "hinge", "g_steps": 2},
    "classes, WGAN-GP, spectral": {"classes": 3, "d_norm": "spectral", "gradient_penalty": 2.0},
    "classes, virtual norm in D": {"classes": 3, "d_norm": "virtual"},
    "classes, conv": {**CONV, "classes": 3},
}
CASES = {**LOSS_CASES, **SETTING_CASES, **NORM_CASES, **CLASS_CASES}


def batches(settings: dict[str, Any], iterations: int) -> Tensor:
    """Return images (iterations, n_critic * N, C, H, W) in [-1, 1]."""
    size = 64 if settings["d_norm"] == "virtual" else BATCH  # its reference batch is the first 64 images
    shape = (iterations, size * settings["n_critic"], *settings["image_shape"])
    return torch.rand(shape, generator=rng.generator(1), dtype=torch.float64) * 2 - 1


def labels_of(settings: dict[str, Any], iterations: int) -> list[Tensor] | list[None]:
    """Return the classes of these images, (n_critic * N,) in each iteration, or None where there are none."""
    if not settings.get("classes"):
        return [None] * iterations
    shape = batches(settings, iterations).shape[:2]
    return [*torch.randint(settings["classes"], shape, generator=rng.generator(2))]


def build(settings: dict[str, Any]) -> GAN:
    torch.manual_seed(0)
    return GAN(**settings).double()


def weights(gan: GAN) -> dict[str, Tensor]:
    """Return the weights and buffers of G, D and the average."""
    return {name: value.clone() for name, value in gan.state_dict().items() if name != "iteration"}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference between the weights of two GANs, infinity if they have other networks."""
    if [(name, value.shape) for name, value in one.items()] != [(name, value.shape) for name, value in other.items()]:
        return float("inf")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# The papers' ----------------------------------------------------------------------------------------------------------


@cache
def naively_trained(case: str, iterations: int = ITERATIONS) -> tuple[dict[str, Tensor], Seen]:
    """Return the weights that the naive loop ends at, and what its last iteration saw."""
    settings = BASE | CASES[case]
    gan, images, labels = build(settings), batches(settings, iterations), labels_of(settings, iterations)
    if settings["d_norm"] == "virtual":
        set_reference(gan.discriminator, images[0])
    recipe = Recipe(**{field.name: settings[field.name] for field in fields(Recipe)})
    naive = NaiveGAN(gan.generator, gan.discriminator, gan.generator_ema, recipe, total=iterations)
    seen: Seen = {}
    for iteration, batch in enumerate(images):
        torch.manual_seed(rng.key(gan.settings.seed, rng.Stream.DROPOUT, iteration, 0))
        generator = rng.generator(gan.settings.seed, rng.Stream.ITERATION, iteration)
        seen = naive.iterate(iteration, batch, generator, labels[iteration])
    return weights(gan), seen


def assert_trains_as_the_papers(case: str, iterations: int) -> None:
    settings = BASE | CASES[case]
    gan = build(settings)
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pairs = zip(batches(settings, iterations), labels_of(settings, iterations), strict=True)
    given = [images if labels is None else (images, labels) for images, labels in pairs]
    trainer.fit(gan, DataLoader(given, batch_size=None))  # pyright: ignore[reportArgumentType]  # a list is a data set, too
    expected, seen = naively_trained(case, iterations)
    assert furthest(weights(gan), expected) < 1e-8
    assert gan.observed is not None
    assert gan.observed._asdict().keys() == seen.keys()
    for name, value in gan.observed._asdict().items():
        assert value.tolist() == pytest.approx(seen[name], rel=0, abs=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_papers(case: str) -> None:
    assert_trains_as_the_papers(case, ITERATIONS)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_first_iterations_are_the_papers(network: str, iterations: int) -> None:
    """What the average begins with is soon forgotten."""
    assert_trains_as_the_papers(f"batch norm, {network}", iterations)


def test_every_case_ends_elsewhere_but_for_those_that_are_one_training() -> None:
    """So the comparison sees each setting."""
    ends = {case: naively_trained(case)[0] for case in CASES}
    alike = {pair for pair in combinations(CASES, 2) if furthest(ends[pair[0]], ends[pair[1]]) < 1e-6}
    # Without a norm across images, who shares a batch with whom is nothing to D.
    batching = {(f"{loss}, joint, {penalty}", f"{loss}, separate, {penalty}") for loss in LOSSES for penalty in ("R1", "R2")}
    layers = {(f"batch norm, {network}", f"reference norm, {network}") for network in ("mlp", "conv")}
    assert alike == {*batching, *layers, ("EMA, buffers copied", "EMA, precise buffers")}


# A pure tensor program ------------------------------------------------------------------------------------------------

EAGER, REPLAYED = 2, 50  # optimizers set up their state at their first step
PROGRAMS: dict[str, dict[str, Any]] = {
    "mlp, joint": {"loss": "relativistic"},
    "mlp, hinge, clipped, buffers copied": {"loss": "hinge", "g_clip": 0.05, "d_clip": 0.3, "ema_buffers": "copy"},
    "conv, separate": {**CONV, "batching": "separate", "update_d_stats_in_g_step": True, "n_critic": 1},
    "three penalties": {
        "d_norm": "layer",
        "loss": "wasserstein",
        "r1": 0.3,
        "r2": 0.2,
        "gradient_penalty": 0.5,
        "n_critic": 1,
    },
    "spectral": {"d_norm": "spectral", "g_norm": "spectral", "loss": "minimax"},
    "virtual": {"d_norm": "virtual", "g_norm": "virtual", "n_critic": 1},
    "packs, G updated twice": {"pack": 2, "g_steps": 2, "n_critic": 1},
    "classes, two updates of D": {"classes": 3},
    "classes, spectral, WGAN-GP": {"classes": 3, "d_norm": "spectral", "gradient_penalty": 0.5, "n_critic": 1},
    "ghost, dropout": {"d_norm": "ghost", "g_norm": "ghost", "ghost_groups": 2, "d_dropout": 0.3},
}


def iteration_of(gan: GAN) -> Iteration:
    d_optimizer, g_optimizer = gan.configure_optimizers()
    return gan.build_iteration(
        OptimizerUpdate(d_optimizer, gan.settings.d_clip), OptimizerUpdate(g_optimizer, gan.settings.g_clip)
    )


def run(
    settings: dict[str, Any], *, recorded: bool, change: Callable[[Iteration], Iteration] = lambda iteration: iteration
) -> tuple[dict[str, Tensor], Observed]:
    """Return the weights after training and what its end saw; `recorded`, the third iteration is recorded and then replayed."""
    gan, images = build(settings), batches(settings, EAGER + 1 + REPLAYED)
    labels = labels_of(settings, len(images))
    if settings["d_norm"] == "virtual":
        set_reference(gan.discriminator, images[0])
    iteration, draws = change(iteration_of(gan)), Draws()

    def call(batch: Tensor, schedule: Tensor, *labels: Tensor) -> Observed:
        return iteration(batch, Schedule(*schedule), draws, *labels)

    program: Callable[..., Observed] = call
    observed: Observed | None = None
    for number, batch in enumerate(images):
        schedule = torch.tensor(schedule_at(gan.settings, number, total=len(images)), dtype=torch.float64)
        draws.seeded(number)
        torch.manual_seed(number)  # of dropout
        given = (batch, schedule) if (own := labels[number]) is None else (batch, schedule, own)
        if recorded and number == EAGER:
            program = make_fx(call)(*given)  # recording trains, too
            continue
        with torch.set_grad_enabled(program is call):  # gradients are part of what is recorded
            observed = program(*given)
    assert observed is not None
    return weights(gan), observed


@pytest.mark.parametrize("name", PROGRAMS)
def test_recorded_once_and_replayed_the_iteration_trains_as_if_called(name: str) -> None:
    settings = BASE | PROGRAMS[name]
    (called, expected), (replayed, observed) = run(settings, recorded=False), run(settings, recorded=True)
    assert furthest(replayed, called) < 1e-12
    torch.testing.assert_close(tuple(observed), tuple(expected), rtol=0, atol=1e-12)


def test_training_on_one_class_is_training_without_classes_but_for_what_d_has_of_its_own() -> None:
    """D's term of the only class, held at 0, adds nothing; then gamma and beta of that class are those of plain batch norm."""

    def trained(settings: dict[str, Any], labels: Tensor | None) -> GAN:
        gan = build(settings)
        if settings.get("classes"):
            for name, parameter in gan.discriminator.named_parameters():
                if ".v." in name:
                    parameter.detach().zero_()
                    parameter.requires_grad_(False)
        iteration = iteration_of(gan)
        for number, batch in enumerate(batches(settings, ITERATIONS)):
            schedule = torch.tensor(schedule_at(gan.settings, number, total=ITERATIONS), dtype=torch.float64)
            iteration(batch, Schedule(*schedule), Draws().seeded(number), labels)
        return gan

    plain, of_one = (
        trained(BASE, None),
        trained({**BASE, "classes": 1}, torch.zeros(BATCH * BASE["n_critic"], dtype=torch.long)),
    )
    z = torch.randn(6, BASE["latent_dim"], generator=rng.generator(3), dtype=torch.float64)
    for network in ("generator", "generator_ema"):
        one, other = getattr(plain, network), getattr(of_one, network)
        assert not torch.allclose(one(z), build(BASE).generator(z), atol=1e-2)  # it has learned
        torch.testing.assert_close(other(z), one(z), rtol=0, atol=1e-10)
    images = batches(BASE, 1)[0]
    labels = torch.zeros(len(images), dtype=torch.long)
    torch.testing.assert_close(of_one.logits(images, labels), plain.logits(images), rtol=0, atol=1e-9)


def test_replay_would_tell_of_a_number_that_is_baked_in() -> None:
    def cooling(iteration: Iteration) -> Iteration:
        calls = count()
        return replace(iteration, discriminator=lambda images: iteration.discriminator(images) * 0.99 ** next(calls))

    (called, _), (replayed, _) = run(BASE, recorded=False, change=cooling), run(BASE, recorded=True, change=cooling)
    assert furthest(replayed, called) > 1e-3


def test_recording_would_tell_of_a_value_that_is_read_back() -> None:
    def standardizing(iteration: Iteration) -> Iteration:
        def logits(images: Tensor) -> Tensor:
            found = iteration.discriminator(images)
            return found / float(found.detach().std())

        return replace(iteration, discriminator=logits)

    run(BASE, recorded=False, change=standardizing)
    with pytest.raises(RuntimeError, match="trying to get value out of a tracing tensor"):
        run(BASE, recorded=True, change=standardizing)


# Updates in mixed precision -------------------------------------------------------------------------------------------


def update_of(layer: nn.Linear, *, scaler: torch.amp.GradScaler | None, clip: float | None = None) -> OptimizerUpdate:
    return OptimizerUpdate(torch.optim.Adam(layer.parameters(), lr=torch.tensor(0.0), fused=True), clip, scaler)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaled_loss_takes_the_same_steps_and_tells_the_same_norm(clip: float | None) -> None:
    torch.manual_seed(0)
    plain, scaled = nn.Linear(4, 3), nn.Linear(4, 3)
    scaled.load_state_dict(plain.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    updates = [(plain, update_of(plain, scaler=None, clip=clip)), (scaled, update_of(scaled, scaler=scaler, clip=clip))]
    for number in range(1, 6):
        images = torch.randn(8, 4)
        norms = [update(layer(images).square().mean() * number, torch.tensor(0.1)) for layer, update in updates]
        torch.testing.assert_close(norms[0], norms[1])
        assert norms[0] > 0.1  # so that clipping does something
    torch.testing.assert_close(scaled.weight, plain.weight)


def test_step_whose_scaled_gradient_overflows_is_left_out_and_the_scale_halved() -> None:
    layer, scaler = nn.Linear(4, 3), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    update, before = update_of(layer, scaler=scaler), layer.weight.detach().clone()
    update(layer(torch.ones(8, 4)).square().mean() * 1e36, torch.tensor(0.1))
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(layer.weight, before)
    update(layer(torch.ones(8, 4)).square().mean(), torch.tensor(0.1))
    assert not torch.equal(layer.weight, before)


def test_autocast_reads_weights_anew_after_each_update() -> None:
    def trained(cache_enabled: bool) -> dict[str, Tensor]:
        gan = build(BASE | {"d_norm": "none", "g_norm": "none"}).float()
        iteration = iteration_of(gan)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled):
            for number, batch in enumerate(batches(BASE, 5).float()):
                schedule = torch.tensor(schedule_at(gan.settings, number, total=5))
                iteration(batch, Schedule(*schedule), Draws().seeded(number))
        return weights(gan)

    assert furthest(trained(cache_enabled=True), trained(cache_enabled=False)) == 0
