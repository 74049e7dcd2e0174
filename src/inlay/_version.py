"""The version of inlay, in the one place that the build, the package and the adapter files read."""

__version__ = "0.1.0"
