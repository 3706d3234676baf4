"""Checkpoints, settings files and data folders from strangers run no code: docs/security.md, line by line."""

import contextlib
import http.server
import os
import pickle
import shutil
import sys
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bngan import lightning_cli
from bngan.cli import main
from bngan.gan import GAN

MARKER = "executed"
SHORT = ("--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--metrics.num_samples=0", "--trainer.accelerator=cpu")
Content = dict[str, Any]


class Attack:
    """Makes a folder `executed` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARKER,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Content:
    """The content of a checkpoint that this program wrote."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["fit", *SHORT, f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}"]) == 0
    return torch.load(next(folder.glob("*/*/checkpoints/last.ckpt")), weights_only=True)


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)


def with_attack_in(group: str, content: Content, path: Path) -> None:
    inside = {**content[group], "attack": Attack()} if isinstance(content[group], dict) else [*content[group], Attack()]
    torch.save({**content, group: inside}, path)


def a_pickle(_: Content, path: Path) -> None:
    path.write_bytes(pickle.dumps(Attack()))


def saved_by_torch(_: Content, path: Path) -> None:
    torch.save(Attack(), path)


def saved_in_torchs_old_format(content: Content, path: Path) -> None:
    torch.save({**content, "attack": Attack()}, path, _use_new_zipfile_serialization=False)


ATTACKS: dict[str, Callable[[Content, Path], None]] = {
    "pickle": a_pickle,
    "torch": saved_by_torch,
    "old format": saved_in_torchs_old_format,
    **{
        group: lambda content, path, group=group: with_attack_in(group, content, path)
        for group in ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "callbacks", "optimizer_states", "loops")
    },
}
PATH = "runs/mnist/theirs/checkpoints/last.ckpt"
COMMANDS = {
    "fit": ("fit", *SHORT, f"--ckpt_path={PATH}"),
    "fit last": ("fit", *SHORT, "--ckpt_path=last"),
    "validate": ("validate", f"--ckpt_path={PATH}"),
    "test": ("test", f"--ckpt_path={PATH}"),
    "predict": ("predict", f"--ckpt_path={PATH}"),
    "sample": ("sample", PATH),
    "doctor": ("doctor", PATH),
    "doctor of a run": ("doctor", "runs/mnist/theirs"),
}


def write(attack: str, content: Content) -> Path:
    path = Path(PATH)
    path.parent.mkdir(parents=True)
    ATTACKS[attack](content, path)
    return path


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_would_work_on_who_loads_it_trustingly(attack: str, checkpoint: Content) -> None:
    torch.load(write(attack, checkpoint), weights_only=False) if attack != "pickle" else pickle.loads(
        write(attack, checkpoint).read_bytes()
    )
    assert Path(MARKER).exists()


@pytest.mark.parametrize("forced", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_checkpoint_runs_nothing(
    attack: str,
    command: str,
    forced: str,
    checkpoint: Content,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    write(attack, checkpoint)
    assert main([*COMMANDS[command]]) == 2
    streams = capsys.readouterr()
    assert "damaged or not a checkpoint" in streams.out + streams.err
    assert len(streams.err.strip().splitlines()) <= 2
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_trainer_loads_no_code_either(
    command: str, checkpoint: Content, mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the file changed after this program has read it, the Trainer would be the one to load it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(lightning_cli, "read_checkpoint", lambda _: checkpoint)
    write("callbacks", checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*COMMANDS[command], f"--data.root={mnist_root}"]) != 0
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_trust_cannot_be_asked_for(command: str, checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    Path("honest.ckpt").write_bytes(b"")
    torch.save(checkpoint, "honest.ckpt")
    assert main([command, "--ckpt_path=honest.ckpt", "--weights_only=false"]) == 2
    assert "--weights_only" in capsys.readouterr().err


# A checkpoint's settings ----------------------------------------------------------------------------------------------


def changed(content: Content, group: str, **settings: Any) -> Content:
    return {**content, group: {**content[group], **settings}}


def lying(content: Content) -> Content:
    """Weights whose shapes are of networks of terabytes, in a file of kilobytes."""
    settings = {**content["hyper_parameters"], "hidden_dim": 10**6}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in GAN(**settings).state_dict().items()}
    weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    return {**content, "hyper_parameters": settings, "state_dict": weights}


CALL = {"class_path": "os.mkdir", "init_args": {"path": MARKER}}
SETTINGS: dict[str, Callable[[Content], Content]] = {
    "networks of terabytes": lambda content: changed(content, "hyper_parameters", hidden_dim=10**9),
    "latents of terabytes": lambda content: changed(content, "hyper_parameters", latent_dim=10**12),
    "weights that are not there": lying,
    "class for a loss": lambda content: changed(content, "hyper_parameters", loss=CALL),
    "class for a number": lambda content: changed(content, "hyper_parameters", g_lr=CALL),
    "Lightning's class": lambda content: changed(content, "hyper_parameters", _class_path="os.mkdir", path=MARKER),
    "Lightning's instantiator": lambda content: changed(content, "hyper_parameters", _instantiator="os.mkdir"),
    "settings of another group": lambda content: changed(content, "hyper_parameters", **{"trainer.callbacks": CALL}),
    "tensor for a name": lambda content: changed(content, "hyper_parameters", network=torch.zeros(3)),
    "no settings": lambda content: {**content, "hyper_parameters": {}},
    "list of settings": lambda content: {**content, "hyper_parameters": [1]},
    "number for the data's settings": lambda content: {**content, "datamodule_hyper_parameters": 3},
}


@pytest.mark.parametrize("command", ["fit", "validate", "sample", "doctor"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_in_a_checkpoint_do_no_harm(
    case: str, command: str, checkpoint: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(PATH).parent.mkdir(parents=True)
    torch.save(SETTINGS[case](checkpoint), PATH)
    assert main([*COMMANDS[command]]) == 2
    answer = capsys.readouterr().err
    assert PATH in answer
    assert len(answer.strip().splitlines()) <= 2
    assert not Path(MARKER).exists()


def test_data_settings_in_a_checkpoint_are_plain(checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(changed(checkpoint, "datamodule_hyper_parameters", batch_size=torch.ones(3)), "theirs.ckpt")
    assert main(["validate", "--ckpt_path=theirs.ckpt"]) == 2
    assert "numbers, words and lists" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["name", "folder", "image_size", "channels", "batch_size"])
def test_data_settings_in_a_checkpoint_are_values(
    setting: str, checkpoint: Content, mnist_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(changed(checkpoint, "datamodule_hyper_parameters", **{setting: CALL}), "theirs.ckpt")
    assert main(["validate", "--ckpt_path=theirs.ckpt", f"--data.root={mnist_root}"]) == 2
    assert f"data.{setting}" in capsys.readouterr().err
    assert not Path(MARKER).exists()


def test_checkpoint_does_not_choose_where_data_is_written(
    checkpoint: Content, mnist_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("private").mkdir()
    torch.save(changed(checkpoint, "datamodule_hyper_parameters", root="private"), "theirs.ckpt")
    assert main(["doctor", "theirs.ckpt"]) == 2
    assert "--root" in capsys.readouterr().err
    assert main(["doctor", "theirs.ckpt", f"--root={mnist_root}"]) == 0
    quick = ("--metrics.num_samples=0", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu")
    assert main(["validate", "--ckpt_path=theirs.ckpt", f"--data.root={mnist_root}", *quick]) == 0
    assert list(Path("private").iterdir()) == []


# Settings files ---------------------------------------------------------------------------------------------------------

TAG = f"!!python/object/apply:os.mkdir [{MARKER}]"
TAGGED = {
    "a value": f"model: {{g_lr: {TAG}}}",
    "a group": f"model: {TAG}",
    "a callback": f"trainer: {{callbacks: [{TAG}]}}",
    "everything": TAG,
    "a name": f"name: !!python/object/new:os.mkdir [{MARKER}]",
    "a module": "name: !!python/module:antigravity",
}
INSIDE = {"class_path": "os.mkdir", "init_args": {"path": MARKER}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", MARKER]}}
RUNS = {"class_path": "theirs.Runs", "init_args": {"path": MARKER}}
# What would call something if it were not refused.
NAMED: dict[str, dict[str, Any]] = {
    **{f"function for {name}": {name: INSIDE} for name in ("callbacks", "logger", "strategy", "plugins", "profiler")},
    **{f"process for {name}": {name: POPEN} for name in ("callbacks", "logger", "strategy", "plugins", "profiler")},
    "process among callbacks": {"callbacks": [POPEN]},
    "process among loggers": {"logger": [POPEN]},
    "accelerator": {"accelerator": POPEN},
    "function for an argument": {
        "callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "theirs.attack"}}]
    },
    "class in an argument": {"callbacks": [{"class_path": "theirs.Takes", "init_args": {"x": RUNS}}]},
    "class deep in an argument": {"callbacks": [{"class_path": "theirs.Takes", "init_args": {"x": {"y": [RUNS]}}}]},
    "function that makes a callback": {"callbacks": [{"class_path": "theirs.make"}]},
    "callback that is ready": {"callbacks": [{"class_path": "theirs.READY"}]},
}
# Those that jsonargparse and Lightning would let pass.
PASSING = ("function for an argument", "class in an argument", "class deep in an argument", "function that makes a callback")
THEIRS = f"""
import os
from typing import Any
from lightning.pytorch import Callback

class Harmful(Callback):
    def on_fit_start(self, trainer, pl_module):
        os.mkdir({MARKER!r})

class Runs:
    def __init__(self, path: str) -> None:
        os.mkdir(path)

class Takes(Callback):
    def __init__(self, x: Any) -> None:
        pass

READY = Harmful()

def attack(trainer, pl_module):
    os.mkdir({MARKER!r})

def make() -> Callback:
    os.mkdir({MARKER!r})
    return Callback()
"""


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that a stranger's settings name."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)


@pytest.mark.parametrize("case", TAGGED)
def test_tags_in_a_settings_file_run_nothing(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(TAGGED[case])
    assert main(["fit", *SHORT, "--config=theirs.yaml"]) == 2
    assert "theirs.yaml" in capsys.readouterr().err
    assert main(["doctor", "theirs.yaml"]) == 2
    assert not Path(MARKER).exists()
    with contextlib.suppress(Exception):
        yaml.unsafe_load(TAGGED[case])
    assert Path(MARKER).exists() or case in ("a module", "a name")


@pytest.mark.parametrize("setting", ["--model.g_lr", "--model", "--trainer.callbacks", "--trainer.logger", "--name"])
def test_tags_on_the_command_line_run_nothing(setting: str) -> None:
    assert main(["fit", *SHORT, f"{setting}={TAG}"]) == 2
    assert not Path(MARKER).exists()


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("case", NAMED)
def test_settings_file_names_classes_and_nothing_else(case: str, mnist_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump({"trainer": NAMED[case]}))
    assert main(["fit", *SHORT, f"--data.root={mnist_root}", "--config=theirs.yaml"]) == 2
    answer = capsys.readouterr().err
    assert f"--trainer.{next(iter(NAMED[case]))}" in answer
    assert len(answer.strip().splitlines()) <= 2
    assert not Path(MARKER).exists()


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("case", PASSING)
def test_what_is_refused_would_otherwise_run(case: str, mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_cli, "check_class", lambda *_: None)
    Path("theirs.yaml").write_text(yaml.safe_dump({"trainer": NAMED[case]}))
    with contextlib.suppress(Exception):
        main(["fit", *SHORT, f"--data.root={mnist_root}", "--config=theirs.yaml"])
    for _ in range(100):  # a process that was started may take a moment
        if Path(MARKER).exists():
            return
        threading.Event().wait(0.05)
    raise AssertionError("this attack does nothing")


# What a stranger's run says of itself, and fit would go on with: its settings of the Trainer.
THING = "imported.Thing"
RECORDED: dict[str, dict[str, Any]] = {
    **{f"word for {name}": {name: THING} for name in ("callbacks", "logger", "plugins", "profiler")},
    "word among callbacks": {"callbacks": [THING]},
    "class for a callback": {"callbacks": {"class_path": THING}},
    "class among Lightning's": {
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelSummary"}, {"class_path": THING}]
    },
    "class in other words": {"callbacks.class_path": THING},
    "class in an argument": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": THING}}},
    "class deep in an argument": {
        "callbacks": {"class_path": "lightning.pytorch.Callback", "dict_kwargs": {"x": [{"class_path": "Thing"}]}}
    },
    "function for an argument": {
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "imported.attack"}}
        ]
    },
    "torch's function for an argument": {
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "torch.save"}}]
    },
}
OWN_CALLBACK = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val/d_loss", "patience": 7},
}


def write_run(content: Content, trainer: dict[str, Any]) -> Path:
    """Write a run's folder whose modules, were they imported, would make the folder `executed`; return its config.yaml."""
    Path(PATH).parent.mkdir(parents=True)
    torch.save(content, PATH)
    run = Path(PATH).parents[1]
    (run / "run.json").write_text('{"id": "theirs", "parent": null, "starts": []}')
    (run / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    Path("imported.py").write_text(f"import os\nos.mkdir({MARKER!r})\nclass Thing: pass\ndef attack(*_): pass\n")
    return run / "config.yaml"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Modules in the folder where one stands can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("imported", None)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("case", RECORDED)
def test_run_of_a_stranger_imports_nothing(case: str, checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(checkpoint, RECORDED[case])
    assert main(["fit", *SHORT, f"--ckpt_path={PATH}"]) == 2
    answer = capsys.readouterr().err
    assert f"--trainer.{next(iter(RECORDED[case]))}" in answer
    assert "code of its own" in answer
    assert not Path(MARKER).exists()


@pytest.mark.usefixtures("imported")
def test_feature_net_of_a_stranger_is_not_imported(checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(checkpoint, {}).write_text(yaml.safe_dump({"metrics": {"feature": THING}}))
    assert main(["fit", *SHORT, f"--ckpt_path={PATH}"]) == 2
    assert "--metrics.feature" in capsys.readouterr().err
    assert not Path(MARKER).exists()


@pytest.mark.usefixtures("imported")
def test_what_a_run_names_may_be_given_anew(checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(checkpoint, {"callbacks": [THING]})
    assert main(["fit", f"--ckpt_path={PATH}", "--trainer.callbacks=null", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"] is None
    assert not Path(MARKER).exists()


def test_lightnings_own_classes_are_taken_from_a_run(checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(checkpoint, {"callbacks": [OWN_CALLBACK], "profiler": "simple", "logger": True})
    assert main(["fit", f"--ckpt_path={PATH}", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert settings["callbacks"][0]["class_path"] == OWN_CALLBACK["class_path"]
    assert settings["callbacks"][0]["init_args"]["patience"] == 7
    assert settings["profiler"] == "simple"


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("name", ["callbacks", "logger", "plugins", "profiler"])
def test_word_for_a_class_would_otherwise_be_imported(name: str, checkpoint: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_cli, "names_foreign_code", lambda *_: False)
    write_run(checkpoint, {name: THING})
    assert main(["fit", *SHORT, f"--ckpt_path={PATH}"]) == 2
    assert Path(MARKER).exists()


def test_run_does_not_choose_where_data_is_written(checkpoint: Content, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = {"data": {"root": "private", "batch_size": 64}, "trainer": {"default_root_dir": "private"}}
    write_run(checkpoint, {}).write_text(yaml.safe_dump(elsewhere))
    assert main(["fit", f"--ckpt_path={PATH}", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["data"]["root"], settings["data"]["batch_size"]) == ("data", 64)
    assert settings["trainer"]["default_root_dir"] is None


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that holds settings, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/theirs.yaml", asked
        running.shutdown()


@pytest.mark.parametrize("setting", ["--config", "--model", "--data", "--trainer", "--trainer.callbacks", "--ckpt_path"])
def test_settings_are_not_fetched(setting: str, server: tuple[str, list[str]]) -> None:
    address, asked = server
    assert main(["fit", *SHORT, f"{setting}={address}"]) == 2
    if setting in ("--trainer.callbacks", "--model"):
        Path("theirs.yaml").write_text(f"{{trainer: {{callbacks: '{address}'}}}}")
        assert main(["fit", *SHORT, "--config=theirs.yaml"]) == 2
    assert asked == []
    with urllib.request.urlopen(address) as answer:
        assert answer.read() == b"{}"
    assert asked


@pytest.mark.parametrize("key", ["config", "include", "__path__", "fit", "class_path", "model.g_lr"])
def test_settings_file_includes_no_other(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text("model: {g_lr: 1}")
    Path("theirs.yaml").write_text(f"{key}: other.yaml")
    assert main(["fit", *SHORT, "--config=theirs.yaml"]) == 2
    assert f"unknown group '{key}'" in capsys.readouterr().err


def test_settings_are_not_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PL_FIT__NAME", "theirs")
    monkeypatch.setenv("PL_NAME", "theirs")
    Path("theirs.yaml").write_text("data: {root: '${oc.env:PL_NAME}'}")
    assert main(["fit", "--config=theirs.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["name"] == "mnist"
    assert printed["data"]["root"] == "${oc.env:PL_NAME}"


# Data folders -----------------------------------------------------------------------------------------------------------


def offline(*_: object, **__: object) -> None:
    raise urllib.error.URLError("no network in this test")


def test_archive_that_is_not_the_published_one_is_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)
    raw = Path("data/EMNIST/raw")
    raw.mkdir(parents=True)
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        archive.writestr("../../../escaped", "")
        archive.writestr("gzip/inside.gz", "")
    before = sorted(Path("data").rglob("*"))
    assert main(["fit", *SHORT, "--data.name=emnist_letters"]) == 2
    assert "EMNIST letters" in capsys.readouterr().err
    assert not Path("escaped").exists()
    assert sorted(Path("data").rglob("*")) == before


@pytest.mark.parametrize("forced", ["", "1"])
def test_data_folder_runs_nothing(forced: str, mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ago torchvision kept its data sets as pickles, and still reads them where it finds them."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    shutil.copytree(mnist_root / "MNIST", "data/MNIST")
    processed = Path("data/MNIST/processed")
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(Attack(), processed / name)
    main(["fit", *SHORT])
    assert not Path(MARKER).exists()
