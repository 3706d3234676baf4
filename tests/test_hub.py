"""A trained generator is loaded in one line and sampled in another, and gives what `bngan sample` gives."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bngan
from bngan.batchnorm.statistics import EVAL_STATISTICS
from bngan.cli import main
from bngan.errors import UsageError
from bngan.gan import GAN
from bngan.hub import find_device, load_networks, with_origin
from bngan.images import to_uint8
from bngan.rng import sample_latents
from tests.test_gan import tiny


def spoilt(gan: GAN) -> GAN:
    """Give a GAN running statistics and an average of its own, so that each way to sample it gives other images."""
    torch.manual_seed(1)
    for network in (gan.generator, gan.generator_ema):
        for layer in network.modules() if network is not None else ():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features)
    return gan


def save(gan: GAN, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": gan.state_dict(), "hyper_parameters": dict(gan.hparams)}, path)
    return path


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The best of two checkpoints of the only run under runs/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mnist" / "one" / "checkpoints"
    save(tiny(seed=7), folder / "last.ckpt")
    return save(spoilt(tiny()), folder / "best.ckpt")


def test_samples_are_images_of_a_generator_in_evaluation(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint)
    images = generator.sample(64, seed=0)
    assert (images.shape, images.dtype, images.device.type) == ((64, 1, 4, 4), torch.float32, "cpu")
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert not images.requires_grad
    assert not any(part.training for part in generator.sampler.network.modules())
    assert not torch.equal(images, generator.sample(64, seed=1))


@pytest.mark.parametrize("way", ["last", "runs/mnist/one", "runs/mnist/one/checkpoints/best.ckpt"])
def test_run_is_named_as_on_the_command_line(way: str, checkpoint: Path) -> None:
    expected = bngan.load(checkpoint).sample(3)
    assert torch.equal(bngan.load(way).sample(3), expected)
    assert torch.equal(bngan.load(Path(way)).sample(3), expected)
    assert not torch.equal(bngan.load(checkpoint.with_name("last.ckpt")).sample(3), expected)


@pytest.mark.parametrize("statistics", [None, "running", "precise", "batch"])
@pytest.mark.parametrize("weights", [None, "raw", "ema"])
def test_samples_are_those_of_the_command_line(weights: Any, statistics: Any, checkpoint: Path) -> None:
    images = bngan.load(checkpoint, weights=weights, statistics=statistics).sample(5, seed=3)
    options = [f"--{name}={value}" for name, value in (("weights", weights), ("statistics", statistics)) if value]
    assert main(["sample", str(checkpoint), "--num=5", "--seed=3", "--output=samples.npz", *options]) == 0
    assert np.array_equal(np.load("samples.npz")["images"], to_uint8(images).numpy())


def test_ways_to_sample_differ(checkpoint: Path) -> None:
    ways: list[Tensor] = [
        bngan.load(checkpoint, weights="raw").sample(5),
        bngan.load(checkpoint, weights="ema").sample(5),
        bngan.load(checkpoint, weights="ema", statistics="batch").sample(5),
        bngan.load(checkpoint, weights="ema", statistics="precise").sample(5),
    ]
    for number, images in enumerate(ways):
        assert all(not torch.allclose(images, other, atol=1e-3) for other in ways[:number])


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_sample_is_the_same_however_many_are_drawn(statistics: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = bngan.load(checkpoint, statistics=statistics)
    images = generator.sample(300)
    torch.testing.assert_close(generator.sample(1), images[:1])
    monkeypatch.setattr("bngan.hub.LARGEST_CHUNK", 7)
    torch.testing.assert_close(generator.sample(300), images)
    assert not torch.allclose(images[:128], images[128:256], atol=1e-3)


def test_chunks_are_small_where_images_are_large(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = bngan.load(checkpoint)
    seen: list[int] = []
    generator.sampler.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    generator.sample(1001)
    monkeypatch.setattr("bngan.hub.CHUNK_VALUES", 16 * 300)
    generator.sample(700)
    monkeypatch.setattr("bngan.hub.CHUNK_VALUES", 1)
    generator.sample(2)
    assert seen == [500, 500, 1, 300, 300, 100, 1, 1]


def test_latents_of_ones_own_become_images(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint)
    z = sample_latents(0, 4, generator.settings.latent_dim, seed=3)
    torch.testing.assert_close(generator.generate(z), generator.sample(4, seed=3))


def test_sampling_changes_nothing(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint, statistics="batch")
    before = {name: value.clone() for name, value in generator.sampler.network.state_dict().items()}
    first = generator.sample(3)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in generator.sampler.network.state_dict().items())
    assert torch.equal(generator.sample(3), first)


def test_lightnings_way_to_load_gives_a_gan_in_training(checkpoint: Path) -> None:
    """The reason why there is another."""
    gan = GAN(**asdict(bngan.load(checkpoint).settings))
    assert gan.training
    z = gan.sample_latents(0, 8)
    assert not torch.allclose(gan.generate(z)[:2], gan.generate(z[:2]), atol=1e-3)


# Classes and truncation -----------------------------------------------------------------------------------------------


def test_samples_of_one_class_are_asked_for_by_its_number(tmp_path: Path) -> None:
    generator = bngan.load(save(spoilt(tiny(classes=3)), tmp_path / "a.ckpt"))
    gamma = next(value for name, value in generator.sampler.network.named_parameters() if name.endswith("gamma"))
    gamma.data.normal_(generator=torch.Generator().manual_seed(0))
    usual, twos = generator.sample(6), generator.sample(6, label=2)
    torch.testing.assert_close(usual[2::3], twos[2::3])
    assert not torch.allclose(usual[0], twos[0], atol=1e-3)
    with pytest.raises(UsageError, match="no class 3; this generator's are 0 to 2"):
        generator.sample(1, label=3)


def test_class_of_an_unconditional_generator_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="class 7 cannot be asked of this generator"):
        bngan.load(checkpoint).sample(1, label=7)


def test_truncation_makes_samples_alike(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint)
    spread = [generator.sample(200, truncation=threshold).std(dim=0).mean() for threshold in (None, 1.0, 0.1)]
    assert spread[0] > spread[1] > spread[2]
    torch.testing.assert_close(generator.sample(3, truncation=0.5), generator.sample(200, truncation=0.5)[:3])
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="truncation must be above 0"):
            generator.sample(1, truncation=wrong)


# Exported files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("statistics", ["running", "precise"])
def test_exported_file_gives_the_samples_of_its_checkpoint(weights: Any, statistics: Any, checkpoint: Path) -> None:
    generator = bngan.load(checkpoint, weights, statistics)
    for fold in (False, True):
        assert generator.export("out/g.safetensors", fold=fold) < 1e-5
        loaded = bngan.load("out/g.safetensors")
        torch.testing.assert_close(loaded.sample(20, seed=3), generator.sample(20, seed=3), rtol=0, atol=1e-5)
        assert (loaded.about.weights, loaded.about.statistics, loaded.about.folded) == (weights, statistics, fold)
        assert loaded.about.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_unfolded_file_is_sampled_by_all_statistics_and_others_by_their_own(checkpoint: Path) -> None:
    bngan.load(checkpoint).export("out/g.safetensors")
    for statistics in EVAL_STATISTICS:
        expected = bngan.load(checkpoint, statistics=statistics).sample(5)
        torch.testing.assert_close(
            bngan.load("out/g.safetensors", statistics=statistics).sample(5), expected, atol=1e-4, rtol=0
        )
    bngan.load("out/g.safetensors", statistics="precise").export("out/precise.safetensors")
    assert bngan.load("out/precise.safetensors").about.statistics == "precise"
    expected = bngan.load(checkpoint, statistics="precise").sample(5)
    torch.testing.assert_close(bngan.load("out/precise.safetensors").sample(5), expected, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="has the weights ema alone"):
        bngan.load("out/g.safetensors", weights="raw")
    bngan.load("out/g.safetensors").export("out/folded.safetensors", fold=True)
    assert len(bngan.load("out/folded.safetensors", statistics="running").sample(2)) == 2
    with pytest.raises(UsageError, match="has running statistics alone, as exported"):
        bngan.load("out/folded.safetensors", statistics="precise")
    with pytest.raises(UsageError, match="no batch norm to fold"):
        bngan.load("out/folded.safetensors").export("out/again.safetensors", fold=True)


def test_precise_statistics_of_a_file_are_not_taken_for_running_ones(tmp_path: Path) -> None:
    path = save(spoilt(tiny(ema_buffers="precise")), tmp_path / "a.ckpt")
    bngan.load(path).export(tmp_path / "g.safetensors")
    assert bngan.load(tmp_path / "g.safetensors").about.statistics == "precise"
    with pytest.raises(UsageError, match=r"precise statistics in place of the running ones; .* or take the checkpoint"):
        bngan.load(tmp_path / "g.safetensors", statistics="running")
    assert bngan.load(path, statistics="running").about.statistics == "running"


def test_double_precision_is_sampled_and_exported_as_it_is(tmp_path: Path) -> None:
    gan = spoilt(tiny()).double()
    assert gan.generator_ema is not None
    nn.init.normal_(next(gan.generator_ema.parameters()))  # which float32 would round
    generator = bngan.load(save(gan, tmp_path / "a.ckpt"))
    for fold in (False, True):
        assert generator.export(tmp_path / "g.safetensors", fold=fold) < 1e-10
        loaded = bngan.load(tmp_path / "g.safetensors")
        z = sample_latents(0, 4, gan.settings.latent_dim, seed=0).double()
        with torch.no_grad():
            expected = gan.generator_ema.eval()(z).view(4, 1, 4, 4)
        torch.testing.assert_close(loaded.generate(z), expected, rtol=0, atol=1e-10)
    assert len(generator.sample(2)) == 2


@pytest.mark.parametrize("settings", [{"g_norm": "layer", "eval_statistics": "batch"}, {"g_norm": "virtual"}], ids=str)
def test_generator_without_running_statistics_is_exported(settings: dict[str, Any], tmp_path: Path) -> None:
    generator = bngan.load(save(tiny(**settings), tmp_path / "a.ckpt"))
    generator.export(tmp_path / "g.safetensors")
    loaded = bngan.load(tmp_path / "g.safetensors")
    assert generator.about.statistics is loaded.about.statistics is None
    torch.testing.assert_close(loaded.sample(3), generator.sample(3))


@pytest.mark.gpu
def test_export_from_a_gpu_is_that_from_the_processor(checkpoint: Path) -> None:
    generator = bngan.load(checkpoint, device="gpu")
    assert generator.export("out/g.safetensors", fold=True) < 1e-5
    assert next(generator.sampler.network.parameters()).device.type != "cpu"
    torch.testing.assert_close(bngan.load("out/g.safetensors").sample(5), bngan.load(checkpoint).sample(5), atol=1e-5, rtol=0)


def test_export_replaces_a_card_but_no_other_readme_unless_it_is_forced(checkpoint: Path) -> None:
    generator, readme = bngan.load(checkpoint), Path("out/README.md")
    for name in ("one", "two"):
        generator.export(f"out/{name}.safetensors", force=False)
        assert readme.read_text().startswith(f"# {name}.safetensors")
    readme.write_text("# My project")
    with pytest.raises(UsageError, match=r"out/README.md is no model card, and one would replace it"):
        generator.export("out/three.safetensors", force=False)
    assert readme.read_text() == "# My project"
    assert not Path("out/three.safetensors").exists()
    generator.export("out/three.safetensors", force=True)
    assert readme.read_text().startswith("# three.safetensors")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (b'{"iteration"', "quality.json is damaged"),
        (b"\xff", "quality.json is damaged"),
        (b"[1]", "quality.json has no report in it"),
        (b'{"iteration": 0, "value": [1]}', r"metrics cannot be \[1\]"),
        (b'{"iteration": 0, "value": {"fid": "x"}}', "metrics cannot be {'fid': 'x'}"),
        (b'{"iteration": 0, "floor": 3}', "floor cannot be 3"),
    ],
)
def test_run_that_says_what_cannot_be_of_its_samples_gets_a_line(report: bytes, words: str, checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    (run / "config.yaml").write_text("name: mine")
    (run / "run.json").write_text('{"id": "one", "parent": null, "starts": []}')
    (run / "quality.json").write_bytes(report)
    with pytest.raises(UsageError, match=words):
        bngan.load(checkpoint).export("out/g.safetensors")
    assert not Path("out").exists()


def test_callbacks_that_are_none_of_ours_leave_the_metrics_out(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    (run / "config.yaml").write_text("name: mine")
    (run / "run.json").write_text('{"id": "one", "parent": null, "starts": []}')
    content = torch.load(checkpoint, weights_only=True)
    best = {"CheckpointSaver": {"best_iteration": 0}, "MeasureSamples": {"last": {"fid": 2.0}}}
    for callbacks, metrics in (
        (best, {"fid": 2.0}),
        ({**best, "CheckpointSaver": [0]}, {}),
        ({**best, "MeasureSamples": 1}, {}),
    ):
        torch.save({**content, "callbacks": callbacks}, checkpoint)
        assert with_origin(bngan.load(checkpoint).about, checkpoint).metrics == metrics


def test_samples_by_their_own_batch_cannot_be_exported(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"statistics batch normalize a sample by the others .* take running or precise"):
        bngan.load(checkpoint, statistics="batch").export("out/g.safetensors")


def test_card_tells_what_is_known(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    (run / "config.yaml").write_text("name: mine")
    (run / "run.json").write_text('{"id": "one", "parent": null, "starts": []}')
    measured = {"value": {"fid": 2.125, "kid": 0.5}, "floor": {"fid": 0.0625}}
    (run / "quality.json").write_text(json.dumps({"iteration": 0, **measured}))
    bngan.load(checkpoint).export("out/g.safetensors", fold=True)
    text = Path("out/README.md").read_text()
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for words in ("![samples](g.png)", "| recipe | mine |", digest, "| fid | 2.125 | 0.0625 |", "| kid | 0.5 |  |", "folded"):
        assert words in text
    assert Path("out/g.png").is_file()
    assert bngan.load("out/g.safetensors").about.metrics == measured["value"]
    bngan.load(checkpoint, weights="raw").export("out/raw.safetensors")
    assert bngan.load("out/raw.safetensors").about.metrics == {}, "they are of the average"
    by_others = {"iteration": 0, **measured, "ema, precise": {"fid": 2.0}}
    (run / "validate.json").write_text(json.dumps(by_others))
    bngan.load(checkpoint, statistics="precise").export("out/precise.safetensors")
    assert bngan.load("out/precise.safetensors").about.metrics == {"fid": 2.0}
    (run / "validate.json").unlink()
    (run / "quality.json").write_text(json.dumps({"iteration": 1, **measured}))
    bngan.load(checkpoint).export("out/g.safetensors")
    text = Path("out/README.md").read_text()
    assert "not measured at this iteration" in text
    assert "folded" not in text


def test_card_of_each_form_has_a_program_that_runs(checkpoint: Path) -> None:
    pytest.importorskip("onnxscript")
    for form in ("safetensors", "onnx", "pt2"):
        bngan.load(checkpoint).export(f"g.{form}")
        (program,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
        found: dict[str, Any] = {}
        exec(program, found)
        assert found["images"].shape == (64, 1, 4, 4)
    assert torch.allclose(bngan.load("g.pt2", trust=True).sample(5), bngan.load("g.onnx").sample(5), atol=1e-5)
    with pytest.raises(UsageError, match="is a graph already; export from a checkpoint"):
        bngan.load("g.onnx").export("h.onnx")


def test_exported_file_is_loaded_without_lightning(checkpoint: Path) -> None:
    """Which takes as long to import as torch does, when a newcomer waits for digits."""
    program = "import sys, bngan; bngan.load(pretrained='default').sample(4); print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_networks_of_a_checkpoint_are_both_had_and_of_a_file_one(checkpoint: Path) -> None:
    networks, generator = load_networks(checkpoint), bngan.load(checkpoint)
    z = sample_latents(0, 4, generator.settings.latent_dim, seed=0)
    torch.testing.assert_close(networks.generator(z).view(4, 1, 4, 4), generator.sample(4))
    assert networks.discriminator.logits(generator.sample(4)).shape == (4, 1)
    assert networks.source == str(checkpoint)
    generator.export("out/g.safetensors")
    with pytest.raises(UsageError, match="has a generator alone"):
        load_networks("out/g.safetensors")


@pytest.mark.parametrize("settings", [{"ema_buffers": "precise"}, {"eval_statistics": "precise"}], ids=str)
def test_generator_of_both_networks_has_the_statistics_of_its_samples(settings: dict[str, Any], tmp_path: Path) -> None:
    path = save(spoilt(tiny(**settings)), tmp_path / "a.ckpt")
    z = sample_latents(0, 4, 8, seed=0)
    images = load_networks(path).generator(z).view(4, 1, 4, 4)
    torch.testing.assert_close(images, bngan.load(path).generate(z))
    assert not torch.allclose(images, bngan.load(path, statistics="running").generate(z), atol=1e-3)


def test_generator_of_both_networks_keeps_its_own_statistics_where_each_batch_has_its_own(tmp_path: Path) -> None:
    path = save(spoilt(tiny(eval_statistics="batch")), tmp_path / "a.ckpt")
    z = sample_latents(0, 4, 8, seed=0)
    images = load_networks(path).generator(z).view(4, 1, 4, 4)
    torch.testing.assert_close(images, bngan.load(path, statistics="running").generate(z))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "averaged"}, "unknown weights 'averaged'; choose from raw, ema"),
    "statistics": ({"statistics": "own"}, "unknown statistics 'own'; choose from running, batch, precise"),
    "missing file": ({"path": "gone.ckpt"}, "there is no checkpoint gone.ckpt"),
    "empty folder": ({"path": "runs"}, "runs"),
    "no file of a checkpoint": ({"path": __file__}, "damaged or not a checkpoint"),
    "no file": ({"path": None}, "name a checkpoint, a run's folder, last or an exported file"),
    "two sources": ({"pretrained": "default"}, "or else a pretrained generator"),
    "no pretrained one": ({"path": None, "pretrained": "resnet"}, "no such network; choose from"),
    "a name in a path": ({"path": "pretrained:default"}, "there is no checkpoint pretrained:default"),
    "a missing export": ({"path": "gone.safetensors"}, "there is no file gone.safetensors"),
    **{
        f"device {name!r}": ({"device": name}, f"device {name!r}")
        for name in ("banana", "", "meta", "cuda:-1", "cuda:99", "hpu")
    },
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_gets_a_line(case: str, checkpoint: Path) -> None:
    arguments, words = MISTAKES[case]
    with pytest.raises(UsageError) as caught:
        bngan.load(**{"path": checkpoint, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"ema_decay": 0.0}, {"weights": "ema"}, "keeps no average"),
        ({"g_norm": "none"}, {"statistics": "batch"}, "no batch norm"),
    ],
)
def test_what_a_generator_has_not_is_said(
    settings: dict[str, Any], arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = save(tiny(**settings), tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=words):
        bngan.load(path, **arguments)
    assert len(bngan.load(path).sample(2)) == 2
    if "statistics" in arguments:
        for form in ("safetensors", "pt2"):
            bngan.load(path).export(tmp_path / f"g.{form}")
            with pytest.raises(UsageError, match=words):
                bngan.load(tmp_path / f"g.{form}", trust=True, **arguments)


@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_sample_is_drawn(count: int, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        bngan.load(checkpoint).sample(count)


@pytest.mark.parametrize(
    ("kind", "count", "taken", "refused"),
    [
        (None, 0, {"cpu": "cpu", "CPU": "cpu"}, ["gpu", "cuda", "cuda:0", "mps", "xpu"]),
        ("cuda", 2, {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "CUDA:1": "cuda:1"}, ["cuda:2", "mps", "xpu"]),
        ("mps", 1, {"gpu": "mps", "mps": "mps", "mps:0": "mps:0"}, ["mps:1", "cuda"]),
        ("xpu", 1, {"gpu": "xpu", "xpu:0": "xpu:0"}, ["xpu:1", "cuda"]),
    ],
)
def test_gpu_is_the_accelerator_that_there_is(
    kind: str | None, count: int, taken: dict[str, str], refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert {name: str(find_device(name)) for name in taken} == taken
    for name in (*refused, "meta"):
        with pytest.raises(UsageError, match=f"device '{name}' is not on this machine"):
            find_device(name)
