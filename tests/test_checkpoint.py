"""What is read from a checkpoint: networks as this version or the one before saved them, or a line that says why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bngan import GAN
from bngan.checkpoint import RENAMED, Content, check_training, iterations, load_gan, read_checkpoint, save_gan, upgrade
from bngan.errors import UsageError
from bngan.images import to_uint8
from tests.conftest import REPOSITORY
from tests.test_gan import images, tiny, trainer

GOLDEN = REPOSITORY / "tests" / "golden"
OLD = [GOLDEN / f"0.1-{network}.ckpt" for network in ("mlp", "conv")]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[GAN, Path]:
    """A GAN after three iterations, and its checkpoint."""
    gan, run = tiny(g_lr=0.05), trainer(tmp_path, max_steps=3)
    run.fit(gan, images())
    run.save_checkpoint(tmp_path / "a.ckpt")
    return gan, tmp_path / "a.ckpt"


def old(**settings: Any) -> Content:
    """The content of a checkpoint of version 0.1, with some other settings."""
    content = torch.load(OLD[0], weights_only=True)
    return {**content, "hyper_parameters": {**content["hyper_parameters"], **settings}}


# This version's ---------------------------------------------------------------------------------------------------------


def test_loaded_networks_are_those_that_were_saved_and_evaluate(saved: tuple[GAN, Path]) -> None:
    gan, path = saved
    loaded = load_gan(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == gan.state_dict().keys()
    for name, value in gan.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.hparams == gan.hparams
    assert iterations(read_checkpoint(path)) == 3


def test_double_precision_is_not_rounded(tmp_path: Path) -> None:
    gan = tiny().double()
    torch.nn.init.normal_(next(gan.parameters()))
    save_gan(gan, tmp_path / "a.ckpt", total=0)
    loaded = load_gan(tmp_path / "a.ckpt")
    assert not loaded.training
    for name, value in gan.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(next(gan.parameters()).float().double(), next(gan.parameters()))
    save_gan(gan.bfloat16(), tmp_path / "a.ckpt", total=0)
    assert next(load_gan(tmp_path / "a.ckpt").parameters()).dtype == torch.float32


def test_upgrade_leaves_a_checkpoint_of_this_version_as_it_is(saved: tuple[GAN, Path]) -> None:
    _, path = saved
    content = torch.load(path, weights_only=True)
    upgraded = upgrade(content)
    assert upgraded.keys() == content.keys()
    for part in ("hyper_parameters", "loops", "callbacks", "global_step"):
        assert upgraded[part] == content[part]
    assert upgraded["state_dict"].keys() == content["state_dict"].keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: {**content, "loops": None}, "loops"),
        (lambda content: {**content, "optimizer_states": content["optimizer_states"][:1]}, "1 optimizers, not of 2"),
        (lambda content: {**content, "optimizer_states": [{"state": {}, "param_groups": []}] * 2}, "empty"),
        (lambda content: {**content, "global_step": 7}, "iteration 3, and the rest of it of 7"),
    ],
)
def test_training_goes_on_only_from_a_checkpoint_that_has_all_it_needs(
    change: Any, reason: str, saved: tuple[GAN, Path]
) -> None:
    content = read_checkpoint(saved[1])
    check_training(saved[1], content)
    with pytest.raises(UsageError, match=reason):
        check_training(saved[1], change(content))


def test_mapped_checkpoint_is_the_same_and_is_read_when_it_is_used(saved: tuple[GAN, Path]) -> None:
    path = saved[1]
    whole, mapped = (read_checkpoint(path, mmap=mmap)["state_dict"] for mmap in (False, True))
    assert whole.keys() == mapped.keys()
    for name, value in whole.items():
        assert torch.equal(mapped[name], value), name
    largest = max(whole, key=lambda name: whole[name].numel())
    weight = whole[largest].numpy().tobytes()
    with path.open("r+b") as file:  # changed in its place, which shows whose values still lie on the disk
        file.seek(path.read_bytes().index(weight))
        file.write(bytes(len(weight)))
    assert mapped[largest].count_nonzero() == 0
    assert whole[largest].count_nonzero() > 0


# Version 0.1's ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_old_checkpoint_is_sampled_as_the_old_version_did(path: Path) -> None:
    expected = np.load(path.with_suffix(".npz"))["images"]
    with load_gan(path).sampler() as sampler:
        drawn = to_uint8(sampler.samples(0, len(expected))).numpy()
    # One grey level of room: another processor rounds otherwise.
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1
    with load_gan(path).sampler(weights="raw") as sampler:
        raw = to_uint8(sampler.samples(0, len(expected))).numpy()
    assert np.abs(raw.astype(int) - expected.astype(int)).max() > 1


def test_old_settings_have_their_new_names() -> None:
    given = {"d_tracks_g_step": True, "noise": 0.25, "noise_end": 0.5, "sampling": "batch", "ema_buffers": "recalibrate"}
    settings = upgrade(old(**given))["hyper_parameters"]
    assert {new: settings[new] for new in RENAMED.values()} == {new: given[name] for name, new in RENAMED.items()}
    assert settings["ema_buffers"] == "precise"
    assert not settings.keys() & {*RENAMED, "accumulate", "compile"}
    assert settings["d_lr"] == old()["hyper_parameters"]["d_lr"]


def test_old_callbacks_states_come_under_their_new_names() -> None:
    content = old()
    states = upgrade(content)["callbacks"]
    assert states["MeasureSamples"] == content["callbacks"]["Quality"]
    # Its best was of held-out images, which validation compares with no more.
    assert content["callbacks"]["Checkpoints"]["best"] is not None
    assert states["CheckpointSaver"] == content["callbacks"]["Checkpoints"] | {"best": None}
    assert "RunProgress" not in states
    assert upgrade(upgrade(content))["callbacks"]["CheckpointSaver"]["best"] is None
    of_today = {**content, "state_dict": {**content["state_dict"], "normalized_together": torch.tensor(8)}}
    assert upgrade(of_today)["callbacks"]["CheckpointSaver"] == content["callbacks"]["Checkpoints"]


def test_old_place_in_an_epoch_is_counted_in_iterations() -> None:
    fit_loop = upgrade(old())["loops"]["fit_loop"]  # stopped after 4 steps of 5 iterations
    assert set(fit_loop["epoch_loop.batch_progress"]["current"].values()) == {20}
    assert fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 20
    assert fit_loop["state_dict"]["combined_loader"] == [{"epoch": 0, "batches": 20}]


def test_old_checkpoint_of_a_batch_in_parts_is_refused(tmp_path: Path) -> None:
    for accumulate, refused in ((1, False), (2, True)):
        torch.save(old(accumulate=accumulate), tmp_path / "old.ckpt")
        if refused:
            with pytest.raises(UsageError, match=r"old\.ckpt does not fit .* --model\.accumulate, which only version 0\.1 has"):
                load_gan(tmp_path / "old.ckpt")
        else:
            load_gan(tmp_path / "old.ckpt")


def test_old_checkpoint_is_given_what_it_did_not_keep(tmp_path: Path) -> None:
    content = old()
    for batch_size, known in ((48, 48), (0, 128), (-3, 128), (10**30, 128), ("many", 128), (None, 128)):
        torch.save({**content, "datamodule_hyper_parameters": {"batch_size": batch_size}}, tmp_path / "old.ckpt")
        gan = load_gan(tmp_path / "old.ckpt")
        assert int(gan.normalized_together) == known
        assert float(gan.discriminator.instance_noise) == 0


def test_checkpoint_that_asks_for_a_billion_layers_is_refused_at_once(tmp_path: Path) -> None:
    content = read_checkpoint(OLD[0])
    content["hyper_parameters"]["g_depth"] = 10**9
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UsageError, match=r"odd\.ckpt does not fit .* g_depth must be at least 1 and at most 64"):
        load_gan(tmp_path / "odd.ckpt")


@pytest.mark.parametrize("together", [0, -1, 2**40])
def test_checkpoint_whose_batch_cannot_be_is_refused(together: int, tmp_path: Path) -> None:
    content = read_checkpoint(OLD[0])
    content["state_dict"]["normalized_together"] = torch.tensor(together)
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UsageError, match=rf"odd\.ckpt does not fit .* {together} images were normalized together"):
        load_gan(tmp_path / "odd.ckpt")
