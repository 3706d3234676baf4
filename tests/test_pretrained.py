"""The networks that come with the package: they are there, whole, small, and draw digits."""

from pathlib import Path

import pytest
import torch

import bngan
from bngan import pretrained
from bngan.errors import UsageError
from bngan.hub import load_networks
from bngan.metrics.digit_net import load_digit_net
from bngan.pretrained import FOLDER, find_pretrained, names

LIMIT = 6_000_000  # bytes of all files


def test_files_are_small_and_all_of_them_known() -> None:
    files = {file.stem: file.stat().st_size for file in FOLDER.glob("*.safetensors")}
    assert sum(files.values()) <= LIMIT
    assert files.keys() == {*names(), "default-discriminator"}
    for name in files:
        assert find_pretrained(name) == FOLDER / f"{name}.safetensors"


@pytest.mark.parametrize("name", names())
def test_generator_draws_digits(name: str) -> None:
    generator = bngan.load(pretrained=name)
    images = generator.sample(500)
    assert images.shape == (500, 1, 28, 28)
    net = load_digit_net()
    probabilities = net.logits(net(images)).softmax(dim=1)
    assert probabilities.amax(dim=1).mean() > 0.7
    assert (probabilities.argmax(dim=1).bincount(minlength=10) > 15).all(), "all of them"
    about = generator.about
    assert about.recipe == name
    assert len(about.sha256) == 64
    assert about.metrics["fid"] < 10 * about.floor["fid"] + 5


def test_discriminator_tells_digits_from_darkness() -> None:
    networks = load_networks(pretrained="default")
    images = bngan.load(pretrained="default").sample(64)
    black = torch.full((64, 1, 28, 28), -1.0)
    assert networks.discriminator.logits(images).mean() > networks.discriminator.logits(black).mean()
    assert networks.source == "the pretrained default"
    with pytest.raises(UsageError, match="draws nothing; take a generator's file"):
        bngan.load(find_pretrained("default-discriminator"))


def test_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"--pretrained digits: there is no such network; choose from .*default"):
        find_pretrained("digits")


@pytest.mark.parametrize("content", [b"another", None])
def test_file_that_is_not_the_shipped_one_is_refused(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    if content is not None:
        (tmp_path / "default.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"missing or corrupt .* reinstall bngan"):
        bngan.load(pretrained="default")
