"""The one place that holds the version. The build reads it as text, so nothing may be imported or computed here."""

__version__ = "0.1.0"
