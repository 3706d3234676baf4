"""Libraries' errors: those that are about a setting are put in a line, and the rest are defects, whatever they say."""

import argparse

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bngan.messages import explain

INTERVAL = "`val_check_interval` (1000) must be less than or equal to the number of the training batches (468)."
CASES: dict[str, tuple[str, type[Exception], str]] = {
    # what a library says, the type that it has if it is about a setting, and words of the line
    "a type": ("Parser key \"model.g_lr\": Expected a <class 'float'>. Got value: fast", argparse.ArgumentError, "float"),
    "no such setting": ("Unrecognized arguments: --model.glr=1", argparse.ArgumentError, "there is no setting --model.glr"),
    "none in a file": ("Group 'model' does not accept option 'noise'", argparse.ArgumentError, "--model.noise; it is called"),
    "no GPU": ("No supported gpu backend found!", MisconfigurationException, "--trainer.accelerator"),
    "what has no words yet": ("`Trainer(limit=2)` is odd", MisconfigurationException, "`Trainer(limit=2)` is odd"),
    "an interval": (INTERVAL, ValueError, "--trainer.val_check_interval 1000 is more than the 468 batches"),
}


def raised(kind: type[Exception], text: str) -> Exception:
    return argparse.ArgumentError(None, text) if kind is argparse.ArgumentError else kind(text)


@pytest.mark.parametrize("case", CASES)
def test_error_about_a_setting_is_told_by_its_type_and_another_with_its_words_is_a_defect(case: str) -> None:
    text, kind, words = CASES[case]
    line = explain(raised(kind, text))
    assert line is not None
    assert words in line
    assert explain(RuntimeError(text)) is None
    if kind is not ValueError:
        assert explain(ValueError(text)) is None
