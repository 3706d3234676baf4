"""Write README's tables of claims from what studies recorded.

python scripts/claims.py docs/claims/*
"""

import argparse
from pathlib import Path

from bngan.study.reading import read_study
from bngan.study.record import SOURCE, read_results
from bngan.study.report import claims_table
from bngan.study.verdicts import judge

REPOSITORY = Path(__file__).parents[1]
START, END = "<!-- written by scripts/claims.py: {} -->", "<!-- end of claims -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of studies")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    args = parser.parse_args()
    for folder in args.folders:
        study = read_study(folder / SOURCE)
        table = claims_table(judge(study, [*read_results(study, folder).values()]))
        start = START.format(folder.resolve().name)
        before, found, rest = args.readme.read_text().partition(start)
        _, ended, after = rest.partition(END)
        if not (found and ended):
            parser.error(f"{args.readme} has no {start} ... {END}, between which the table would go")
        args.readme.write_text(f"{before}{start}\n{table.strip()}\n{END}{after}")


if __name__ == "__main__":
    main()
