"""What a browser makes of the page that explains: its arithmetic, its looks, and what its controls do."""

import copy
import json
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from screenshot_tensorboard import browse, chromium
from torch import Tensor

from bngan import rng
from bngan.batching import discriminate
from bngan.batchnorm.diagnostics import kl_to_running
from bngan.batchnorm.layers import batch_norm_layers, running_statistics
from bngan.batchnorm.statistics import evaluation_statistics, recorded_statistics
from bngan.explain import page, shown_by
from bngan.explain.measured import Shown
from bngan.images import slerp
from tests.test_explain import SCENES, made_up_networks

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

CHANGE = {"contrast": 0.7, "brightness": 0.4, "count": 5}
MOMENTUM = 0.3
MINUS = "\N{MINUS SIGN}"
EXACT = {"rtol": 0, "atol": 1e-9}

# A page with the one that explains in a frame, which may be as narrow as a telephone; it tells what that looks like, after
# all that can be pressed was pressed.
FRAME = """<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = async () => {{
  const page = frame.contentDocument, right = frame.contentWindow.innerWidth + 1;
  for (const found of page.querySelectorAll("button, [data-right]")) found.click();
  let before = -1, now = page.documentElement.innerHTML.length;
  while (before !== now) {{ // a busy machine draws few frames in a second
    before = now;
    await new Promise(done => setTimeout(done, 1500));
    now = page.documentElement.innerHTML.length;
  }}
  const seen = tags => [...page.querySelectorAll(tags)].filter(found => found.checkVisibility());
  const boxes = tags => seen(tags).map(found => found.getBoundingClientRect());
  const requests = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.innerHTML = "<pre>found: " + JSON.stringify({{
    scrolls: page.documentElement.scrollWidth,
    pictures: boxes("canvas, svg, img").length,
    said: seen("figcaption[data-part], #guessed").map(found => found.textContent),
    wrong: {{
      cut: boxes("p, h1, h2, h3, figcaption, math, canvas, svg, img, button, input").filter(box => box.right > right).length,
      empty: boxes("canvas, svg, img").filter(box => box.width < 20 || box.height < 10).length,
      small: boxes("button, input[type=range]").filter(box => box.height < 44).length,
      silent: seen("canvas, svg").filter(found => !found.getAttribute("aria-label")).length,
      requests: requests.filter(name => !name.startsWith("data:")).length,
    }},
  }}) + "</pre>";
}};
</script>"""


@pytest.fixture(scope="module")
def shown() -> Shown:
    return shown_by(*made_up_networks())


@pytest.fixture(scope="module")
def file(shown: Shown, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(page(shown, "made-up networks"))
    return path


def found_by_the_page(file: Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return what the page's own functions make of numbers that are put into it."""
    block = f'<script type="application/json" id="test">{json.dumps(numbers)}</script>'
    tested = file.with_name("tested.html")
    tested.write_text(file.read_text().replace('<script type="module">', f'{block}\n<script type="module">'))
    dom = browse(f"{tested.as_uri()}#test", "--dump-dom")
    (found,) = re.findall(r'<p id="spoken"[^>]*>(.*?)</p>', dom, re.DOTALL)
    return json.loads(unescape(found))


def test_its_arithmetic_is_torchs_in_float64(file: Path, shown: Shown) -> None:
    z = rng.normal((7, 100), 1).double()
    fakes, real = torch.tanh(rng.normal((9, 784), 2).double()), shown.real_images[:6]
    stamp = (rng.normal((784,), 3) > 1).double()
    numbers = CHANGE | {"stamp": stamp.tolist()}
    found = found_by_the_page(
        file,
        {"latents": z.tolist(), "images": fakes.tolist(), "real": real.tolist(), "change": numbers, "momentum": MOMENTUM},
    )

    def same(name: str, expected: Tensor) -> None:
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64).view(expected.shape), expected, **EXACT)

    for statistics in ("batch", "running"):
        same(statistics, shown.draw(z, statistics))
    same("folded", shown.draw(z, "running"))
    same("middle", slerp(z[:1], z[1:2], 3)[1])
    same("weight", shown.generator.get_parameter("net.0.weight"))
    changed = torch.cat([0.7 * fakes[:5] + 0.4 + stamp, fakes[5:]])
    with evaluation_statistics(shown.discriminator, "batch"):
        for batching in ("joint", "separate"):
            logits = discriminate(shown.discriminator.logits, real, changed, batching)
            for kind, expected in zip(("real", "fake"), logits, strict=True):
                judged = torch.tensor(found[batching][kind], dtype=torch.float64)
                torch.testing.assert_close(judged, expected.flatten(), **EXACT)


def test_its_running_statistics_move_as_torchs(file: Path, shown: Shown) -> None:
    z = rng.normal((7, 100), 4).double()
    image = torch.zeros(2, 784).tolist()
    numbers = CHANGE | {"stamp": [0.0] * 784}
    found = found_by_the_page(
        file, {"latents": z.tolist(), "images": image, "real": image, "change": numbers, "momentum": MOMENTUM}
    )
    twin = copy.deepcopy(shown.generator).train()
    layers = [layer for _, layer in batch_norm_layers(twin)]
    for layer in layers:
        layer.momentum = MOMENTUM
    with recorded_statistics(twin) as seen:
        twin(z)
    for layer, moved, kl, (batch,) in zip(layers, found["moved"], found["kl"], seen.values(), strict=True):
        mean, variance = running_statistics(layer)
        torch.testing.assert_close(torch.tensor(moved["mean"], dtype=torch.float64), mean, **EXACT)
        torch.testing.assert_close(torch.tensor(moved["variance"], dtype=torch.float64), variance, **EXACT)
        assert kl == pytest.approx(float(kl_to_running(batch, layer.eps).mean()), abs=1e-9)


def caption_of(dom: str, scene: str) -> str:
    (text,) = re.findall(rf'<section id="{scene}".*?data-part="caption">(.*?)</figcaption>', dom, re.DOTALL)
    return unescape(text).replace(MINUS, "-")


def test_an_address_sets_the_controls_and_the_page_says_what_its_text_says(file: Path) -> None:
    dom = browse(f"{file.as_uri()}#blind?brightness=0.5&count=64", "--dump-dom")
    assert caption_of(dom, "blind").startswith("64 of 128 fakes changed.")
    moved = float(re.findall(r"separate: moved by (-?[\d.]+)", caption_of(dom, "blind"))[0].rstrip("."))
    (quoted,) = re.findall(r"for 1, (\S+) for 64", dom)
    assert moved == pytest.approx(float(quoted.replace(MINUS, "-")), abs=0.06)
    assert "its 100 numbers have changed by 0, and its picture by 0" in caption_of(dom, "change")
    assert "After 10 batches of 128 with momentum 0.10" in caption_of(dom, "momentum")
    assert re.search(r"Folded: 3 layers instead of 5.*: \d\s\N{MULTIPLICATION SIGN}\s10⁻¹", caption_of(dom, "fold"))


def look_at(html: str, folder: Path, width: int) -> dict[str, Any]:
    """Return what is seen of a page in a frame of that width, once all that can be pressed was pressed."""
    outer = folder / "frame.html"
    outer.write_text(FRAME.format(width=width, page=escape(html)))
    (text,) = re.findall(r"<pre>found: (.*)</pre>", browse(outer.as_uri(), "--dump-dom", "--window-size=1400,1000"))
    return json.loads(unescape(text))


@pytest.mark.parametrize("width", [1280, 360], ids=["window", "telephone"])
def test_all_is_seen_said_and_large_enough_to_touch_and_buttons_do_what_they_say(file: Path, width: int) -> None:
    found = look_at(file.read_text(), file.parent, width)
    assert found["scrolls"] <= width
    assert found["pictures"] > 60
    assert set(found["wrong"].values()) == {0}, found["wrong"]
    said = dict(zip([*SCENES[:-1], "guessed"], found["said"], strict=True))
    assert said["change"].startswith("Batch 7.")
    assert said["channel"].endswith("The ten digits have moved by 0.00.")  # as trained
    assert said["momentum"].startswith("After 0 batches")
    assert re.search(r"times 1\.00 plus 0\.00: the pictures move by 0\.000 by", said["erase"])
    assert said["guessed"] == "5 of 5 guessed right."


def test_the_frame_would_notice_what_is_wrong(tmp_path: Path) -> None:
    wrong = '<p style="width: 500px">wide</p><canvas></canvas><svg width="0"></svg><button style="height: 9px"></button>'
    found = look_at(f'{wrong}<img src="http://localhost:9/absent.png">', tmp_path, 360)
    assert found["scrolls"] > 360
    assert min(found["wrong"].values()) > 0, found["wrong"]
