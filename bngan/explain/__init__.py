"""How do two trained networks become one page that explains batch norm?"""

import base64
import copy
import hashlib
import json
import lzma
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bngan import __version__, rng
from bngan.batchnorm.layers import running_statistics
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork
from bngan.data import mnist
from bngan.errors import UsageError
from bngan.explain.measured import BATCH, BRIGHTER, PLUS, SIZES, TIMES, Shown, measure
from bngan.files import refuse_to_replace, write_whole
from bngan.networks import Discriminator, Generator

Network = TypeVar("Network", bound=nn.Module)

PARTS = Path(__file__).parent
SCRIPTS = ("network.js", "page.js", "generator_scenes.js", "verdict_scene.js", "guesses.js", "start.js")
IDX_HEADER = 16  # bytes before the pixels of MNIST's files
MINUS, TIMES_10 = "&minus;", "&nbsp;&times;&nbsp;10"


def explain(
    generator: GeneratorNetwork, discriminator: DiscriminatorNetwork, output: Path, source: str, *, force: bool = False
) -> None:
    """Write a page on which a reader moves what batch norm moves: one HTML file that needs neither network nor server.

    Args:
        generator: a trained one, by whose weights the page draws; the source's, with batch norm.
        discriminator: the one that it was trained with.
        output: the file, .html.
        source: in words, where the networks are from.
        force: whether a file that is there is replaced.

    Raises:
        UsageError: if the networks are others, or if the file is there or is to be no .html.
        OSError: if there is no room or no right to.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {output}: a page that explains is written as .html")
    refuse_to_replace(output, force=force)
    write_whole(output, page(shown_by(generator, discriminator), source).encode())


def shown_by(generator: GeneratorNetwork, discriminator: DiscriminatorNetwork) -> Shown:
    """Return the networks as the page decodes them, with the latents and the real digits that it has.

    Raises:
        UsageError: if they are not the source's networks of the default's size, with batch norm in both.
    """
    _check_network("generator", generator, Generator())
    _check_network("discriminator", discriminator, Discriminator())
    return Shown(
        generator=_decoded(generator),
        discriminator=_decoded(discriminator),
        latents=rng.sample_latents(0, BATCH, generator.input_dim, seed=0).half().double(),
        real_images=real_digits(BATCH).double() / 127.5 - 1,
    )


def page(shown: Shown, source: str) -> str:
    """Return the page of these networks, whose source it tells in words."""
    script = "\n".join((PARTS / name).read_text() for name in SCRIPTS)
    style = (PARTS / "style.css").read_text()
    numbers = measure(shown)
    texts = {
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": json.dumps(_data(shown, numbers)),
        "literal": f"data:image/png;base64,{_base64((PARTS / 'literal.png').read_bytes())}",
        "version": __version__,
        "source": source.replace("&", "&amp;").replace("<", "&lt;"),
    }
    return fill((PARTS / "page.html").read_text(), texts, numbers | {"brighter": BRIGHTER, "times": TIMES, "plus": PLUS})


def fill(template: str, texts: dict[str, str], numbers: dict[str, float]) -> str:
    """Return a template with {{name}} replaced by texts, and {{name:format}} by numbers."""

    def put(found: re.Match[str]) -> str:
        name, form = found.groups()
        return texts[name] if form is None else in_words(numbers[name], form)

    return re.sub(r"\{\{(\w+)(?::([^}]+))?\}\}", put, template)


def in_words(number: float, form: str) -> str:
    """Return a number as a reader expects it: with a true minus, and for the format `power` as one digit times 10^n."""
    if form == "power" and number:
        digit, exponent = f"{number:.0e}".split("e")
        return f"{digit}{TIMES_10}<sup>{int(exponent)}</sup>".replace("-", MINUS)
    text = "0" if form == "power" else format(number, form)
    return text.replace("-", MINUS if text.strip("-0.%") else "")


def real_digits(count: int) -> Tensor:
    """Return the first held-out digits of MNIST, uint8 (count, 784), from the package."""
    with lzma.open(mnist.PACKAGED / "t10k-images-idx3-ubyte.xz") as file:
        content = bytearray(file.read(IDX_HEADER + count * 784))
    return torch.frombuffer(content, dtype=torch.uint8, offset=IDX_HEADER).view(count, 784)


def _check_network(name: str, network: nn.Module, expected: nn.Module) -> None:
    """Refuse a network that is not built of the same layers as the default's."""
    kinds, needed_kinds = ([type(part) for part in one.modules()] for one in (network, expected))
    shapes, needed_shapes = ({key: value.shape for key, value in one.state_dict().items()} for one in (network, expected))
    if kinds != needed_kinds or shapes != needed_shapes:
        raise UsageError(
            f"the page that explains shows the default's networks alone, and this {name} is another one: it needs "
            "--model.network mlp with hidden_dim 128, latent_dim 100 and norm batch in both, for 28 x 28 grey images, and no "
            "dropout, pack or minibatch_stddev"
        )


def _decoded(network: Network) -> Network:
    """Return a copy in float64 and in evaluation mode, its matrices rounded to half precision and its vectors to single.

    Raises:
        UsageError: if a weight is too large for that, or no number.
    """
    network = copy.deepcopy(network).double().eval().requires_grad_(False)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half() if value.ndim == 2 else value.float())
            if not value.isfinite().all():
                raise UsageError("these networks have weights that half precision cannot hold; take an earlier checkpoint")
    return network


def _data(shown: Shown, numbers: dict[str, float]) -> dict[str, Any]:
    """Return what the page's scripts read."""
    return {
        "generator": _packed(shown.generator),
        "discriminator": _packed(shown.discriminator),
        "latents": _half(shown.latents),
        "real": _base64(((shown.real_images + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()),
        "ten": shown.ten().tolist(),
        "between": numbers["between"],
        "byMates": [numbers[f"mates_{size}"] for size in SIZES],
    }


def _packed(network: nn.Module) -> dict[str, Any]:
    """Return a network's linear layers and norms, for decodeNetwork in network.js."""
    linears, norms = [], []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            linears.append({"weight": _half(layer.weight), "bias": _single(layer.bias), "outputs": layer.out_features})
        elif isinstance(layer, nn.BatchNorm1d):
            mean, variance = running_statistics(layer)
            vectors = {"gamma": layer.weight, "beta": layer.bias, "mean": mean, "variance": variance}
            norms.append({name: _single(vector) for name, vector in vectors.items()} | {"eps": layer.eps})
    return {"linears": linears, "norms": norms}


def _half(values: Tensor) -> str:
    return _base64(values.detach().half().numpy().astype("<f2").tobytes())


def _single(values: Tensor) -> str:
    return _base64(values.detach().float().numpy().astype("<f4").tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _hash(text: str) -> str:
    """Return the digest by which a content security policy allows a script or a style."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"
