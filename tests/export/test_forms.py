"""Exported files: what was written makes the same images, and a stranger's file does no harm."""

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from bngan.blocks import GeneratorNetwork
from bngan.errors import UsageError
from bngan.export import forms
from bngan.export.about import KEY, About
from bngan.export.forms import draft, example, largest_difference, read, to_safetensors
from bngan.settings import Settings
from tests.export.test_fold import CONV, MLP, trained


def about(**settings: Any) -> About:
    return About(Settings(**settings), batch_size=16, iteration=3, weights="ema", statistics="running", metrics={"fid": 2.5})


def write(generator: GeneratorNetwork, known: About, path: Path, *, fold: bool = False) -> float:
    content, difference = draft(generator, known, path, fold=fold)
    path.write_bytes(content)
    return difference


def exported(path: Path, **settings: Any) -> Path:
    write(trained(**settings), about(**settings), path)
    return path


# What is written ------------------------------------------------------------------------------------------------------


CONDITIONAL = {**CONV, "classes": 3}


@pytest.mark.parametrize(
    ("form", "settings", "fold", "dtype"),
    [
        (".safetensors", MLP, False, torch.float32),
        (".safetensors", MLP, True, torch.float64),
        (".safetensors", CONDITIONAL, False, torch.float64),
        (".safetensors", CONDITIONAL, True, torch.float32),
        (".safetensors", {**MLP, "g_norm": "virtual"}, False, torch.float32),
        (".safetensors", {**MLP, "g_norm": "spectral"}, False, torch.float32),
        (".pt2", MLP, True, torch.float32),
        (".pt2", CONDITIONAL, False, torch.float64),
    ],
)
def test_file_makes_the_images_of_the_original(
    form: str, settings: dict[str, Any], fold: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    generator, known, path = trained(**settings).to(dtype), about(**settings), tmp_path / f"g{form}"
    difference = write(generator, known, path, fold=fold)
    assert difference <= (1e-12 if dtype == torch.float64 else 1e-5)
    found = read(path, trust=True)
    assert found.about == replace(known, folded=fold)
    for count in (1, 2, 7):
        z = example(generator, known, count)
        torch.testing.assert_close(found.network(*z).reshape(count, -1), generator(*z).reshape(count, -1), rtol=0, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("settings", [MLP, CONDITIONAL], ids=["mlp", "conditional conv"])
def test_onnx_runs_elsewhere(settings: dict[str, Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    generator, known, path = trained(**settings), about(**settings), tmp_path / "g.onnx"
    assert write(generator, known, path, fold=True) < 1e-5
    session = onnxruntime.InferenceSession(str(path))
    names = [taken.name for taken in session.get_inputs()]
    assert names == (["z", "labels"] if known.settings.classes else ["z"])
    for count in (1, 2, 7):
        z = example(generator, known, count)
        (images,) = session.run(None, {name: value.numpy() for name, value in zip(names, z, strict=True)})
        assert images.shape == (count, *known.settings.image_shape)
        expected = generator(*z).reshape(images.shape)
        torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=1e-5)
    assert read(path).about == replace(known, folded=True)


def test_half_precision_is_kept_and_read_as_single() -> None:
    generator = trained(**MLP)
    kept = load(to_safetensors(generator, about(**MLP), half=True))
    assert {(value.ndim > 1, value.dtype) for value in kept.values() if value.is_floating_point()} == {
        (True, torch.float16),
        (False, torch.float32),
    }


def test_weights_of_half_precision_are_written_in_single(tmp_path: Path) -> None:
    generator = trained(**MLP).bfloat16()
    assert write(generator, about(**MLP), tmp_path / "g.safetensors") < 1e-6
    assert {value.dtype for value in read(tmp_path / "g.safetensors").network.parameters()} == {torch.float32}
    assert {value.dtype for value in generator.parameters()} == {torch.bfloat16}, "the original is as it was"


def test_what_would_differ_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = trained(seed=1, **MLP)
    path = exported(tmp_path / "g.safetensors", **MLP)
    before = path.read_bytes()
    assert largest_difference(trained(**MLP), other, about(**MLP)) > 0.1
    form = forms.Form(lambda _, known: to_safetensors(other, known), forms.FORMS[".safetensors"].read)
    monkeypatch.setitem(forms.FORMS, ".safetensors", form)
    with pytest.raises(UsageError, match=r"g.safetensors is not written: its images differ by up to .* 0.0001 is allowed"):
        write(trained(**MLP), about(**MLP), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    generator = trained(**MLP)
    next(generator.parameters()).fill_(torch.nan)
    with pytest.raises(UsageError, match="differ by up to nan"):
        write(generator, about(**MLP), tmp_path / "g.safetensors")


@pytest.mark.parametrize(("path", "words"), [("g.bin", "not as .bin"), ("g", "not as a folder"), ("g.ckpt", ".onnx, .pt2")])
def test_unknown_form_is_refused(path: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        write(trained(**MLP), about(**MLP), Path(path))


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forms, "find_spec", lambda name: None if name == "onnxscript" else object())
    (tmp_path / "g.onnx").write_bytes(b"")
    for act in (lambda path: write(trained(**MLP), about(**MLP), path), read):
        with pytest.raises(UsageError, match=r"needs onnxscript; install .* pip install 'bngan\[onnx\]'"):
            act(tmp_path / "g.onnx")


def test_double_precision_that_onnxruntime_does_not_have_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(UsageError, match=r"no transposed convolution in float64; export as .safetensors or .pt2"):
        write(trained(**CONV).double(), about(**CONV), tmp_path / "g.onnx")


# What strangers write -------------------------------------------------------------------------------------------------


def changed(**content: Any) -> str:
    return json.dumps({**json.loads(about(**MLP).to_json()), **content})


def with_settings(**settings: Any) -> str:
    return changed(settings={**asdict(about(**MLP).settings), **settings})


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], bytes], str]] = {
    "no safetensors": (lambda weights: b"junk", "damaged"),
    "a pickle": (lambda weights: pickle.dumps(weights), "damaged"),
    "cut off": (lambda weights: save(weights, {KEY: changed()})[:-8], "damaged"),
    "nothing said": (lambda weights: save(weights), "damaged"),
    "other weights": (lambda weights: save({"a": torch.zeros(3)}, {KEY: changed()}), "Missing key"),
    "another shape": (lambda weights: save(weights, {KEY: with_settings(hidden_dim=9)}), "size mismatch"),
    "a network of terabytes": (lambda weights: save(weights, {KEY: with_settings(hidden_dim=10**7)}), "size mismatch"),
    "an unknown setting": (lambda weights: save(weights, {KEY: with_settings(banana=1)}), "banana"),
    "a setting out of range": (lambda weights: save(weights, {KEY: with_settings(bn_eps=-1.0)}), "bn_eps must be above 0"),
    "a setting that is none": (lambda weights: save(weights, {KEY: with_settings(hidden_dim="wide")}), "damaged"),
    "another format": (lambda weights: save(weights, {KEY: changed(format=2)}), "its format is 2"),
    "something unknown": (lambda weights: save(weights, {KEY: changed(more=1)}), "more"),
    "another network": (lambda weights: save(weights, {KEY: changed(network="classifier")}), "damaged"),
    "batches of nothing": (lambda weights: save(weights, {KEY: changed(batch_size=0)}), "0 images"),
    **{
        f"{name} {value}": (
            lambda weights, name=name, value=value: save(weights, {KEY: changed(**{name: value})}),
            f"{name} cannot",
        )
        for name, value in (
            ("statistics", "foo"),
            ("weights", "foo"),
            ("weights", ["x"]),
            ("metrics", {"fid": "x"}),
            ("metrics", [1]),
            ("floor", {"fid": None}),
            ("iteration", "a"),
            ("iteration", True),
            ("recipe", 3),
            ("folded", 1),
        )
    },
    **{
        f"{name} {value}": (lambda weights, name=name, value=value: save(weights, {KEY: with_settings(**{name: value})}), words)
        for name, value, words in (
            ("seed", "x", "seed cannot be 'x'"),
            ("classes", 0.0, "classes cannot be 0.0"),
            ("image_shape", [16, 1], "image_shape cannot be (16, 1)"),
            ("image_shape", [16, 1, 1], "16 channels"),
            ("image_shape", [1, -4, -4], "image_shape must be of numbers that are at least 1"),
            ("g_depth", 10**9, "g_depth must be at least 1 and at most 64"),
        )
    },
    "complex numbers": (
        lambda weights: save({name: value.to(torch.complex64) for name, value in weights.items()}, {KEY: changed()}),
        "numbers of another kind, torch.complex64",
    ),
    "folded that is not": (lambda weights: save(weights, {KEY: changed(folded=True)}), "damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_file_that_is_wrong_gets_a_line(case: str, tmp_path: Path) -> None:
    make, words = WRONG[case]
    (tmp_path / "g.safetensors").write_bytes(make(trained(**MLP).state_dict()))
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "g.safetensors")
    assert words in str(caught.value)
    assert "g.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "g.safetensors").write_bytes(save(trained(**MLP).state_dict(), {KEY: changed()}))
    assert read(tmp_path / "g.safetensors").about == about(**MLP)


def test_file_that_is_not_there_gets_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read(tmp_path / "g.safetensors")


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "here")


def test_pt2_is_read_only_by_who_trusts_it(tmp_path: Path) -> None:
    path, mark = exported(tmp_path / "g.pt2", **MLP), tmp_path / "mark"
    attacked, done = tmp_path / "attacked.pt2", False
    with zipfile.ZipFile(path) as honest, zipfile.ZipFile(attacked, "w") as archive:
        for name in honest.namelist():
            content = honest.read(name)
            if "sample_inputs" in name:
                buffer = tmp_path / "inputs"
                torch.save(Attack(mark), buffer)
                content, done = buffer.read_bytes(), True
            archive.writestr(name, content)
    assert done
    with pytest.raises(UsageError, match=r"can run code.*--trust if you know where it is from"):
        read(attacked)
    assert not mark.exists()
    with pytest.raises(UsageError, match="damaged"):
        read(attacked, trust=True)
    assert mark.exists(), "the reason why it is asked"
    assert read(path, trust=True).about == about(**MLP)
