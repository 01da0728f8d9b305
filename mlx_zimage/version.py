"""This package's version, for whatever tells it, without loading the package's names."""

__version__ = "0.1.0"
