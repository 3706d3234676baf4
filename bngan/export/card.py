"""What should a person know who finds an exported generator?"""

from dataclasses import asdict
from pathlib import Path

from bngan.export.about import About
from bngan.settings import Settings

TITLE = ": the generator of a GAN"  # by which a card is known again
HOW_TO_RUN = {
    ".safetensors": """```python
import bngan

images = bngan.load("{name}").sample(64, seed=0)  # (64, {channels}, {height}, {width}){bounds}
```""",
    ".onnx": """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
z = np.random.default_rng(0).standard_normal((64, {latent_dim})).astype("{dtype}")
(images,) = session.run(None, {{"z": z{onnx_labels}}})  # (64, {channels}, {height}, {width}){bounds}
```""",
    ".pt2": """```python
import torch

generator = torch.export.load("{name}").module()  # which can run code: load what you trust
z = torch.randn(64, {latent_dim}, dtype=torch.{dtype})
images = generator(z{torch_labels})  # (64, {channels}, {height}, {width}){bounds}
```""",
}


def card(about: About, path: Path, picture: str, difference: float, dtype: str) -> str:
    """Return the text of a model card, in Markdown.

    Args:
        about: what is known of the generator.
        path: of its file.
        picture: the name of the file that has samples of it.
        difference: the largest, between values of its images and those of the checkpoint's generator.
        dtype: of its weights, by numpy's name.
    """
    settings, (channels, height, width) = about.settings, about.settings.image_shape
    how = HOW_TO_RUN[path.suffix.lower()].format(
        name=path.name,
        channels=channels,
        height=height,
        width=width,
        bounds=(bounds := "" if settings.network == "points" else " in [-1, 1]"),
        latent_dim=settings.latent_dim,
        dtype=dtype,
        onnx_labels=', "labels": np.full(64, 7)' if settings.classes else "",
        torch_labels=", torch.full((64,), 7)" if settings.classes else "",
    )
    asked = f" of the {settings.classes} classes that `labels` names" if settings.classes else ""
    return f"""# {path.name}{TITLE}

![samples]({picture})

It maps latents `z` ({settings.latent_dim} standard normal numbers each) to images{asked},
{channels} x {height} x {width}{bounds}, in batches of any size. Each image is a function of its own latent alone:
{_normalized(about)}

{how}

| | |
|---|---|
{_rows(about, difference)}

{_measured(about)}

Settings that differ from bngan's defaults: {_differences(settings)}.
"""


def is_card(text: str) -> bool:
    """Return whether a text is a model card, of whichever generator."""
    return text.partition("\n")[0].endswith(TITLE)


def _normalized(about: About) -> str:
    if about.settings.g_norm == "virtual":
        return "virtual batch norm normalizes it by a reference batch, which is always the same, and by itself."
    if about.statistics is None:
        return "it has no batch norm by which others could sway it."
    folded = ", and folded into the layers before it" if about.folded else ""
    return f"batch norm is evaluated by {about.statistics} statistics{folded}."


def _rows(about: About, difference: float) -> str:
    weights = {"ema": "exponential moving average", "raw": "as trained", None: "as trained"}[about.weights]
    rows = {
        "recipe": about.recipe or "unknown",
        "iterations of training": f"{about.iteration:,}",
        "weights": weights,
        "largest difference to the checkpoint's generator": f"{difference:.2g} on 1,000 latents and batches of 1, 2 and 7",
        "checkpoint": f"`{about.checkpoint}`, SHA-256 `{about.sha256}`",
        "written by": ", ".join(f"{name} {number}" for name, number in about.versions.items()),
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _measured(about: About) -> str:
    """Return a table of the metrics beside those of as many real images, or say that there is none."""
    if not about.metrics:
        return "Its samples were not measured at this iteration (`bngan test` does)."
    rows = [f"| {name} | {value:.4g} | {_number(about.floor.get(name))} |" for name, value in about.metrics.items()]
    return "\n".join(["| metric | samples | real images (floor) |", "|---|---|---|", *rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _differences(settings: Settings) -> str:
    usual = asdict(Settings())
    changed = [f"`{name} {value}`" for name, value in asdict(settings).items() if value != usual[name]]
    return ", ".join(changed) or "none"
