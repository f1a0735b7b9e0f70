"""The version of the package; nothing else says it, and it is known where the package is not installed too."""

__version__ = "0.1.0"
