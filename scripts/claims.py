"""Write README's table of claims from what a study recorded.

python scripts/claims.py docs/claims/claims_cpu
"""

import argparse
from pathlib import Path

from bngan.study.reading import read_study
from bngan.study.record import SOURCE, read_results
from bngan.study.report import claims_table
from bngan.study.verdicts import judge

REPOSITORY = Path(__file__).parents[1]
START, END = "<!-- written by scripts/claims.py -->", "<!-- end of claims -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    args = parser.parse_args()
    study = read_study(args.folder / SOURCE)
    table = claims_table(judge(study, [*read_results(study, args.folder).values()]))
    before, _, rest = args.readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    args.readme.write_text(f"{before}{START}\n{table.strip()}\n{END}{after}")


if __name__ == "__main__":
    main()
