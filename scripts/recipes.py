"""Train the recipes on fresh seeds, measure them, and write docs/recipes.md and README's table from what they recorded.

    python scripts/recipes.py                                  # every recipe, seeds 1 to 5, one run after the other
    python scripts/recipes.py --recipes default --seeds 1 2    # some of it
    python scripts/recipes.py --jobs 2 --threads 1             # two runs at a time, one thread each
    python scripts/recipes.py --seeds                          # only write the page again

Each run is `fit`, then `validate` and `test` on its best checkpoint. What they found goes into docs/recipes.json, which is
added to: a recipe and seed that is in it is not run again. Times are those of the whole `fit` command. A recipe and seed that
has ended in the folder of --runs, where `scripts/benchmark.py quality --runs` trains, is measured and not trained again.

It is no study, because it measures what those who use a recipe get: the command as it is shipped, with the validations and the
best checkpoint that belong to it, by metrics of `test`. A study compares arms by their last iterates, whose best never counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.progress import track

REPOSITORY = Path(__file__).parents[1]
RECIPES = ("default", "best_mlp", "dcgan")
SEEDS = (1, 2, 3, 4, 5)
METRICS = ("fid", "kid", "kid_se", "precision", "recall", "density", "coverage", "modes_covered", "class_kl", "confidence")
REFERENCES = {"floor": "floor", "dropped": "a class dropped", "blurred": "blurred", "repeated": "100 repeated"}
POLICIES = ("raw, running", "raw, batch", "raw, precise", "ema, running", "ema, batch", "ema, precise")
NETWORKS = {
    "default": "the source's MLP pair; batch norm in both, one joint batch",
    "best_mlp": "the same, four times as wide, 40 epochs",
    "dcgan": "DCGAN's, 32 filters; batch norm in both, one joint batch",
}
OLD = "Older than the bias-corrected EMA, and than validation against training digits: `best.ckpt` was chosen by held-out ones."
TABLE_START, TABLE_END = "<!-- written by scripts/recipes.py -->", "<!-- end -->"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="threads of each run (default: torch's own choice)")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the data set")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="folder for the runs")
    parser.add_argument("--record", type=Path, default=REPOSITORY / "docs" / "recipes.json")
    args = parser.parse_args()

    rows: list[Row] = json.loads(args.record.read_text()) if args.record.is_file() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    wanted = [(recipe, seed) for recipe in args.recipes for seed in args.seeds if (recipe, seed) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(run, recipe, seed, args.jobs, args.threads, args.runs, args.data_root) for recipe, seed in wanted
        ]
        for finished in track(as_completed(waiting), total=len(waiting), description="training", disable=not waiting):
            row = finished.result()
            rows.append(row)
            rows.sort(key=lambda row: (RECIPES.index(row["recipe"]), row["seed"]))
            args.record.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{row['recipe']:<9} seed {row['seed']}  FID {row['test']['fid']['mean']:.3f}", flush=True)
    if rows:
        args.record.with_suffix(".md").write_text(page(rows))
        readme = REPOSITORY / "README.md"
        before, start, rest = readme.read_text().partition(TABLE_START)
        _, end, after = rest.partition(TABLE_END)
        readme.write_text(f"{before}{start}\n{summary(rows)}\n{end}{after}")


def run(recipe: str, seed: int, jobs: int, threads: int | None, runs: Path, data_root: Path) -> Row:
    """Train one recipe on one seed and measure it; return what is to be recorded."""
    root = (runs / f"{recipe}-{seed}").resolve()
    common = [f"--data.root={data_root.resolve()}", f"--trainer.default_root_dir={root}", f"--name={recipe}"]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def command(*arguments: str) -> Path:
        before = set(root.glob("*/*"))
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *arguments, *common],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{recipe}, seed {seed}: {done.stderr.strip()[-2000:]}")
        (folder,) = set(root.glob("*/*")) - before
        return folder

    ended = sorted(root.glob("*/*/quality.json"))
    start = time.monotonic()
    if ended:
        folder = ended[-1].parent
        print(f"{recipe}, seed {seed}: measures the run that has ended in {folder}", flush=True)
    else:
        folder = command("fit", f"--config={REPOSITORY / 'configs' / recipe}.yaml", f"--seed_everything={seed}")
    seconds = None if ended else round(time.monotonic() - start, 1)
    best = folder / "checkpoints" / "best.ckpt"
    record = json.loads((folder / "run.json").read_text())["starts"][-1]
    measuring = json.loads((folder / "quality.json").read_text())["validation_seconds"]
    validated = json.loads((command("validate", f"--ckpt_path={best}") / "validate.json").read_text())
    tested = json.loads((command("test", f"--ckpt_path={best}") / "test.json").read_text())
    return {
        "recipe": recipe,
        "seed": seed,
        "seconds": seconds,
        "validation_seconds": round(measuring, 1),
        "jobs": jobs,
        "git": record["git"],
        "versions": record["versions"],
        "machine": record["machine"],
        "num_samples": tested["num_samples"],
        "test": {name: {key: value for key, value in tested[name].items() if key != "values"} for name in METRICS},
        "statistics": {policy: validated[policy]["fid"] for policy in POLICIES if policy in validated},
    }


def page(rows: Sequence[Row]) -> str:
    """Return the text of docs/recipes.md."""
    lines = [
        "# Recipes, measured",
        "",
        "Written by `python scripts/recipes.py` from `docs/recipes.json`; not to be edited by hand. No seed was used to choose",
        "a setting. `best.ckpt` of each run, chosen by FID on one set of latents against training digits, is measured on 5",
        f"others, {rows[0]['num_samples']:,} samples each, against as many held-out digits, by features of the pinned digit",
        "net. ± is the standard deviation over training seeds, kid_se the standard error of kid over the images. The floor is",
        "what as many real training digits get; the controls are real training digits without the first class, blurred ones,",
        f"and 100 digits, {rows[0]['num_samples'] // 100} times each.",
        "",
    ]
    for recipe in RECIPES:
        own = [row for row in rows if row["recipe"] == recipe]
        if own:
            lines += [f"## `configs/{recipe}.yaml`", "", *recipe_lines(own), ""]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Return README's table."""
    lines = [
        "| recipe | networks | seeds | FID | times its floor | recall | coverage (floor) | modes of 10 | class KL (floor) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        own = [row["test"] for row in rows if row["recipe"] == recipe]
        if own:
            floors = {name: own[0][name]["floor"] for name in ("fid", "coverage", "class_kl")}
            fids, recalls, coverages, kls = (
                [test[name]["mean"] for test in own] for name in ("fid", "recall", "coverage", "class_kl")
            )
            modes = min(test["modes_covered"]["mean"] for test in own)
            cells = [
                f"`configs/{recipe}.yaml`",
                NETWORKS[recipe],
                f"{len(own)}",
                spread(fids, digits=2),
                f"{mean(fids) / floors['fid']:.0f}",
                spread(recalls, digits=2),
                f"{spread(coverages, digits=2)} ({floors['coverage']:.2f})",
                f"{modes:.0f}",
                f"{mean(kls):.4f} ({floors['class_kl']:.4f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recipe_lines(rows: Sequence[Row]) -> list[str]:
    """Return one recipe's tables."""
    first = rows[0]
    fids = [row["test"]["fid"]["mean"] for row in rows]
    floor = first["test"]["fid"]["floor"]
    seeds = ", ".join(str(row["seed"]) for row in rows)
    lines = [
        f"Seeds {seeds}, commit {first['git'][:10]}. **FID {spread(fids)}, {mean(fids) / floor:.1f} times the floor**",
        f"of {floor:.3f}. {timing(rows)}",
        *([] if "kid_se" in first["test"] else [OLD]),
        "",
        f"| metric | mean ± sd | least | most | {' | '.join(REFERENCES.values())} |",
        f"|---|---|---|---|{'---|' * len(REFERENCES)}",
    ]
    for name in [name for name in METRICS if name in first["test"]]:  # earlier commits measured less
        values = [row["test"][name]["mean"] for row in rows]
        found = [first["test"][name].get(reference) for reference in REFERENCES]
        references = " | ".join("" if value is None else f"{value:.4f}" for value in found)
        lines.append(f"| {name} | {spread(values)} | {min(values):.4f} | {max(values):.4f} | {references} |")
    lines += [
        "",
        "FID by what G is sampled with: its own weights or their moving average (ema), normalized by running statistics, by",
        "the batch's own, or by precise ones (one set of latents, against the digits that validation measures with).",
        "",
        "| weights, statistics | FID | less raw, running | worse in |",
        "|---|---|---|---|",
    ]
    for policy in POLICIES:
        if all(policy in row["statistics"] for row in rows):
            values = [row["statistics"][policy] for row in rows]
            gains = [row["statistics"][policy] - row["statistics"]["raw, running"] for row in rows]
            worse = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            lines.append(f"| {policy} | {spread(values)} | {spread(gains, sign=True)} | {worse} |")
    return lines


def timing(rows: Sequence[Row]) -> str:
    """Return how long the whole fit command took, of those runs that had the machine to themselves."""
    machine, versions = rows[0]["machine"], rows[0]["versions"]
    where = f"{machine['cores']} cores ({machine['device']}), torch {versions['torch']}"
    if rows[0]["seconds"] is None:
        return f"[performance.md](performance.md) has the time it takes, on {where}."
    alone = [row for row in rows if row["jobs"] == 1 and row["machine"]["threads"] == machine["cores"]]
    seconds = [row["seconds"] for row in alone]
    if not seconds:
        return f"Run on one of {where}, beside other work, so not timed."
    spans = f"{min(seconds):.0f} to {max(seconds):.0f}, " if len(seconds) > 1 else ""
    share = median(row["validation_seconds"] / row["seconds"] for row in alone)
    return f"`fit` took {median(seconds):.0f} s ({spans}n={len(seconds)}), {share:.0%} of it validation, on {where}."


def spread(values: Sequence[float], *, sign: bool = False, digits: int = 4) -> str:
    """Return mean ± standard deviation as text."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if sign else ''}.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
