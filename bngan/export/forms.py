"""In which forms is a network written for other programs, and can such a file be trusted?

.safetensors has names and numbers alone; .onnx a graph of known operations; .pt2 is torch's own, and to read one can run code.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bngan import rng
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork
from bngan.errors import UsageError
from bngan.export.about import KEY, About
from bngan.export.fold import fold_batch_norm
from bngan.networks import LAYOUTS, build_networks

COMPARED = (1000, 1, 2, 7)  # latents of the batches in which a file's generator is compared with the original
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float64: 1e-10}
HALF = (torch.float16, torch.bfloat16)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Exported(NamedTuple):
    """A network that was read from a file, in evaluation mode, and what the file says of it.

    A generator maps latents (N, latent_dim), and labels (N,) if there are classes, to images of N rows.
    """

    network: nn.Module
    about: About


class Draft(NamedTuple):
    """The content of a file that is not written yet, and the largest difference between its images and the original's."""

    content: bytes
    difference: float


class ImageGenerator(nn.Module):
    """A generator whose images have their shape, (N, C, H, W), also where its last layer is fully connected."""

    def __init__(self, network: GeneratorNetwork, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = network
        self.image_shape = image_shape

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim), and labels int64 (N,) if there are classes, to images (N, C, H, W) in [-1, 1]."""
        return self.network(z, labels).reshape(-1, *self.image_shape)


# Writing --------------------------------------------------------------------------------------------------------------


def check_form(path: Path) -> str:
    """Return the form that a path's suffix names.

    Raises:
        UsageError: if there is none, or a package that it needs is not installed.
    """
    form = path.suffix.lower()
    if form not in FORMS:
        raise UsageError(f"--output {path}: a generator is exported as {', '.join(FORMS)}, not as {path.suffix or 'a folder'}")
    if form == ".onnx":
        _need_onnx()
    return form


def draft(generator: GeneratorNetwork, about: About, path: Path, *, fold: bool = False) -> Draft:
    """Return a generator in the form that the path's suffix names, once that has been read and compared with it.

    They are compared over 1,000 latents and batches of 1, 2 and 7.

    Args:
        generator: in evaluation mode; weights of fewer bits are written as float32, which holds them exactly.
        about: what is known of it.
        path: of the file that it is for.
        fold: whether its batch norm becomes part of the layers before it.

    Raises:
        UsageError: if there is no such form, it is not installed, cannot be folded, or would be too far from the original.
        OSError: if there is no room to write it for a moment.
    """
    form = FORMS[check_form(path)]
    original = copy.deepcopy(generator).cpu()  # where what is read is, too
    if next(original.parameters()).dtype in HALF:
        original = original.float()
    content = form.write(fold_batch_norm(original), replace(about, folded=True)) if fold else form.write(original, about)
    with TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_bytes(content)
        difference = largest_difference(original, read(file, trust=True).network, about)
    if not difference <= (allowed := LARGEST_DIFFERENCE[next(original.parameters()).dtype]):
        remedy = "leave out --fold-batchnorm" if fold else "take another checkpoint"
        raise UsageError(
            f"{path} is not written: its images differ by up to {difference:.2g} from those of the checkpoint's generator, and "
            f"{allowed:g} is allowed; {remedy}"
        )
    return Draft(content, difference)


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, about: About) -> float:
    """Return the largest difference between the values of two generators' images, of the latents that COMPARED describes."""
    differences = []
    for count in COMPARED:
        inputs = example(one, about, count)
        differences.append((one(*inputs).reshape(count, -1) - other(*inputs).reshape(count, -1)).abs().max())
    return float(torch.stack(differences).max())


def example(generator: nn.Module, about: About, count: int) -> tuple[Tensor, ...]:
    """Return latents (count, latent_dim) of the first samples, and their labels (count,) if there are classes."""
    z = rng.sample_latents(0, count, about.settings.latent_dim, seed=0).to(next(generator.parameters()))
    return (z, torch.arange(count) % about.settings.classes) if about.settings.classes else (z,)


def to_safetensors(network: nn.Module, about: About, *, half: bool = False) -> bytes:
    """Return a network as a .safetensors file; half keeps matrices and kernels, nearly all of it, as float16."""
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    if half:
        weights = {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}
    return save(weights, metadata={KEY: about.to_json()})


def _to_onnx(generator: GeneratorNetwork, about: About) -> bytes:
    if about.settings.network in LAYOUTS and next(generator.parameters()).dtype == torch.float64:
        raise UsageError("onnxruntime has no transposed convolution in float64; export as .safetensors or .pt2")
    names = ["z", "labels"] if about.settings.classes else ["z"]
    program = torch.onnx.export(_traced(generator, about), input_names=names, output_names=["images"], verbose=False)
    assert program is not None
    program.model.metadata_props[KEY] = about.to_json()
    return program.model_proto.SerializeToString()


def _to_pt2(generator: GeneratorNetwork, about: About) -> bytes:
    content = BytesIO()
    torch.export.save(_traced(generator, about), content, extra_files={KEY: about.to_json()})
    return content.getvalue()


def _traced(generator: GeneratorNetwork, about: About) -> torch.export.ExportedProgram:
    """Return the generator as a graph for batches of any size."""
    inputs = example(generator, about, count=2)
    shapes = [{0: torch.export.Dim("rows")} for _ in inputs]
    # What is written is in the usual order of axes, which torch's archive asks for.
    generator = copy.deepcopy(generator).to(memory_format=torch.contiguous_format)
    images = ImageGenerator(generator, about.settings.image_shape)
    return torch.export.export(images, inputs, dynamic_shapes=shapes, strict=True)  # or len() would fix the number of rows


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path, *, trust: bool = False) -> Exported:
    """Return what is in a file that has a `draft`, or is somebody else's.

    Args:
        path: of the file.
        trust: whether to read a .pt2, too, which can run code.

    Raises:
        UsageError: if it is missing, damaged, of another form, or not to be trusted.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    form = path.suffix.lower()
    if form == ".pt2" and not trust:
        raise UsageError(
            f"to read {path} can run code, as with any .pt2; add --trust if you know where it is from, or take .safetensors or "
            ".onnx"
        )
    if form == ".onnx":
        _need_onnx()
    try:
        return FORMS[form].read(path)
    except Exception as error:  # a stranger's file may be anything, and fail anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{path} is damaged or not a network that bngan has exported ({reason}); use another one") from error


def _from_safetensors(path: Path) -> Exported:
    with safe_open(path, framework="pt") as file:
        about = About.from_json(file.metadata()[KEY])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in weights.values()) else torch.float32
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    return Exported(_built(about, weights), about)


def _built(about: About, weights: dict[str, Tensor]) -> GeneratorNetwork | DiscriminatorNetwork:
    """Return the network with these weights; that of other settings than theirs is refused before it takes any memory."""
    with torch.device("meta"):
        generator, discriminator = build_networks(about.settings)
        network = discriminator if about.network == "discriminator" else generator
        if about.folded:
            network = fold_batch_norm(generator)
    for name, value in network.state_dict().items():
        if name in weights and weights[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{name} has numbers of another kind, {weights[name].dtype}")
    network.load_state_dict(weights, assign=True)
    # Convolutions of weights in this order are faster.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


class OnnxNetwork(nn.Module):
    """A generator that onnxruntime runs, on the processor.

    Args:
        content: of the file.
    """

    def __init__(self, content: bytes) -> None:
        import onnxruntime  # pyright: ignore[reportMissingImports]  # an extra

        super().__init__()
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        dtype = torch.float64 if "double" in self.session.get_inputs()[0].type else torch.float32
        self.like = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)  # tells of which dtype latents must be

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map latents (N, latent_dim), and labels int64 (N,) if there are classes, to images (N, C, H, W) in [-1, 1]."""
        names = [taken.name for taken in self.session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        (images,) = self.session.run(None, feeds)
        return torch.from_numpy(images)


def _from_onnx(path: Path) -> Exported:
    network = OnnxNetwork(path.read_bytes())
    return Exported(network, About.from_json(network.session.get_modelmeta().custom_metadata_map[KEY]))


def _from_pt2(path: Path) -> Exported:
    if not is_zipfile(path):  # of which torch would make many words
        raise ValueError("it is no archive")
    extra = {KEY: ""}
    network = torch.export.load(path, extra_files=extra).module()
    return Exported(network, About.from_json(extra[KEY]))


def _need_onnx() -> None:
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UsageError(f"a .onnx needs {', '.join(missing)}; install all that it needs by pip install 'bngan[onnx]'")


class Form(NamedTuple):
    """How a form is written and read."""

    write: Callable[[GeneratorNetwork, About], bytes]
    read: Callable[[Path], Exported]


FORMS = {
    ".safetensors": Form(to_safetensors, _from_safetensors),
    ".onnx": Form(_to_onnx, _from_onnx),
    ".pt2": Form(_to_pt2, _from_pt2),
}
