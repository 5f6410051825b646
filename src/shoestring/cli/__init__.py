"""The command line: one file per command; each parses, calls one function of the library, and prints."""

from shoestring.cli.app import main, run

__all__ = ["main", "run"]
