"""The version of the distribution, in this one place: the build reads it here."""

__version__ = "0.1.0"
