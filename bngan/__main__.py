"""`python -m bngan` is `bngan`."""

from bngan.cli import entry_point

if __name__ == "__main__":
    entry_point()
