"""What a person sees who opens a study's report: in a window, on a telephone, on paper."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest
from screenshot_tensorboard import browse, chromium

from bngan.study.report import write_report
from tests.study.made_up import made_up_results, made_up_study

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

# A page with the report in a frame, which may be as narrow as a telephone; it tells what the report looks like.
FRAME = """<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, right = frame.contentWindow.innerWidth + 1;
  const boxes = tags => [...page.querySelectorAll(tags)].map(found => found.getBoundingClientRect());
  const requests = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.innerHTML = "<pre>found: " + JSON.stringify({{
    width: frame.contentWindow.innerWidth,
    scrolls: page.documentElement.scrollWidth,
    cut: boxes("p, td, th, h1, h2, h3, pre, figcaption, svg, img").filter(box => box.right > right).length,
    pictures: boxes("svg, img").length,
    empty: boxes("svg, img").filter(box => box.width < 20 || box.height < 20).length,
    requests: requests.filter(name => !name.startsWith("data:")),
  }}) + "</pre>";
}};
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = made_up_study(fresh=6)
    return write_report(study, made_up_results(study), tmp_path_factory.mktemp("study"))


def look_at(page: Path, width: int, *, style: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Return what is seen in a window of that width, after a replacement in the page."""
    outer = page.with_name("frame.html")
    outer.write_text(FRAME.format(width=width, page=escape(page.read_text().replace(*style))))
    shown = browse(outer.as_uri(), "--dump-dom", "--window-size=1400,1000")
    (found,) = re.findall(r"<pre>found: (.*)</pre>", shown)
    return json.loads(found)


@pytest.mark.parametrize(
    ("width", "style"),
    [
        (1280, ("", "")),
        (360, ("", "")),
        (688, ("@media print", "@media all")),  # between the margins of A4
    ],
    ids=["window", "telephone", "paper"],
)
def test_nothing_is_cut_off_or_fetched_and_all_pictures_have_a_size(page: Path, width: int, style: tuple[str, str]) -> None:
    found = look_at(page, width, style=style)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert found["cut"] == 0
    assert found["pictures"] > 20
    assert found["empty"] == 0
    assert found["requests"] == []


def test_the_frame_would_notice_what_is_too_wide_empty_or_fetched(page: Path) -> None:
    wrong = '<main><p style="width: 500px">wide</p><svg width="0"></svg><img src="http://localhost:9/absent.png">'
    found = look_at(page, 360, style=("<main>", wrong))
    assert found["scrolls"] > 360
    assert found["cut"] == 1
    assert found["empty"] >= 1
    assert [name.rpartition("/")[2] for name in found["requests"]] == ["absent.png"]


def test_it_prints(page: Path) -> None:
    printed = page.with_name("report.pdf")
    browse(page.as_uri(), f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))
    assert 3 <= pages <= 40
