"""What do probes of the two networks tell? D and an image's batch, gradients when layers below move: claims 4 and 6."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from bngan.study.endpoints import ENDPOINTS, badness
from bngan.study.figures.samples import dots
from bngan.study.figures.view import EVERY_RUN, Cells, Figure, View, bundle_panel
from bngan.study.findings import Findings, probe_curve, probe_series
from bngan.study.panel import Look, Panel
from bngan.study.probes import NETWORKS

# D and an image's batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What a probe tells beside its endpoint.

    Attributes:
        probe: its name among a run's probes.
        key: what it is against.
        x, y: both in words.
    """

    probe: str
    key: str
    x: str
    y: str


CURVES = {
    "offset_response": Curve("offset_curve", "offset", "offset (images reach from -1 to 1)", "change of D's logits, sd"),
    "mates_share": Curve("mates_curve", "batch", "images in a batch", "share of a logit's variance"),
}


def disturbances(findings: Findings, view: View) -> Figure:
    """Draw what moves D's logit of an image beside the image: of every run, and against the size of the cause."""
    end, panels, unmeasured = dots(findings, view), [], set()
    for block, context, arms in view.cells(findings):
        for name in view.endpoints:
            found = curve_panel(findings, f"{context}, block {block}: {ENDPOINTS[name].words}", CURVES[name], arms)
            panels += [found] if found else []
            unmeasured |= set() if found else {CURVES[name].x.partition(" (")[0]}
    lines = " Lines: the same against what causes it; a flat one at 0 is blind to it." if panels else ""
    missing = f" This study has not measured it against: {', '.join(sorted(unmeasured))}." if unmeasured else ""
    return Figure(end.name, end.title, f"{end.caption}{lines}{missing}", (*end.panels, *panels))


def curve_panel(findings: Findings, title: str, curve: Curve, arms: Cells) -> str:
    """Draw a curve of each run, an arm a bundle of lines; nothing where none was measured."""
    found = {
        findings.looks[arm]: [line for run in runs if (line := probe_curve(run, curve.probe, curve.key))]
        for arm, runs in arms.items()
    }
    bundles = {look: lines for look, lines in found.items() if lines}
    if not bundles:
        return ""
    if curve.key == "offset":
        panel = bundle_panel(title, bundles, x=curve.x, y=curve.y)
        _, most = panel.axes.get_ylim()
        panel.axes.set_yscale("symlog", linthresh=0.1)  # 0, of those that are blind, has a place on it
        panel.axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        panel.axes.set_ylim(-0.01, most)
    else:
        panel = bundle_panel(title, bundles, x=curve.x, y=curve.y, log="x")
        sizes = sorted({size for lines in bundles.values() for line in lines for size, _ in line})
        panel.axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    return panel.svg()


# Gradients ------------------------------------------------------------------------------------------------------------


def gradients(findings: Findings, view: View) -> Figure:
    """Draw how far a layer's gradient turns when the layers below it move, how much the loss varies, and quality beside it."""
    panels = []
    for block, context, arms in view.cells(findings):
        where = f"{context}, block {block}"
        panels += [*cosine_panels(findings, where, arms), *loss_panels(findings, where, arms)]
        panels += [against_quality(findings, view, name, where, arms) for name in view.endpoints]
    caption = (
        "Cosine: points are every layer of every run, lines their medians; at 1 the gradient did not turn (Santurkar et al. "
        f"2018, section 2.2). Loss along the gradient: {EVERY_RUN[0].lower()}{EVERY_RUN[1:]} The last: whether runs whose "
        "gradients turn less are the better ones; a failed run is at the worst."
    )
    return Figure(f"{view.name}-cosine", "Whether a layer's gradient keeps its direction", caption, tuple(panels))


def cosine_panels(findings: Findings, where: str, arms: Cells) -> Iterator[str]:
    """Yield a panel of the layers of each network that was probed."""
    entries = [(arm, entry) for arm, runs in arms.items() for run in runs for entry in run.probed]
    entries = [(arm, entry) for arm, entry in entries if entry["probe"] == "gradient_cosine" and "layer" in entry]
    for network in NETWORKS:
        if own := [(arm, entry) for arm, entry in entries if entry["network"] == network]:
            yield cosine_panel(findings, f"{where}: layers of {network}", own)


def cosine_panel(findings: Findings, title: str, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Draw the cosines of all layers of a network, an arm a colour."""
    arms: dict[Look, dict[int, list[float]]] = {}
    for arm, entry in entries:
        arms.setdefault(findings.looks[arm], {}).setdefault(entry["iteration"], []).append(entry["value"])
    about = "Cosine between a layer's gradient before and after the layers below it took a step."
    panel = Panel(title, about, x="iterations", y="cosine", log="x", looks=list(arms))
    for look, at in arms.items():
        panel.points([x for x, values in at.items() for _ in values], list(chain(*at.values())), look, size=3.5)
        panel.axes.plot(sorted(at), [median(at[x]) for x in sorted(at)], **look.line)
    return panel.svg()


def loss_panels(findings: Findings, where: str, arms: Cells) -> Iterator[str]:
    """Yield, for each network, how much its loss varies along its gradient, over training."""
    for network in NETWORKS:
        found = {
            findings.looks[arm]: [line for run in runs if (line := probe_series(run, "loss_range", network))]
            for arm, runs in arms.items()
        }
        bundles = {look: lines for look, lines in found.items() if lines}
        if bundles:
            title = f"{where}: how much the loss of {network} varies along its gradient"
            yield bundle_panel(title, bundles, x="iterations", y="range of the loss", log="xy").svg()


def against_quality(findings: Findings, view: View, endpoint: str, where: str, arms: Cells) -> str:
    """Draw the quality of every run against an endpoint, an arm a colour, with the arms' medians large."""
    of, words = ENDPOINTS[endpoint].of, ENDPOINTS[endpoint].words
    digits = all(run.run.task == "digits" for runs in arms.values() for run in runs)
    y = "FID" if digits else "share of modes missed"
    looks = [findings.looks[arm] for arm in arms]
    panel = Panel(
        f"{where}: {y} against the cosine", f"{y} against {words}.", x="cosine", y=y, log="y" if digits else "", looks=looks
    )
    for arm, runs in arms.items():
        x, quality = [of(run) for run in runs], [badness(run) for run in runs]
        panel.points(x, quality, findings.looks[arm], size=4)
        panel.points([median(x)], [median(quality)], findings.looks[arm], size=10, alpha=1)
    return panel.svg()
