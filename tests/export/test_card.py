"""A model card says what is true of its generator."""

from pathlib import Path
from typing import Any

import pytest

from bngan.export.about import About
from bngan.export.card import card, is_card
from bngan.settings import Settings

POINTS: dict[str, Any] = {"network": "points", "image_shape": (2, 1, 1), "latent_dim": 2}


def text_of(form: str = ".safetensors", **settings: Any) -> str:
    about = About(Settings(**settings), batch_size=16, iteration=3, weights="ema", statistics=None)
    return card(about, Path(f"g{form}"), "g.png", difference=0.0, dtype="float32")


def test_virtual_batch_norm_is_batch_norm() -> None:
    assert "it has no batch norm" not in text_of(g_norm="virtual")
    assert "virtual batch norm normalizes it by a reference batch" in text_of(g_norm="virtual")
    assert "it has no batch norm" in text_of(g_norm="layer")


@pytest.mark.parametrize("form", [".safetensors", ".onnx", ".pt2"])
def test_points_that_no_tanh_bounds_are_not_said_to_be_in_a_range(form: str) -> None:
    assert "[-1, 1]" not in text_of(form, **POINTS)
    assert text_of(form).count("in [-1, 1]") == 2


def test_card_is_known_by_its_first_line() -> None:
    assert is_card(text_of())
    for other in ("", "# My project\n", f"# My project\n{text_of()}"):
        assert not is_card(other)
