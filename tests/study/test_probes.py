"""Probes find what is known in closed form, and leave the GAN as it was."""

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngan import GAN
from bngan.norms import NORMS
from bngan.rng import generator
from bngan.study.probes import PROBES, Entry, cosine, layers_of, other_sizes, probe

BATCH = 16
CURVES = ("offset_curve", "mates_curve")  # of probes that measure more than their endpoint


def build(**settings: Any) -> GAN:
    torch.manual_seed(0)
    small = {"image_shape": (1, 4, 4), "latent_dim": 3, "hidden_dim": 8, "instance_noise": 0.0, "loss": "non_saturating"}
    gan = GAN(**{**small, **settings}).double()
    gan.normalized_together.fill_(BATCH)
    return gan


def real_images(gan: GAN, batches: int = 8) -> Tensor:
    shape = (batches * BATCH, *gan.settings.image_shape)
    return torch.rand(shape, generator=generator(1), dtype=torch.double) * 2 - 1


def values(gan: GAN, name: str) -> list[Entry]:
    """The entries of a probe, without those of its curve."""
    return [entry for entry in PROBES[name](gan, real_images(gan)) if "probe" not in entry]


def curve(gan: GAN, name: str, key: str) -> dict[float, float]:
    """The curve that a probe makes beside its value, by what it is against."""
    return {entry[key]: entry["value"] for entry in PROBES[name](gan, real_images(gan)) if "probe" in entry}


def value(gan: GAN, name: str) -> float:
    (entry,) = values(gan, name)
    return entry["value"]


def of(entries: list[Entry], network: str) -> dict[str, float]:
    """The values of a network by layer."""
    return {entry.get("layer", "mean"): entry["value"] for entry in entries if entry["network"] == network}


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "network"),
    # Instance norm needs pixels, and virtual batch norm more images than these.
    sorted({*product(NORMS, ("mlp", "conv"))} - {("instance", "mlp"), ("virtual", "mlp"), ("virtual", "conv")}),
)
def test_probes_leave_everything_as_it_was(norm: str, network: str) -> None:
    shape = {"mlp": (1, 4, 4), "conv": (1, 16, 16)}[network]
    settings = {"g_norm": norm, "d_norm": norm, "d_dropout": 0.3, "ghost_groups": 2, "instance_noise": 0.5}
    gan = build(network=network, image_shape=shape, **{**settings, "hidden_dim": 4})
    gan.generator.eval()  # a mode that is to be kept
    gan.iteration.fill_(7)
    before, modes = copy.deepcopy(gan.state_dict()), {name: part.training for name, part in gan.named_modules()}
    torch.manual_seed(5)
    entries = probe(gan, real_images(gan), [*PROBES])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    after = gan.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: part.training for name, part in gan.named_modules()} == modes
    assert all(parameter.grad is None for parameter in gan.parameters())
    assert {(entry["iteration"], entry["probe"]) for entry in entries} == {(7, name) for name in (*PROBES, *CURVES)}
    assert all(isinstance(entry["value"], float) and math.isfinite(entry["value"]) for entry in entries)
    assert probe(gan, real_images(gan), [*PROBES]) == entries


@pytest.mark.parametrize("pack", [1, 2])
def test_probes_take_packs_and_penalties_and_minibatch_stddev(pack: int) -> None:
    gan = build(pack=pack, minibatch_stddev=4, d_norm="layer")
    assert value(gan, "mates_share") > 0  # by the standard deviation alone
    assert value(gan, "offset_response") > 0
    assert of(values(gan, "gradient_cosine"), "discriminator")["mean"] < 1


# What D says of an image ----------------------------------------------------------------------------------------------


def test_d_is_blind_to_an_offset_only_of_separate_batches_behind_the_first_layer() -> None:
    """Batch norm there subtracts the batch's mean, and with it what all fakes have in common."""
    separate, joint = build(batching="separate"), build(batching="joint")
    assert value(separate, "offset_response") < 1e-12
    assert value(joint, "offset_response") > 0.05
    assert value(build(batching="separate", d_norm_first=False), "offset_response") > 1e-3
    assert value(build(batching="separate", d_norm="none"), "offset_response") > 0.05


def test_offset_response_of_a_linear_d_is_its_weights() -> None:
    """w (x + c) moves by c sum(w), and all its logits have the standard deviation that they have."""
    gan = build(d_norm="none", g_norm="none", instance_noise=0.3)
    layer = nn.Linear(16, 1, dtype=torch.double)
    weight = layer.weight[0].detach()
    gan.discriminator.net = nn.Sequential(layer, nn.Sigmoid())
    logits: list[Tensor] = []
    logits = []
    for number, real in enumerate(real_images(gan).split(BATCH)):
        fake = gan.generate(gan.sample_latents(number * BATCH, (number + 1) * BATCH))
        noisy = [real + gan.draw_instance_noise(BATCH, 0, number), fake + gan.draw_instance_noise(BATCH, 1, number)]
        logits.append(torch.cat(noisy).flatten(start_dim=1).detach() @ weight)
    expected = sum(0.5 * float(weight.sum().abs()) / float(some.std()) for some in logits) / len(logits)
    assert value(gan, "offset_response") == pytest.approx(expected)
    of_sizes = curve(gan, "offset_response", "offset")
    assert of_sizes == pytest.approx({offset: 2 * offset * expected for offset in (0.05, 0.1, 0.2, 0.3, 0.5)})


@pytest.mark.parametrize("norm", ["none", "layer", "group", "spectral"])
def test_mates_do_not_matter_where_d_takes_each_image_by_itself(norm: str) -> None:
    assert value(build(d_norm=norm), "mates_share") == 0
    assert set(curve(build(d_norm=norm), "mates_share", "batch").values()) == {0}


@pytest.mark.parametrize("batching", ["joint", "separate"])
def test_mates_matter_in_batch_norm_the_less_the_larger_the_batch(batching: str) -> None:
    gan = build(batching=batching, instance_noise=0.5)
    images = torch.rand(256, 1, 4, 4, generator=generator(1), dtype=torch.double) * 2 - 1
    small, *of_sizes = PROBES["mates_share"](gan, images)
    gan.normalized_together.fill_(4 * BATCH)
    large, *_ = PROBES["mates_share"](gan, images)
    assert 0 < large["value"] < small["value"] < 1
    assert [entry["batch"] for entry in of_sizes] == [2, 4, 8, 16, 32]
    shares = [entry["value"] for entry in of_sizes]
    assert shares == sorted(shares, reverse=True)
    assert shares[3] == small["value"]
    assert shares[0] > 2 * shares[-1] > 0


def test_mates_are_measured_in_batches_that_can_be_packed_and_grouped() -> None:
    assert other_sizes(build(pack=2)) == [4, 8, 32]
    assert other_sizes(build(d_norm="ghost", ghost_groups=4)) == [8, 32]
    assert other_sizes(build(minibatch_stddev=4, pack=2)) == [32]
    assert set(curve(build(pack=2), "mates_share", "batch")) == {4, 8, 16, 32}


# Gradients ------------------------------------------------------------------------------------------------------------


def linear_gan(lr: float) -> GAN:
    """A GAN whose networks have two linear layers without anything between them."""
    gan = build(loss="wasserstein", gradient_penalty=0.0, d_norm="none", g_norm="none", g_lr=lr, d_lr=lr)
    kind = {"bias": False, "dtype": torch.double}
    gan.discriminator.net = nn.Sequential(nn.Linear(16, 5, **kind), nn.Linear(5, 1, **kind), nn.Sigmoid())
    gan.generator.net = nn.Sequential(nn.Linear(3, 6, **kind), nn.Linear(6, 16, **kind))
    return gan


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_cosine_of_a_linear_network_is_that_of_the_inputs_of_its_upper_layer(lr: float) -> None:
    """Wasserstein's loss of D is b (mean fake - mean real) A' for weights A, then b: b's gradient is A's output."""
    gan = linear_gan(lr)
    lower, upper = (parameter.detach() for parameter in gan.discriminator.parameters())
    real = real_images(gan)[:BATCH].flatten(start_dim=1).mean(dim=0)
    fake = gan.generate(gan.sample_latents(0, BATCH)).detach().flatten(start_dim=1).mean(dim=0)
    before = lower @ (fake - real)
    gradient = torch.outer(upper[0], fake - real)
    after = (lower - lr * gradient.sign()) @ (fake - real)
    found = of(values(gan, "gradient_cosine"), "discriminator")
    assert found["net.1"] == pytest.approx(cosine(before, after))
    assert found["mean"] == found["net.1"]
    assert set(found) == {"net.1", "mean"}
    assert found["net.1"] < 1 - 1e-6 or lr < 0.01


def test_a_step_below_turns_the_gradient_the_more_the_larger_it_is() -> None:
    cosines = [of(values(build(g_lr=lr, d_lr=lr), "gradient_cosine"), "generator")["mean"] for lr in (1e-6, 1e-2, 1.0)]
    assert cosines[0] == pytest.approx(1, abs=1e-3)
    assert cosines[0] > cosines[1] > cosines[2]


def test_opponent_stands_still_in_the_cosine() -> None:
    """Of one network it does not depend on the other's learning rate."""
    one, other = build(g_lr=0.1, d_lr=0.1), build(g_lr=0.1, d_lr=0.2)
    assert of(values(one, "gradient_cosine"), "generator") == of(values(other, "gradient_cosine"), "generator")
    assert of(values(one, "gradient_cosine"), "discriminator") != of(values(other, "gradient_cosine"), "discriminator")


def test_noisy_batch_norm_shifts_what_the_layers_are_fed() -> None:
    """The positive control of the internal covariate shift (Santurkar et al. 2018, section 2.1)."""
    plain, noisy = (
        of(values(build(g_norm=norm, g_lr=1e-4), "gradient_cosine"), "generator")["mean"] for norm in ("batch", "noisy")
    )
    assert noisy < plain - 0.05


def test_loss_along_the_gradient_of_a_linear_network_is_known() -> None:
    """Of one layer the loss is linear: from half a step to four it falls by 3.5 lr |gradient|_1, which does not change."""
    gan = linear_gan(0.1)
    gan.discriminator.net = nn.Sequential(nn.Linear(16, 1, bias=False, dtype=torch.double), nn.Sigmoid())
    real = real_images(gan)[:BATCH].flatten(start_dim=1).mean(dim=0)
    fake = gan.generate(gan.sample_latents(0, BATCH)).detach().flatten(start_dim=1).mean(dim=0)
    assert of(values(gan, "loss_range"), "discriminator")["mean"] == pytest.approx(3.5 * 0.1 * float((fake - real).abs().sum()))
    assert of(values(gan, "predictiveness"), "discriminator")["mean"] == pytest.approx(0, abs=1e-12)
    assert of(values(gan, "predictiveness"), "generator")["mean"] > 0.01  # of two layers it is bilinear


def test_layers_have_their_norms_and_are_in_the_order_of_the_signal() -> None:
    gan = build(d_norm="spectral")
    assert {name: len(group) for name, group in layers_of(gan.generator).items()} == {"net.0": 3, "net.3": 3, "net.6": 2}
    assert [len(group) for group in layers_of(gan.discriminator).values()] == [2, 2, 2]
    trained = {id(parameter) for parameter in gan.generator.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in layers_of(gan.generator).values() for parameter in group} == trained
