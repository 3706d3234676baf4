"""Every recipe that is shipped runs."""

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bngan.cli import main
from bngan.recipes import flatten
from bngan.settings import Settings
from tests.conftest import QUICK, REPOSITORY, only_run

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe: Path, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = []
    if yaml.safe_load(recipe.read_text()).get("data", {}).get("name") == "folder":
        (tmp_path / "pictures").mkdir()
        for number in range(80):
            pixels = np.random.default_rng(number).integers(0, 256, (70 + number % 3, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.jpg")
        own = [f"--data.folder={tmp_path / 'pictures'}"]
    assert main(["fit", f"--config={recipe.stem}", f"--data.root={mnist_root}", *QUICK, *own]) == 0
    content = torch.load(only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(content["state_dict"]["iteration"]) == 10
    for name, value in (yaml.safe_load(recipe.read_text()).get("model") or {}).items():
        if name != "gradient_penalty":  # unset means the loss's own
            assert content["hyper_parameters"][name] == value


def read(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "configs" / f"{recipe}.yaml").read_text())


def test_default_recipe_is_the_default_of_the_class_setting_by_setting() -> None:
    defaults = {name: parameter.default for name, parameter in signature(Settings).parameters.items()}
    for linked in ("image_shape", "seed"):  # these come from the data and from seed_everything
        del defaults[linked]
    assert read("default")["model"] == defaults


def test_default_recipe_has_every_setting_and_is_all_the_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--print_config"]) == 0
    settings = {group: value for group, value in yaml.safe_load(capsys.readouterr().out).items() if value != {}}
    assert flatten(settings) == flatten(read("default"))
    assert main(["fit", "--help"]) == 0
    text = (REPOSITORY / "configs" / "default.yaml").read_text()
    assert text in capsys.readouterr().out
    commented = [line for line in text.splitlines() if "#" in line]
    assert len(commented) > len(text.splitlines()) / 2
