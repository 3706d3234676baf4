"""Which figure shows what a claim's runs did? It follows from the claim's endpoints; every run is a point or a line in it."""

from collections.abc import Sequence
from dataclasses import replace

from bngan.study.figures.factors import matrix
from bngan.study.figures.networks import disturbances, gradients
from bngan.study.figures.quality import arrivals, curves, rates, slopes
from bngan.study.figures.samples import coverage, dots, modes, ratios
from bngan.study.figures.view import Draw, Figure, View, slug
from bngan.study.findings import Findings
from bngan.study.spec import Claim, Contrast
from bngan.study.verdicts import Verdict

# By a part of the endpoint's name; dots for all others.
DRAW: dict[str, Draw] = {
    "failure": rates,
    "time_to": arrivals,
    "late_to_early": slopes,
    "point_collapse": curves,
    "coverage": coverage,
    "modes_share": modes,
    "running_to_precise": ratios,
    "gradient_cosine": gradients,
    "offset_response": disturbances,
    "mates_share": disturbances,
}


def figures_of_claim(findings: Findings, verdict: Verdict) -> list[Figure]:
    """Return the figures that the claim's endpoints ask for, its own first, which bears the verdict."""
    claim = verdict.claim
    asked: dict[tuple[Draw, str], list[Contrast]] = {}
    if claim.rule == "not_worse":
        asked[matrix, "raw"] = [*claim.contrasts]
    for contrast in claim.contrasts:
        weights = "ema" if contrast.endpoint.endswith("_ema") else "raw"
        draw = next((draw for part, draw in DRAW.items() if part in contrast.endpoint), dots)
        asked.setdefault((draw, weights), []).append(contrast)
    figures = [draw(findings, view_of(findings, claim, some, weights)) for (draw, weights), some in asked.items()]
    first, *others = [figure for figure in figures if figure.panels]
    return [replace(first, title=f"{first.title}: {verdict.word}"), *others]


def view_of(findings: Findings, claim: Claim, contrasts: Sequence[Contrast], weights: str) -> View:
    """Return what these contrasts of a claim are about, arms in the study's order."""
    return View(
        name=f"claim-{slug(claim.name)}{'' if weights == 'raw' else f'-{weights}'}",
        contrasts=tuple(contrasts),
        blocks=tuple(dict.fromkeys(block for contrast in contrasts for block in contrast.blocks)),
        contexts=claim.contexts,
        arms=findings.arms_of(contrasts),
        weights=weights,
    )
