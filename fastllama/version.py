"""The version of the package, for what has to know it below the public names."""

__version__ = "0.1.0"
