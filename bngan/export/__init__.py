"""A trained generator as a file that other programs run."""
