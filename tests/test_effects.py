"""Which settings are refused because they would do nothing, and beside which others they are taken."""

from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from bngan.effects import IDLE_IN, check_effects, rules
from bngan.errors import UsageError
from bngan.recipes import DEFAULT_CONFIG, SHIPPED, flatten

DEFAULT = flatten(yaml.safe_load(DEFAULT_CONFIG.read_text()))
CASES: tuple[tuple[dict[str, Any], dict[str, Any], dict[str, Any]], ...] = (
    # a setting, others beside which it does nothing, and others beside which it does something
    ({"model.g_depth": 3}, {"model.network": "conv"}, {"model.network": "points"}),
    ({"model.g_depth": 3}, {"model.network": "pacgan"}, {"model.network": "mlp"}),
    (
        {"model.initialization": "he"},
        {"model.network": "conv", "model.g_norm": "none", "model.d_norm": "none"},
        {"model.network": "pacgan", "model.g_norm": "none", "model.d_norm": "none"},
    ),
    (
        {"model.initialization": "he"},
        {"model.network": "conv", "model.g_norm": "none", "model.d_norm": "none"},
        {"model.network": "conv"},
    ),
    ({"model.d_norm_first": True}, {"model.d_norm": "none"}, {"model.d_norm": "layer"}),
    ({"model.d_norm_first": False}, {"model.d_norm": "spectral"}, {"model.d_norm": "virtual"}),
    ({"model.allow_batch_coupled_penalty": True}, {"model.d_norm": "layer"}, {"model.d_norm": "noisy"}),
    ({"model.bn_eps": 1e-3}, {"model.g_norm": "layer", "model.d_norm": "none"}, {"model.g_norm": "layer"}),
    (
        {"model.bn_eps": 1e-3},
        {"model.g_norm": "none", "model.d_norm": "group"},
        {"model.g_norm": "none", "model.d_norm": "virtual"},
    ),
    ({"model.bn_momentum": 0.2}, {"model.g_norm": "none", "model.d_norm": "virtual"}, {"model.d_norm": "virtual"}),
    ({"model.ghost_groups": 4}, {}, {"model.g_norm": "ghost"}),
    ({"model.ghost_groups": 4}, {"model.d_norm": "reference"}, {"model.d_norm": "ghost"}),
    ({"model.batching": "separate"}, {"model.d_norm": "spectral"}, {"model.d_norm": "reference"}),
    ({"model.update_d_stats_in_g_step": True}, {"model.d_norm": "virtual"}, {"model.g_norm": "none"}),
    ({"model.eval_statistics": "batch"}, {"model.g_norm": "none"}, {"model.d_norm": "none"}),
    ({"model.ema_buffers": "copy"}, {"model.g_norm": "layer"}, {"model.g_norm": "ghost"}),
    ({"model.ema_buffers": "precise"}, {"model.ema_decay": 0.0}, {"model.ema_decay": 0.5}),
    ({"model.instance_noise_end": 0.5}, {"model.instance_noise": 0.0}, {"model.instance_noise": 0.1}),
    ({"trainer.min_epochs": 2}, {}, {"trainer.max_time": "00:01:00:00"}),
    ({"trainer.min_steps": 2}, {}, {"trainer.callbacks": [Namespace(class_path="EarlyStopping")]}),
    ({"trainer.val_check_interval": 2}, {"trainer.limit_val_batches": 0}, {"trainer.limit_val_batches": 1}),
    ({"trainer.check_val_every_n_epoch": 2}, {"trainer.limit_val_batches": 0.0}, {"trainer.limit_val_batches": 0.5}),
    ({"batchnorm.histograms": False}, {"trainer.logger": False}, {}),
    ({"trainer.log_every_n_steps": 3}, {"trainer.logger": False}, {}),
    ({"batchnorm.every_n_iterations": 3}, {"model.g_norm": "none", "model.d_norm": "none"}, {"model.g_norm": "none"}),
    ({"metrics.chunk": 3}, {"metrics.num_samples": 0}, {"metrics.num_samples": 300}),
)


def namespace(settings: dict[str, Any]) -> Namespace:
    found = Namespace()
    for name, value in settings.items():
        found[name] = value
    return found


def check(command: str, changes: dict[str, Any], typed: dict[str, Any]) -> None:
    check_effects(command, namespace({**DEFAULT, **changes}), namespace(changes), namespace(typed))


@pytest.mark.parametrize(("setting", "idle", "useful"), CASES)
def test_setting_that_does_nothing_is_refused_where_typed_and_told_of_where_in_a_file(
    setting: dict[str, Any], idle: dict[str, Any], useful: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ((name, value),) = setting.items()
    check("fit", useful | setting, typed=useful | setting)
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match=rf"^--{name} {value} has no effect where .*; leave it out, or change that$"):
        check("fit", idle | setting, typed=setting)
    check("fit", idle | setting, typed={})
    assert capsys.readouterr().out.startswith(f"{name} {value} has no effect where ")
    check("fit", idle | {name: DEFAULT[name]}, typed={name: DEFAULT[name]})
    assert capsys.readouterr().out == "", "what is as by default does no harm"


def test_every_rule_is_of_a_setting_and_is_tried() -> None:
    ruled = {name for names, *_ in rules(namespace(DEFAULT)) for name in names.split()}
    assert ruled | set().union(*IDLE_IN.values()) <= DEFAULT.keys()
    assert {name for setting, *_ in CASES for name in setting} >= ruled - {
        *("trainer.num_sanity_val_steps", "metrics.feature", "metrics.seed", "metrics.mode_threshold"),  # as their neighbours
    }


@pytest.mark.parametrize(
    ("command", "setting", "taken_by"),
    [
        ("validate", "trainer.max_epochs", "fit"),
        ("test", "images.num_samples", "fit"),
        ("predict", "checkpoint.every_n_iterations", "fit"),
        ("predict", "metrics.chunk", "validate"),
        ("predict", "metrics.num_samples", "test"),
        ("fit", "trainer.limit_test_batches", "test"),
        ("test", "trainer.limit_val_batches", "validate"),
        ("validate", "trainer.limit_predict_batches", "predict"),
        ("test", "batchnorm.histograms", "fit"),
    ],
)
def test_setting_of_another_command_is_refused_where_typed(
    command: str, setting: str, taken_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {setting: 7}
    check(taken_by, changes, typed=changes)
    with pytest.raises(UsageError, match=f"^--{setting} has no effect on {command}; leave it out$"):
        check(command, changes, typed=changes)
    check(command, changes, typed={})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_setting_of_a_shipped_recipe_does_something(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    check("fit", flatten(yaml.safe_load((SHIPPED / f"{recipe}.yaml").read_text())), typed={})
    assert capsys.readouterr().out == ""
