"""Files of settings: found by name, read, and looked through for code."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from bngan.errors import UsageError
from bngan.recipes import CLASSES, SHIPPED, check_class, find_config, flatten, names_foreign_code, read_config, to_yaml

CSV = "lightning.pytorch.loggers.CSVLogger"


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes_that_are_shipped_are_found_by_name_after_files() -> None:
    assert find_config("dcgan") == SHIPPED / "dcgan.yaml"
    Path("dcgan").mkdir()
    assert find_config("dcgan") == SHIPPED / "dcgan.yaml"
    Path("literal").write_text("name: mine")
    assert find_config("literal") == Path("literal")
    for name in ("resnet", "configs/dcgan.yaml", "../configs/dcgan", ""):
        with pytest.raises(UsageError, match=r"no such file.*best_mlp, conditional, dcgan, default, literal, pictures"):
            find_config(name)
    with pytest.raises(UsageError, match="--config needs a file"):
        find_config(None)


def test_settings_are_read_by_group() -> None:
    Path("a.yaml").write_text("name: a\nmodel: {g_lr: 0.5}\n")
    assert read_config(Path("a.yaml")) == {"name": "a", "model": {"g_lr": 0.5}}
    for text, reason in (
        ("modle: {g_lr: 1}", "unknown group 'modle'"),
        ("model: 3", "model should hold settings, not 3"),
        ("model: [1", "not valid YAML at line 1"),
        ("", "holds no settings"),
    ):
        Path("a.yaml").write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_config(Path("a.yaml"))


def test_settings_have_full_names_and_are_written_by_group() -> None:
    grouped = {"name": "a", "model": {"g_lr": 0.5, "g_clip": None}, "trainer": {"callbacks": [{"class_path": "x"}]}}
    flat = {"name": "a", "model.g_lr": 0.5, "model.g_clip": None, "trainer.callbacks": [{"class_path": "x"}]}
    assert flatten(grouped) == flat
    assert yaml.safe_load(to_yaml(flat)) == grouped
    assert flatten({}) == yaml.safe_load(to_yaml({})) == {}
    with pytest.raises(UsageError, match="numbers, words and lists"):
        to_yaml({"data.batch_size": object()})


@pytest.mark.parametrize("setting", CLASSES)
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [],
        "simple",
        CSV,
        "torch.nn.Flatten",
        {"class_path": CSV, "init_args": {"save_dir": "logs/a.b/c", "flush_logs_every_n_steps": 10, "prefix": "a b.c"}},
        [{"class_path": CSV}, {"class_path": "bngan.callbacks.SampleImages", "init_args": {"num_samples": 4}}],
    ],
)
def test_own_classes_with_plain_values_are_no_foreign_code(setting: str, value: Any) -> None:
    assert not names_foreign_code(setting, value)


@pytest.mark.parametrize("setting", CLASSES)
@pytest.mark.parametrize(
    "value",
    [
        "theirs.Thing",
        "lightning_theirs.Thing",
        "theirs/file.py",
        ["theirs.Thing"],
        [CSV, "theirs.Thing"],
        {"class_path": "theirs.Thing"},
        {"class_path": ["theirs.Thing"]},
        {"class_path": {"class_path": "theirs.Thing"}},
        {"class_path": CSV, "init_args": {"save_dir": "theirs.function"}},
        {"class_path": CSV, "init_args": {"save_dir": "os.system"}},
        {"class_path": CSV, "init_args": {"x": {"class_path": CSV}}},
        {"class_path": CSV, "dict_kwargs": {"x": [{"class_path": "Thing"}]}},
        {"init_args.x": "theirs.function"},
    ],
)
def test_foreign_code_is_noticed_however_it_is_named(setting: str, value: Any) -> None:
    assert names_foreign_code(setting, value)


def test_only_settings_that_name_classes_are_looked_through() -> None:
    assert not names_foreign_code("name", "a.b")
    assert not names_foreign_code("data.folder", "pictures.of.mine")
    assert names_foreign_code("trainer.callbacks.class_path", None)  # another way to write part of one


class Plain:
    """A class that takes anything."""

    def __init__(self, value: Any = print, other: int = 3) -> None:
        pass


def test_classes_are_given_plain_values_or_have_their_own() -> None:
    def given(**arguments: Any) -> Namespace:
        return Namespace(class_path=f"{__name__}.Plain", init_args=Namespace(**arguments))

    check_class("trainer.logger", given(value=[1, "a", None, Path("b")], other=2))
    check_class("trainer.logger", given(value=print))
    for value in (len, [len], {"x": len}, Namespace(class_path="Plain"), Plain()):
        with pytest.raises(UsageError, match=r"--trainer\.logger .* value.* would run code"):
            check_class("trainer.logger", given(value=value))
    for not_a_class in (Namespace(class_path="os.mkdir"), Plain()):
        with pytest.raises(UsageError, match=r"--trainer\.logger must name a class"):
            check_class("trainer.logger", not_a_class)


def test_every_shipped_recipe_can_be_read() -> None:
    recipes = sorted(SHIPPED.glob("*.yaml"))
    assert len(recipes) >= 5
    for path in recipes:
        assert read_config(path) == yaml.safe_load(path.read_text())
