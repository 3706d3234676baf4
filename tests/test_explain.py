"""The page that explains: what it refuses, what it holds, and that its numbers are of the networks in it."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bngan.batchnorm.layers import batch_norm_layers, running_statistics
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork
from bngan.errors import UsageError
from bngan.explain import explain, fill, in_words, page, real_digits, shown_by
from bngan.explain.measured import Shown, distance, measure
from bngan.networks import ConvGenerator, Discriminator, Generator
from bngan.norms import NormSettings

LARGEST = 2_000_000  # bytes of a page
SCENES = ["change", "origin", "channel", "mates", "momentum", "erase", "blind", "fold", "predict"]


def made_up_networks(seed: int = 0) -> tuple[Generator, Discriminator]:
    """Return networks whose batch norms have numbers other than those that they begin with."""
    torch.manual_seed(seed)
    generator, discriminator = Generator(), Discriminator()
    for network in (generator, discriminator):
        for _, layer in batch_norm_layers(network):
            mean, variance = running_statistics(layer)
            mean.normal_(std=0.1)
            variance.uniform_(0.2, 0.5)
            assert layer.weight is not None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    return generator.eval(), discriminator.eval()


@pytest.fixture(scope="module")
def shown() -> Shown:
    return shown_by(*made_up_networks())


@pytest.fixture(scope="module")
def numbers(shown: Shown) -> dict[str, float]:
    return measure(shown)


@pytest.fixture(scope="module")
def html(shown: Shown) -> str:
    return page(shown, "networks <made up> & untrained")


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "discriminator", "named"),
    [
        (lambda: ConvGenerator(), Discriminator, "generator"),
        (lambda: Generator(hidden_dim=512), Discriminator, "generator"),
        (lambda: Generator(norm="layer"), Discriminator, "generator"),
        (lambda: Generator(norm_settings=NormSettings(classes=10)), Discriminator, "generator"),
        (Generator, lambda: Discriminator(norm="none"), "discriminator"),
        (Generator, lambda: Discriminator(dropout=0.2), "discriminator"),
        (Generator, lambda: Discriminator(input_dim=2 * 784), "discriminator"),
    ],
    ids=["convolutions", "best_mlp", "another norm", "classes", "no norm", "dropout", "packs"],
)
def test_other_networks_are_refused_in_a_line(
    generator: Callable[[], GeneratorNetwork], discriminator: Callable[[], DiscriminatorNetwork], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"this {named} is another one: it needs --model.network mlp") as caught:
        explain(generator(), discriminator(), tmp_path / "explain.html", "nowhere")
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_weights_beyond_half_precision_are_refused(shown: Shown) -> None:
    generator, discriminator = made_up_networks()
    with torch.no_grad():
        generator.get_parameter("net.0.weight")[0, 0] = 65_520.0  # rounds to infinity; the largest number is 65,504
    with pytest.raises(UsageError, match="half precision cannot hold"):
        shown_by(generator, discriminator)


def test_a_file_that_is_there_is_replaced_only_by_force(html: str, tmp_path: Path) -> None:
    output = tmp_path / "explain.html"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists; choose another --output, or add --force"):
        explain(*made_up_networks(), output, "nowhere")
    assert output.read_text() == "mine"
    explain(*made_up_networks(), output, "networks <made up> & untrained", force=True)
    assert output.read_text() == html


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"page.pdf: a page that explains is written as .html"):
        explain(*made_up_networks(), tmp_path / "page.pdf", "nowhere")


# What it holds --------------------------------------------------------------------------------------------------------


def data_of(html: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(found)


def test_it_is_small_and_names_no_other_file(html: str) -> None:
    assert len(html.encode()) < LARGEST
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)["']""", html)
    assert len(addresses) > 9
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|@import|url\(", html)


def test_its_policy_allows_its_own_script_and_style_alone(html: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy.startswith("default-src 'none';")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf'<{tag}(?: type="module")?>(.*?)</{tag}>', html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not re.search(r"<[a-z][^>]* (?:style|on[a-z]+)=", html), "these would be blocked"


def test_nothing_is_left_to_fill_in_and_texts_are_escaped(html: str) -> None:
    assert "{{" not in html
    assert "networks &lt;made up> &amp; untrained" in html


def test_each_control_belongs_to_the_scene_that_it_lies_in(html: str) -> None:
    scenes = re.findall(r'<section id="(\w+)">(.*?)</section>', html, re.DOTALL)
    assert [name for name, _ in scenes] == SCENES
    for name, text in scenes[:-1]:
        assert set(re.findall(r'name="(\w+)\.\w+"', text)) == {name}
        assert 'data-part="caption"' in text
        assert 'class="said"' in text


def test_weights_digits_and_latents_are_decoded_as_they_were_measured(html: str, shown: Shown) -> None:
    data = data_of(html)
    for name, network in (("generator", shown.generator), ("discriminator", shown.discriminator)):
        linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        for packed, layer in zip(data[name]["linears"], linears, strict=True):
            weight = np.frombuffer(base64.b64decode(packed["weight"]), dtype="<f2").astype(np.float64)
            np.testing.assert_array_equal(weight.reshape(layer.weight.shape), layer.weight)
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed["bias"]), dtype="<f4"), layer.bias)
        for packed, (_, layer) in zip(data[name]["norms"], batch_norm_layers(network), strict=True):
            values = (layer.weight, layer.bias, *running_statistics(layer))
            for key, value in zip(("gamma", "beta", "mean", "variance"), values, strict=True):
                np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed[key]), dtype="<f4"), value)
            assert packed["eps"] == layer.eps
    real = np.frombuffer(base64.b64decode(data["real"]), dtype=np.uint8)
    np.testing.assert_allclose(real.reshape(128, 784) / 127.5 - 1, shown.real_images)


def test_networks_are_as_given_but_for_rounding() -> None:
    generator, discriminator = made_up_networks()
    shown = shown_by(generator, discriminator)
    z = shown.latents
    assert shown.generator is not generator
    torch.testing.assert_close(shown.generator(z), generator.double()(z), rtol=0, atol=2e-3)
    assert (shown.generator(z) - generator(z)).abs().max() > 0


def test_real_digits_are_the_first_held_out_ones(mnist_root: Path) -> None:
    content = (mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    assert real_digits(3).numpy().tobytes() == content[16 : 16 + 3 * 784]


# What its text says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "form", "expected"),
    [
        (0.1234, ".2f", "0.12"),
        (-1.56, ".1f", "&minus;1.6"),
        (-0.001, ".1f", "0.0"),
        (0.655, ".0%", "66%"),
        (2.1e-16, "power", "2&nbsp;&times;&nbsp;10<sup>&minus;16</sup>"),
        (0.0, "power", "0"),
    ],
)
def test_numbers_are_written_as_in_a_book(number: float, form: str, expected: str) -> None:
    assert in_words(number, form) == expected


def test_filling_in_knows_texts_from_numbers_and_names_what_is_missing() -> None:
    assert fill("{{a}} is {{b:.1f}}, {not} this", {"a": "it"}, {"b": 2.0}) == "it is 2.0, {not} this"
    with pytest.raises(KeyError, match="absent"):
        fill("{{absent}}", {"a": "it"}, {})


def test_distance_is_the_root_mean_square_of_each_pair() -> None:
    images = torch.zeros(2, 784)
    others = torch.stack([torch.full((784,), 0.5), torch.zeros(784)])
    assert distance(images, others) == pytest.approx(0.25)
    assert distance(images, images) == 0


def test_numbers_say_what_follows_from_the_equations(numbers: dict[str, float]) -> None:
    assert numbers["mates_2"] > numbers["mates_8"] > numbers["mates_32"] > numbers["mates_128"] > 0
    assert numbers["same_128"] >= numbers["same_2"]
    assert numbers["ones_2"] > 0.9
    assert numbers["reset"] > numbers["fed_10"] > 0
    assert numbers["plus_batch"] < 1e-9 < 1e-3 < numbers["plus_running"]
    assert numbers["times_batch"] < 1e-3 < numbers["times_running"]
    assert numbers["separate_move"] < 1e-9 < 1e-3 < abs(numbers["joint_brighter"] - numbers["joint_before"])
    assert numbers["untrained_move"] < 1e-9
    assert numbers["separate_slope"] < 1e-9 < 1e-3 < numbers["joint_slope"]
    assert abs(numbers["moved_1"]) > abs(numbers["moved_120"]) > 1e-4 > abs(numbers["moved_128"])


def test_slope_is_that_of_the_curve(shown: Shown, numbers: dict[str, float]) -> None:
    fakes, step = shown.draw(shown.latents, "batch"), 1e-6
    shown.discriminator.train()
    mean = [float(shown.discriminator.logits(torch.cat([shown.real_images, fakes + b]))[128:].mean()) for b in (-step, step)]
    shown.discriminator.eval()
    assert numbers["joint_slope"] == pytest.approx(abs(mean[1] - mean[0]) / (2 * step), rel=1e-3)
