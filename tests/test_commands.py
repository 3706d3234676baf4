"""The commands other than the Trainer's: what each can be asked for, what comes of it, and what is refused in a line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bngan
from bngan.cli import main
from bngan.commands import COMMANDS
from bngan.hub import load_networks
from bngan.images import to_uint8
from tests.conftest import REPOSITORY
from tests.test_gan import tiny
from tests.test_hub import save

OLD = REPOSITORY / "tests" / "golden" / "0.1-mlp.ckpt"


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)


def told(*arguments: str | Path, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run a command and return what it says, which is a line and how to see more where it is an error."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    if status:
        assert err.startswith("bngan: error: ")
        assert len(err.splitlines()) == 2
        assert out == ""
    return err if status else out


# Sampling -----------------------------------------------------------------------------------------------------------------


def test_samples_cannot_be_written_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    Path("occupied").write_text("a file")
    for output in ("occupied", "occupied/a.png", "occupied/a.npz"):
        assert main(["sample", str(OLD), "--num=1", f"--output={output}"]) == 2
        told = capsys.readouterr().err
        assert "occupied" in told
        assert "--output" in told
        assert len(told.splitlines()) <= 2
    assert main(["sample", str(OLD), "--num=1", "--output=new/folder/a.png"]) == 0
    assert Path("new/folder/a.png").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ["interpolate", OLD, "--output=occupied/a.png"],
        ["interpolate", OLD, "--output=occupied/a.gif", "--steps=2"],
        ["export", OLD, "--output=occupied/a.safetensors"],
        ["explain", "--pretrained=default", "--output=occupied/a.html"],
    ],
)
def test_nothing_is_written_where_a_file_is_in_the_way(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("occupied").write_text("a file")
    assert "cannot write to occupied/a." in told(*words, capsys=capsys)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cuda:-1", "meta", "meta:x", "", "cpu:1", "hpu", "xla", "a\nb"])
def test_devices_that_are_not_there_are_refused_before_anything_is_read(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "gone.ckpt", f"--device={device}"]) == 2
    told = capsys.readouterr().err
    assert "as far as torch can tell; choose from cpu" in told
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("output", ["a.jpg", "B.PNG", "c.tiff", "d.webp", "e.Gif", "f.npy", "g.NPZ", "new.folder/", "v1/a.bmp"])
def test_samples_are_written_as_the_path_says(output: str) -> None:
    assert main(["sample", str(OLD), "--num=4", f"--output={output}"]) == 0
    path = Path(output)
    if output.endswith("/"):
        assert [file.name for file in sorted(path.iterdir())] == [f"{number:06d}.png" for number in range(4)]
    elif path.suffix.lower() in (".npy", ".npz"):
        found = np.load(path)
        numbers = found if path.suffix == ".npy" else found["images"]
        assert (numbers.shape, numbers.dtype) == ((4, 1, 8, 8), np.uint8)
    else:
        with Image.open(path) as picture:
            assert picture.format == {".jpg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
            assert picture.size == (2 * 58 + 2, 2 * 58 + 2)


@pytest.mark.parametrize("output", ["a.xyz", "v1.2", "a.ico", "a.npy.gz", "a.mp4", "", "~nobody9/a.png"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "gone.ckpt", f"--output={output}"]) == 2
    told = capsys.readouterr().err
    assert "gone.ckpt" not in told
    assert len(told.splitlines()) == 2
    assert ("choose .png, .jpg" in told) == (output not in ("", "~nobody9/a.png"))
    assert list(Path().iterdir()) == []


def test_so_many_samples_that_no_program_shows_them_make_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(OLD), "--num=1000000000"]) == 2
    assert (
        "one picture has room for 26456 such images, not 1000000000; give --output a folder, or .npz" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["sample", OLD], "samples.png"),
        (["sample", OLD], "a.npz"),
        (["sample", OLD], "folder/b.txt"),
        (["interpolate", OLD], "strip.png"),
        (["evolve", "last"], "evolve.gif"),
        (["export", OLD], "g.safetensors"),
        (["explain", OLD], "explain.html"),
    ],
)
def test_nothing_is_replaced_unless_that_is_asked_for(
    words: list[str | Path], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Path(output)
    there.parent.mkdir(exist_ok=True)
    asked = f"--output={output.replace('/b.txt', '/')}"
    if there.parent != Path():  # an empty folder replaces nothing
        told(*words, asked, "--num=1", capsys=capsys, status=0)
        (there.parent / "000000.png").unlink()
    there.write_text("mine")
    refused = told(*words, asked, capsys=capsys)
    assert f"{there if there.parent == Path() else 'folder'} exists; choose another --output, or add --force" in refused
    assert there.read_text() == "mine"


def test_a_run_is_sampled_by_its_best_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/any/one/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(OLD, folder / "last.ckpt")
    for asked, checkpoint in (("last", "last.ckpt"), ("runs/any/one", "last.ckpt"), ("last", "best.ckpt")):
        shutil.copy(OLD, folder / checkpoint)
        assert main(["sample", asked, "--num=1", "--force"]) == 0
        assert capsys.readouterr().out == f"1 image of {folder / checkpoint} written to samples.png\n"


def test_grid_has_the_rows_and_columns_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, count, size in (("2x5", 10, (5, 2)), ("3X1", 3, (1, 3)), ("4x4", 16, (4, 4))):
        assert f"{count} images" in told("sample", OLD, f"--grid={asked}", "--force", capsys=capsys, status=0)
        with Image.open("samples.png") as picture:
            assert picture.size == tuple(58 * side + 2 for side in size)
    told("sample", OLD, "--grid=2x5", "--num=7", "--force", capsys=capsys, status=0)
    with Image.open("samples.png") as picture:
        assert picture.size == (58 * 5 + 2, 58 * 2 + 2)
    for wrong in ("5", "x", "0x3", "3x-1", "a x b", "1.5x2"):
        assert f"such as 4x8, not {wrong!r}" in told("sample", OLD, f"--grid={wrong}", capsys=capsys)
    assert "has room for 6 images, not for 7" in told("sample", OLD, "--grid=2x3", "--num=7", capsys=capsys)
    assert "--grid is of a picture" in told("sample", OLD, "--grid=2x3", "--output=a.npy", capsys=capsys)


def test_digit_is_asked_of_a_conditional_generator(capsys: pytest.CaptureFixture[str]) -> None:
    save(tiny(classes=3), Path("a.ckpt"))
    told("sample", "a.ckpt", "--digit=2", "--num=4", "--output=a.npy", capsys=capsys, status=0)
    assert np.array_equal(np.load("a.npy"), to_uint8(bngan.load("a.ckpt").sample(4, label=2)).numpy())
    assert "there is no class 3" in told("sample", "a.ckpt", "--digit=3", "--output=b/", capsys=capsys)
    assert "class 1 cannot be asked" in told("sample", OLD, "--digit=1", "--output=b.npy", capsys=capsys)
    assert sorted(path.name for path in Path().iterdir()) == ["a.ckpt", "a.npy"]


def test_truncation_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    told("sample", OLD, "--truncation=0.5", "--num=4", "--output=a.npy", capsys=capsys, status=0)
    assert np.array_equal(np.load("a.npy"), to_uint8(bngan.load(OLD).sample(4, truncation=0.5)).numpy())
    assert "truncation must be above 0" in told("sample", OLD, "--truncation=-1", capsys=capsys)


def test_pretrained_generator_is_sampled_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert "4 images of" in told("sample", "--pretrained=default", "--num=4", "--output=a.npy", capsys=capsys, status=0)
    assert np.array_equal(np.load("a.npy"), to_uint8(bngan.load(pretrained="default").sample(4)).numpy())
    for words in (["sample", "--pretrained=cats"], ["interpolate", "--pretrained=cats"]):
        assert "choose from" in told(*words, capsys=capsys)
    for words in (["sample"], ["sample", OLD, "--pretrained=default"], ["explain"], ["export", "--output=a.onnx"]):
        assert "or else --pretrained NAME" in told(*words, capsys=capsys)


# Walks and films ----------------------------------------------------------------------------------------------------------


def test_walk_is_a_strip_or_a_film_from_sample_to_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert "10 images from sample 0 to sample 1 of" in told("interpolate", OLD, capsys=capsys, status=0)
    with Image.open("strip.png") as picture:
        assert picture.size == (58 * 10 + 2, 56 + 4)
        strip = np.asarray(picture.convert("L"))
    ends = to_uint8(bngan.load(OLD).sample(2)).repeat_interleave(7, dim=2).repeat_interleave(7, dim=3)
    for end, left in ((0, 2), (1, 2 + 9 * 58)):
        assert np.abs(strip[2:58, left : left + 56].astype(int) - ends[end, 0].numpy()).max() <= 1
    told("interpolate", OLD, "--from=3", "--to=5", "--steps=4", "--output=a.gif", capsys=capsys, status=0)
    with Image.open("a.gif") as film:
        assert getattr(film, "n_frames", 1) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from=1", "--to=1"], "both sample 1"),
        (["--steps=1"], "--steps must be at least 2"),
        (["--from=-1"], "--from must be at least 0"),
        (["--output=a.avi"], "a strip, .png, or as a film, .gif or .mp4"),
        (["--steps=10000000"], "one picture has room for"),
        (["--digit=1"], "class 1 cannot be asked"),
    ],
)
def test_walk_that_cannot_be_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in told("interpolate", OLD, *arguments, capsys=capsys)
    assert not list(Path().iterdir())


def test_film_of_a_run_shows_its_samples_as_training_went_on(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/any/one")
    (run / "samples").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    shutil.copy(OLD, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("name: any")
    (run / "run.json").write_text('{"id": "one", "parent": null, "starts": []}')
    assert "one/samples: 0, and a film needs two" in told("evolve", run, capsys=capsys)
    for iteration in (0, 5, 10):
        Image.new("L", (60, 60), color=20 * iteration).save(run / "samples" / f"iteration-{iteration:06d}.png")
    for asked in (run, "last", run / "checkpoints" / "last.ckpt"):
        assert told("evolve", asked, "--force", capsys=capsys, status=0) == f"3 pictures of {run} written to evolve.gif\n"
        with Image.open("evolve.gif") as film:
            assert getattr(film, "n_frames", 1) == 3
    Path("evolve.gif").unlink()
    assert "gone/samples: 0, and" in told("evolve", "gone", capsys=capsys)
    Path("g.safetensors").write_bytes(b"")
    assert "g.safetensors is no run" in told("evolve", "g.safetensors", capsys=capsys)
    (run / "samples" / "iteration-000005.png").write_bytes(b"cut off")
    assert "iteration-000005.png cannot be read as a picture" in told("evolve", run, capsys=capsys)


# Export -------------------------------------------------------------------------------------------------------------------


def test_export_writes_file_card_and_picture_and_replaces_only_by_force(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out/g.safetensors")
    words = ["export", OLD, f"--output={path}", "--fold-batchnorm"]
    out = told(*words, capsys=capsys, status=0)
    assert "Largest difference of its images to the original's, on 1,000 latents: " in out
    assert float(out.split()[-1]) < 1e-5
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "g.png", "g.safetensors"]
    assert "out/g.safetensors exists; choose another --output, or add --force to replace it" in told(*words, capsys=capsys)
    path.unlink()
    (path.parent / "README.md").write_text("mine")
    assert "out/README.md exists" in told(*words, capsys=capsys)
    assert (path.parent / "README.md").read_text() == "mine"
    told(*words, "--force", capsys=capsys, status=0)
    assert "# g.safetensors" in (path.parent / "README.md").read_text()
    told("sample", path, "--num=5", "--output=a.npy", capsys=capsys, status=0)
    expected = to_uint8(bngan.load(OLD).sample(5)).numpy()
    assert np.abs(np.load("a.npy").astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output=g.h5"], ".safetensors, .onnx, .pt2, not as .h5"),
        (["--output=g"], "not as a folder"),
        (["--output=g.safetensors", "--statistics=batch"], "choose running or precise"),
        ([], "--output"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_read(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in told("export", "gone.ckpt", *arguments, capsys=capsys)
    assert not list(Path().iterdir())


def test_generator_that_normalizes_by_the_batch_is_exported_by_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    save(tiny(eval_statistics="batch"), Path("a.ckpt"))
    assert "take running or precise" in told("export", "a.ckpt", "--output=g.safetensors", capsys=capsys)
    told("export", "a.ckpt", "--output=g.safetensors", "--statistics=precise", capsys=capsys, status=0)
    assert "by precise statistics" in Path("README.md").read_text()


def test_pt2_of_a_stranger_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("g.pt2").write_bytes(b"anything")
    assert "add --trust" in told("sample", "g.pt2", capsys=capsys)
    assert "damaged" in told("sample", "g.pt2", "--trust", capsys=capsys)


# Pages --------------------------------------------------------------------------------------------------------------------


def test_page_that_explains_is_of_the_networks_that_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr("bngan.explain.explain", lambda *arguments, force: seen.append((*arguments, force)))
    told("explain", "--pretrained=default", capsys=capsys, status=0)
    generator, _, output, source, force = seen.pop()
    expected = load_networks(pretrained="default").generator.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in generator.state_dict().items())
    assert (output, source, force) == (Path("explain.html"), "the pretrained default", False)
    assert "invalid choice: 'dcgan'" in told("explain", "--pretrained=dcgan", capsys=capsys)
    Path("explain.html").write_text("mine")
    assert "explain.html exists" in told("explain", OLD, capsys=capsys)
    told("explain", OLD, "--force", capsys=capsys, status=0)
    assert seen.pop()[3:] == (str(OLD), True)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        out = told(name, "--help", capsys=capsys, status=0)
        assert f"usage: bngan {name}" in out
        assert command.purpose in " ".join(out.split())


# Studies ------------------------------------------------------------------------------------------------------------------


def test_help_of_study_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 24
    for word in (
        "--output",
        "--root",
        "--jobs",
        "--device {cpu,cuda}",
        "--launcher {local,slurm,ray}",
        "--dry-run",
        "claims_cpu",
    ):
        assert word in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "study; see bngan study --help"),
        (["smoke"], "add --output FOLDER, or --dry-run"),
        (["smoke", "--output=a", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["smoke", "--output=a", "--launcher=mail"], "'mail' (choose from"),
        (["smoke", "--output=$HOME/a"], "names a variable of the shell"),
        (["smokes", "--dry-run"], "smokes: there is no such file; name a YAML file, or a study that is shipped: claims_cpu"),
        (["smoke", "--output=a", "--device=cuda", "--launcher=ray"], "leave out --launcher"),
    ],
)
def test_what_study_is_asked_wrongly_is_told_before_anything_is_run(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) <= 2
    assert not list(Path.cwd().iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_study_on_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "smoke", "--output=a", "--device=cuda"]) == 2
    assert "there is no GPU here that torch can use" in capsys.readouterr().err
