"""Train, validate, test: `python scripts/train.py fit` is `bngan fit`."""

from bngan.cli import entry_point

if __name__ == "__main__":
    entry_point()
