"""The file of a study: what it means, and every mistake in it, told in a line that says what is allowed."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from bngan.cli import main
from bngan.errors import UsageError
from bngan.study.endpoints import ENDPOINTS
from bngan.study.reading import STUDIES, find_study, read_study
from bngan.study.spec import Contrast, Look, planned_runs

TEXT = """
title: A small study
settings: {lr_decay_start: 1, hidden_dim: 16}
contexts:
  T: {loss: hinge, instance_noise: 0}
  B: {}
arms:
  a0: {label: none, g_norm: none, d_norm: none}
  a3: {g_norm: batch, d_norm: batch}
blocks:
  A:
    task: digits
    arms: {T: [a0, a3], B: [a0, a3]}
    axes: {g_lr d_lr: [2e-4, 6e-4]}
    seeds: {pilot: 101..103}
    iterations: 40
    batch_size: 32
    looks: {at: [40]}
  F:
    task: digits
    arms: {T: [a0, a3], B: [a0, a3]}
    chosen_from: A
    aa: {B: a3}
    seeds: {fresh: "1..10, 12, 14", aa: [21..30, 32, 34]}
    settings: {bn_momentum: 0.2}
    iterations: 40
    batch_size: 32
    looks: {at: [10, 20], samples: 500, whole: [40], whole_samples: 1000, probes: {mates_share: [20, 40]}}
claims:
  - name: 4
    statement: D sees the batch.
    contexts: [T, B]
    primary: {arm: a3, baseline: a0, blocks: F, endpoint: mates_share, margin: 0.05, better: more}
    secondary:
      - {arm: a3, baseline: a0, blocks: [F], endpoint: fid, margin: 1.25, better: less}
"""


PRIMARY = "arm: a3, baseline: a0, blocks: A, endpoint: fid, margin: 1.25, better: less"


def written(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_file_is_read_as_it_is_meant(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, TEXT))
    assert (study.name, study.title, study.source) == ("small", "A small study", TEXT)
    assert study.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert study.settings == {"lr_decay_start": 1.0, "hidden_dim": 16}
    assert type(study.settings["lr_decay_start"]) is float
    assert study.contexts == {"T": {"loss": "hinge", "instance_noise": 0.0}, "B": {}}
    assert (study.arms["a0"].label, study.arms["a3"].label) == ("none", "a3")
    pilots, fresh = study.blocks
    assert pilots.axes == {"g_lr d_lr": (2e-4, 6e-4)}
    assert pilots.seeds == {"pilot": (101, 102, 103)}
    assert pilots.looks == (Look(40, 2500),)
    assert fresh.seeds == {"fresh": (*range(1, 11), 12, 14)}
    assert (fresh.chosen_from, fresh.aa, fresh.aa_seeds) == ("A", {"B": "a3"}, (*range(21, 31), 32, 34))
    assert fresh.looks == (Look(10, 500), Look(20, 500, False, ("mates_share",)), Look(40, 1000, True, ("mates_share",)))
    (claim,) = study.claims
    assert (claim.name, claim.rule, claim.contexts) == ("4", "beyond", ("T", "B"))
    assert claim.primary == Contrast("a3", "a0", ("F",), "mates_share", 0.05, "more")
    assert claim.secondary[0].blocks == ("F",)
    assert Counter(run.role for block in study.blocks for run in planned_runs(study, block)) == {"pilot": 24, "fresh": 60}


def test_a_recipe_is_what_settings_of_its_own_stand_on(tmp_path: Path) -> None:
    text = TEXT.replace("settings: {lr_decay_start: 1, hidden_dim: 16}", "settings: {recipe: best_mlp, g_lr: 1}")
    text = text.replace("B: {}", "B: {recipe: default}").replace("  a3: {g_norm", "  a3: {recipe: dcgan, g_norm")
    study = read_study(written(tmp_path, text))
    assert study.settings == {"hidden_dim": 512, "g_lr": 1.0, "d_lr": 1e-3, "instance_noise": 1.5}
    assert study.contexts["B"] == {}
    runs = {(run.context, run.arm): run.settings for run in planned_runs(study, study.blocks[0])}
    shared = {"hidden_dim": 512, "g_lr": 6e-4, "d_lr": 6e-4}
    assert runs["B", "a0"] == {**shared, "instance_noise": 1.5, "g_norm": "none", "d_norm": "none"}
    assert runs["T", "a3"] == {**shared, "hidden_dim": 32, "network": "conv", "instance_noise": 0.0, "loss": "hinge"}


MISTAKES = {
    # what is put in place of what, and words of the line
    "YAML": ("title: A", "title: [A", r"not valid YAML at line \d"),
    "a key twice": ("  B: {}", "  T: {}", "not valid YAML at line 6: 'T' stands twice"),
    "no mapping": (TEXT, "- 1", "the study should hold names with values"),
    "a missing part": ("contexts:", "context:", "unknown 'context'; choose from contexts, arms"),
    "a missing key": (
        "    iterations: 40\n    batch_size: 32\n    looks: {at: [40]}",
        "    batch_size: 32\n    looks: {at: [40]}",
        "block A: iterations is missing",
    ),
    "an unknown key": ("    axes:", "    axis:", "block A: unknown 'axis'; choose from task"),
    "an unknown setting": ("hidden_dim: 16", "hidden: 16", "settings: 'hidden' is no setting here; see bngan fit --help"),
    "an unknown axis": ("g_lr d_lr: [2e-4", "g_lr lr: [2e-4", "block A: axis 'g_lr lr': 'lr' is no setting"),
    "a seed as a setting": ("hidden_dim: 16", "seed: 16", "'seed' is no setting here; give `seeds` of a block"),
    "a recipe": ("hidden_dim: 16", "recipe: dcnn", "settings: unknown recipe 'dcnn'; choose from best_mlp, "),
    "a recipe of one's own": ("hidden_dim: 16", "recipe: ./mine.yaml", "settings: unknown recipe './mine.yaml'; choose from"),
    "a type": ("hidden_dim: 16", "hidden_dim: 16.5", "settings: hidden_dim must be int, got 16.5"),
    "a truth for a number": ("hidden_dim: 16", "hidden_dim: true", "hidden_dim must be int, got True"),
    "a word for a number": ("[2e-4, 6e-4]", "[fast, 6e-4]", "axis 'g_lr d_lr': g_lr must be float, got 'fast'"),
    "null": ("hidden_dim: 16", "hidden_dim: null", "hidden_dim must be int, got None"),
    "a choice": ("loss: hinge", "batching: apart", "context T: unknown batching 'apart'; choose from joint, separate"),
    "a range": ("[2e-4, 6e-4]", "[0, 6e-4]", "block A, context T, arm a0: g_lr must be above 0, got 0"),
    "a loss": ("loss: hinge", "loss: strong", "context T, arm a0: unknown loss 'strong'"),
    "a norm": ("d_norm: batch", "d_norm: strong", "context T, arm a3: unknown norm 'strong'"),
    "a penalty beside batch norm": ("loss: hinge", "r1: 0.1", "arm a3: d_norm 'batch' cannot be combined with r1"),
    "a batch": (
        "    batch_size: 32\n    looks: {at: [40]}",
        "    batch_size: 1\n    looks: {at: [40]}",
        "batch norm needs at least 2",
    ),
    "no values": ("[2e-4, 6e-4]", "[]", "axis 'g_lr d_lr' is empty"),
    "a value twice": ("[2e-4, 6e-4]", "[2e-4, 0.0002]", "axis 'g_lr d_lr': 0.0002 stands twice"),
    "an arm twice": ("{T: [a0, a3], B: [a0, a3]}\n    axes", "{T: [a0, a0]}\n    axes", "arms of T: 'a0' stands twice"),
    "an unknown task": (
        "task: digits\n    arms: {T: [a0, a3], B: [a0, a3]}\n    axes",
        "task: letters\n    arms: {T: [a0]}\n    axes",
        "unknown task 'letters'; choose from digits",
    ),
    "an unknown context": (
        "arms: {T: [a0, a3], B: [a0, a3]}\n    axes",
        "arms: {C: [a0]}\n    axes",
        "unknown context 'C'; choose from T, B",
    ),
    "an unknown arm": (
        "arms: {T: [a0, a3], B: [a0, a3]}\n    axes",
        "arms: {T: [a9]}\n    axes",
        "unknown arm 'a9'; choose from a0, a3",
    ),
    "an arm called aa": ("  a0: {label", "  aa: {label", "arm aa: this name is that of"),
    "an unknown block": ("chosen_from: A", "chosen_from: C", "chosen_from is the unknown block 'C'; choose from A, F"),
    "neighbours of nothing": (
        "seeds: {pilot",
        "neighbours: true\n    seeds: {pilot",
        "block A: neighbours are those of a chosen",
    ),
    "neighbours of words": (
        "g_lr d_lr: [2e-4, 6e-4]}\n    seeds: {pilot: 101..103}",
        "batching: [joint, separate]}\n    seeds: {pilot: 101..103, fresh: 1..3}\n    chosen_from: A\n    neighbours: true",
        "block A: neighbours need a single axis of numbers in block A",
    ),
    "neighbours that nothing reads": (
        "chosen_from: A",
        "chosen_from: A\n    neighbours: true",
        "block F: no contrast reads its neighbours",
    ),
    "a word for yes": (
        "chosen_from: A",
        "chosen_from: A\n    neighbours: both",
        "neighbours must be true or false, got 'both'",
    ),
    "axes of two blocks": ("chosen_from: A", "chosen_from: A\n    axes: {beta1: [0.1]}", "leave one of both out"),
    "nothing to choose": ("axes: {g_lr d_lr: [2e-4, 6e-4]}", "axes: {}", "chosen_from needs axes and pilot seeds in block A"),
    "a choice never made": (
        "arms: {T: [a0, a3], B: [a0, a3]}\n    axes",
        "arms: {T: [a0, a3]}\n    axes",
        "block F: block A has, in context B, no arm 'a0'",
    ),
    "a seed pilot and fresh": ("pilot: 101..103", "pilot: 12..14", "seed 12 is both pilot and fresh"),
    "a seed fresh and again": ("aa: [21..30, 32, 34]", "aa: [14]", "seed 14 is both fresh and of aa"),
    "a seed pilot and again": ("aa: [21..30, 32, 34]", "aa: [103]", "seed 103 is both pilot and fresh"),
    "an arm again without seeds": (", aa: [21..30, 32, 34]", "", "an arm that is trained again needs both"),
    "no seeds": ("seeds: {pilot: 101..103}", "seeds: {}", "block A: seeds are missing"),
    "seeds that fall": ("101..103", "103..101", "'103..101' is no seed and no range of seeds, such as 1..12"),
    "a seed twice": ("1..10, 12, 14", "1..10, 7", "seeds of fresh runs: 7 stands twice"),
    "a look beyond the end": (
        "looks: {at: [40]}",
        "looks: {at: [50]}",
        "the last look must be after iteration 40, and is after 50",
    ),
    "no look at the end": (
        "whole: [40]",
        "whole: [30]",
        "F: looks: mates_share is asked for after iteration 40, where no look is",
    ),
    "a look at nothing": ("looks: {at: [40]}", "looks: {at: [0, 40]}", "at must be a whole number of at least 1, got 0"),
    "an unknown probe": ("mates_share: [20", "mates: [20", "unknown probe 'mates'; choose from"),
    "an unknown endpoint": (
        "endpoint: fid",
        "endpoint: beauty",
        "claim 1: secondary: unknown endpoint 'beauty'; choose from failure",
    ),
    "an unknown rule": (
        "    contexts: [T, B]\n",
        "    contexts: [T, B]\n    rule: any\n",
        "unknown rule 'any'; choose from beyond, within, not_worse",
    ),
    "an unknown claim's block": ("blocks: F", "blocks: Z", "claim 4: unknown block 'Z'"),
    "an unknown claim's context": ("    contexts: [T, B]\n", "    contexts: [C]\n", "claim 4: unknown context 'C'"),
    "an arm that a block lacks": (
        "arm: a3, baseline: a0, blocks: F",
        "arm: aa, baseline: a3, blocks: F",
        "claim 4: block F has no arm 'aa' in context T",
    ),
    "a ratio's margin": (
        "margin: 1.25",
        "margin: 0.8",
        "margin of fid must be above 1, for it is a ratio, and at most 10, got 0.8",
    ),
    "a difference's margin": ("margin: 0.05", "margin: 5", "margin of mates_share must be between 0 and 1"),
    "a margin of words": ("margin: 0.05", "margin: small", "primary: margin must be a number, got 'small'"),
    "conditions of one level": (
        "    contexts: [T, B]\n",
        "    contexts: [T, B]\n    conditions: {loss: [T]}\n",
        "conditions: loss must be two lists of contexts",
    ),
    "a condition's level twice": (
        "    contexts: [T, B]\n",
        "    contexts: [T, B]\n    conditions: {loss: [[T], [T, B]]}\n",
        "conditions: loss: 'T' stands twice",
    ),
    "a condition's context": (
        "    contexts: [T, B]\n",
        "    contexts: [T]\n    conditions: {loss: [[T], [B]]}\n",
        "conditions: no context of the claim 'B'; choose from T",
    ),
    "conditions of all contexts": (
        "    contexts: [T, B]\n",
        "    contexts: [T, B]\n    rule: not_worse\n    conditions: {loss: [[T], [B]]}\n",
        "rule not_worse asks for every context",
    ),
    "a pair of one": ("blocks: [F]", "blocks: [F], pairs: [a3]", "pairs must be lists of an arm and its baseline"),
    "an arm in two pairs": (
        "blocks: [F]",
        "blocks: [F], pairs: [[a0, a3]]",
        "arms of pairs, .* independent: 'a3' stands twice",
    ),
    "pairs without a baseline": (
        "baseline: a0, blocks: [F]",
        "blocks: [F], pairs: [[a0, a0]]",
        "pairs and cross_fitted need a baseline",
    ),
    "an arm of a pair that a block lacks": (
        "baseline: a0, blocks: [F]",
        "blocks: [F], pairs: [[a0, aa]]",
        "no arm 'aa' in context T",
    ),
    "cross-fitting of nothing": (
        "blocks: [F]",
        "blocks: [F], cross_fitted: true",
        "cross_fitted needs two values of an axis of block F",
    ),
    "an impossible date": (
        "title: A small study",
        "title: 2020-13-45",
        "line 2: '2020-13-45' is no timestamp that can be used",
    ),
    "a tag of nothing": ("title: A small study", 'title: !!int ""', "line 2: '' is no int that can be used"),
    "a tag of a word": ("title: A small study", "title: !!float x", "line 2: 'x' is no float that can be used"),
    "a tag of perhaps": ("title: A small study", "title: !!bool maybe", "line 2: 'maybe' is no bool that can be used"),
    "a number of 5,000 digits": ("batch_size: 32", "batch_size: " + 5_000 * "9", r"'9{20}\.\.\.' is no int that can be used"),
    "a number beyond all": ("hidden_dim: 16", "g_lr: 0x" + 5_000 * "f", r"'0xf{18}\.\.\.' is no int that can be used"),
    "3,000 lists in lists": ("title: A small study", "title: " + 3_000 * "[", "nested too deeply to be read"),
    "an axis of nothing": ("g_lr d_lr: [2e-4", '"": [2e-4', "axis '' names no setting; give one or more"),
    "an axis of one setting twice": ("g_lr d_lr: [2e-4", "g_lr g_lr: [2e-4", "block A: settings of axes: 'g_lr' stands twice"),
    "two axes of one setting": ("{g_lr d_lr: [", "{g_lr: [1e-3], g_lr d_lr: [", "settings of axes: 'g_lr' stands twice"),
    "an infinite margin": ("margin: 1.25", "margin: .inf", r"'\.inf' is no float that can be used"),
    "a margin beyond all": ("margin: 1.25", "margin: 1e18", r"must be above 1, for it is a ratio, and at most 10, got 1e\+18"),
    "one sample": ("samples: 500", "samples: 1", "samples must be a whole number of at least 100 and at most 100,000, got 1"),
    "too many samples": (
        "whole_samples: 1000",
        "whole_samples: 1000000000",
        "whole_samples must be .* at most 100,000, got 10",
    ),
    "too large a batch": (
        "batch_size: 32",
        "batch_size: 10000000",
        "batch_size must be .* at least 1 and at most 7,500, got 1",
    ),
    "a choice for no context": (
        "chosen_from: A",
        "chosen_from: A\n    chosen_as: {C: B}",
        "block F: chosen_as is for the contexts of the block, not for 'C'; choose from T, B",
    ),
    "a name that is a path": ("  a0: {label", "  a/0: {label", "arm 'a/0': files are named by it; take a name without /"),
    "a direction": ("better: less", "better: lower", "unknown better 'lower'; choose from less, more"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_told_in_a_line(case: str, tmp_path: Path) -> None:
    old, new, words = MISTAKES[case]
    assert old in TEXT
    path = written(tmp_path, TEXT.replace(old, new, 1))
    with pytest.raises(UsageError, match=words) as told:
        read_study(path)
    assert str(told.value).startswith(f"{path}: ")
    assert "\n" not in str(told.value)


UNMEASURED: dict[str, tuple[str, dict[str, Any], str]] = {
    # an endpoint, what its block has otherwise, and words of the line
    "a probe that no look makes": ("mates_share", {"looks": {"whole": [40]}}, "arm a0: no look makes probe mates_share"),
    "coverage at the end": ("coverage", {"looks": {"at": [40], "whole": [20]}}, "it needs a whole look at the end"),
    "FID of points": ("fid", {"task": "ring"}, "task ring has no such measure, but digits"),
    "classes of points": ("class_kl", {"task": "grid"}, "task grid has no such measure, but digits, stack2"),
    "an average that is not kept": ("fid_ema", {"settings": {"ema_decay": 0}}, "no average of G's weights is kept"),
    "running statistics without norm": ("running_to_precise", {}, "arm a0: G has no batch norm"),
    "early and late of one look": ("fid_late_to_early", {}, "it needs whole looks, 2 at least"),
    "a time by one look": ("time_to_good", {"looks": {"at": [40]}}, "it needs 2 looks"),
    "a collapse within the first iterations": ("point_collapse", {}, "it needs a look after more than 146 iterations"),
}


@pytest.mark.parametrize("case", UNMEASURED)
def test_endpoint_that_nothing_measures_is_told_before_the_first_run(case: str, tmp_path: Path) -> None:
    endpoint, change, words = UNMEASURED[case]
    content: dict[str, Any] = yaml.safe_load(TEXT)
    content["blocks"]["F"] |= change
    (claim,) = content["claims"]
    margin = 1.25 if ENDPOINTS[endpoint].kind == "ratio" else 0.05
    claim["secondary"] = [claim["primary"] | {"endpoint": endpoint, "margin": margin}]
    claim["primary"] |= {"endpoint": "modes_share"}
    with pytest.raises(UsageError, match=rf"claim 4: {endpoint} is not measured in block F, context T, .*{words}"):
        read_study(written(tmp_path, yaml.safe_dump(content)))
    claim["secondary"] = []
    assert read_study(written(tmp_path, yaml.safe_dump(content))).claims


def test_names_that_make_one_picture_of_two_runs_are_told(tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(TEXT)
    content["contexts"]["T_a0"] = {}
    content["arms"]["a0_a0"] = {}
    content["blocks"]["A"]["arms"] |= {"T": ["a0", "a3", "a0_a0"], "T_a0": ["a0"]}
    with pytest.raises(UsageError, match=r"A/T/a0_a0/0\.0002/101 and A/T_a0/a0/0\.0002/101 would both draw A_T_a0_a0_0"):
        read_study(written(tmp_path, yaml.safe_dump(content)))


@pytest.mark.parametrize(
    ("seeds", "contexts", "enough"),
    [("1", "[T]", False), ("1", "[T, B]", False), ("1..2", "[T]", True), ("1..3", "[T, B]", True)],
)
def test_too_few_seeds_for_any_verdict_are_told(seeds: str, contexts: str, enough: bool, tmp_path: Path) -> None:
    """Each context must have enough; a difference of 0.05 can be told from one of 0.5 by two runs."""
    text = TEXT.replace("1..10, 12, 14", seeds).replace("contexts: [T, B]", f"contexts: {contexts}")
    path = written(tmp_path, text)
    if enough:
        assert read_study(path).claims
        return
    with pytest.raises(UsageError, match=r"claim 4: too few seeds for any verdict in context T: .* with 1 an arm at"):
        read_study(path)


def test_strata_of_one_seed_are_too_few_however_many_there_are(tmp_path: Path) -> None:
    grid = TEXT.replace("arm: a3, baseline: a0, blocks: F, endpoint: mates_share, margin: 0.05, better: more", PRIMARY, 1)
    assert read_study(written(tmp_path, grid)).claims
    with pytest.raises(UsageError, match=r"too few seeds for any verdict in context T: .* with 2 an arm at the margin 1\.25"):
        read_study(written(tmp_path, grid.replace("pilot: 101..103", "pilot: 101")))


def test_ways_to_compare_are_read_as_they_are_meant(tmp_path: Path) -> None:
    text = TEXT.replace("blocks: F, endpoint: mates", "blocks: F, pairs: [], endpoint: mates").replace(
        "chosen_from: A", "chosen_from: A\n    neighbours: true"
    )
    text = text.replace("    contexts: [T, B]\n", "    contexts: [T, B]\n    conditions: {loss: [T, B]}\n")
    text = text.replace("blocks: [F]", "blocks: [A, F], cross_fitted: true")
    study = read_study(written(tmp_path, text))
    (claim,) = study.claims
    assert claim.conditions == {"loss": (("T",), ("B",))}
    assert [contrast.cross_fitted for contrast in claim.contrasts] == [False, True]
    assert [block.neighbours for block in study.blocks] == [False, True]
    roles = Counter(run.role for block in study.blocks for run in planned_runs(study, block))
    assert roles == {"pilot": 24, "fresh": 60, "neighbour": 48}


def test_penalty_beside_batch_norm_is_taken_where_the_study_says_so(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, TEXT.replace("loss: hinge", "r1: 0.1, allow_batch_coupled_penalty: true")))
    assert study.contexts["T"]["allow_batch_coupled_penalty"] is True


def test_block_may_choose_for_itself_and_for_a_context_of_another_name(tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(TEXT)
    content["blocks"]["A"] |= {"chosen_from": "A", "seeds": {"pilot": "101..102", "fresh": "1..3"}}
    content["contexts"]["Long"] = {"lr_decay_start": 0.5}
    content["blocks"]["F"] |= {"arms": {"Long": ["a3"]}, "chosen_as": {"Long": "B"}, "aa": {"Long": "a3"}}
    primary = {"arm": "a3", "blocks": "F", "endpoint": "running_to_precise", "margin": 1.05, "better": "less"}
    content["claims"] = [
        {"name": 5, "statement": "Either will do.", "contexts": ["Long"], "primary": primary, "rule": "within"}
    ]
    study = read_study(written(tmp_path, yaml.safe_dump(content)))
    assert [len(planned_runs(study, block)) for block in study.blocks] == [4 * (2 * 2 + 3), 12 + 12]


PLANNED = {
    "claims_cpu": {"A": 84, "F": 96, "G": 72, "P": 24},
    "claims_gpu": {"A": 1040, "X": 560, "F": 960, "L": 128, "R8": 320, "R25": 320, "S": 240, "P": 360, "Z": 64},
    "stacked_batches": {"S": 8},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_shipped_study_can_be_run_and_has_the_runs_that_were_planned(name: str) -> None:
    study = read_study(find_study(name))
    assert study.name == name
    planned = {block.name: len(planned_runs(study, block)) for block in study.blocks}
    assert planned == PLANNED.get(name, planned)
    assert PLANNED.keys() <= {path.stem for path in STUDIES.glob("*.yaml")}


def test_file_that_is_not_there_is_told_with_what_is_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"there is no such file; .* claims_cpu, claims_gpu, ema_buffers, smoke"):
        find_study("claims")
    (tmp_path / "latin.yaml").write_bytes(b"title: \xff")
    with pytest.raises(UsageError, match="cannot be read"):
        read_study(tmp_path / "latin.yaml")
    assert main(["study", str(written(tmp_path, "title: [")), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"bngan: error: {tmp_path / 'small.yaml'}: not valid YAML at line ")
