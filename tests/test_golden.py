"""200 seeded iterations of the recipes, on small networks in float64, end at the weights that are stored beside this file.

A step of a rebuilding that should change no result leaves this green. Where results change on purpose, the weights are written
anew, once, in a commit that says why: `python -m tests.test_golden`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor

from bngan import GAN
from bngan.data.loader import ShardedBatches, TensorLoader

FOLDER, CONFIGS = Path(__file__).parent / "golden", Path(__file__).parents[1] / "configs"
ITERATIONS, BATCH = 200, 16
MLP: dict[str, Any] = {"image_shape": (1, 6, 6), "latent_dim": 8, "hidden_dim": 8}
# By name, the recipe that a case begins with, and what makes it small or another one.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", MLP),
    "dcgan": ("dcgan", {"image_shape": (1, 16, 16), "latent_dim": 8, "hidden_dim": 4}),
    "literal": ("literal", MLP),
    "n_critic 2, R1, no norm in D": ("default", {**MLP, "n_critic": 2, "r1": 0.1, "d_norm": "none"}),
}


def trained(case: str, iterations: int = ITERATIONS, **changes: Any) -> dict[str, Tensor]:
    """Return the weights and buffers of both networks and of the average after training on noise."""
    recipe, small = CASES[case]
    settings = {name: value for file in ("default", recipe) for name, value in read_model(file).items()}
    seed_everything(0, verbose=False)
    gan = GAN(**{**settings, **small, **changes})
    size = BATCH * gan.settings.n_critic
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (10 * size, *gan.settings.image_shape), generator=generator, dtype=torch.uint8)
    loader = TensorLoader(pixels, torch.zeros(len(pixels), dtype=torch.long), ShardedBatches(len(pixels), size, train=True))
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=iterations,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(gan, loader)
    return {name: value.clone() for name, value in gan.state_dict().items()}


def read_model(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text()).get("model") or {}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference between weights, each relative to the largest of its tensor, or to 1 if that is more."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp_min(1)) for name in one)


def floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize("case", CASES)
def test_recipe_ends_at_the_stored_weights(case: str) -> None:
    stored, found = load_file(FOLDER / f"{case}.safetensors"), floating(trained(case))
    assert furthest(found, stored) < 1e-8
    assert furthest(floating(trained(case, g_lr=1.00001e-3)), stored) > 1e-6  # which the comparison would notice


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        save_file(floating(trained(case)), FOLDER / f"{case}.safetensors")
