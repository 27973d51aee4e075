"""The command line: `ldrld --help`. Each command has its own file."""

import codecs
import sys
import warnings

from ldrld.cli.app import app  # first: without typer, it says what to install

# in the order of --help
from ldrld.cli import reproduce, run, distill, status, verify, compare, tune, pack, teachers, bench, data  # noqa: F401

__all__ = ["app", "main"]

ASCII = {
    "→": "->",
    "±": "+-",
    "×": "x",
    "−": "-",
    "–": "-",
    "…": "...",
    "≥": ">=",
    "≤": "<=",
    "α": "alpha",
    "β": "beta",
    "“": '"',
    "”": '"',
    "·": ".",
}


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """ASCII replacement for a character that the terminal cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def main() -> None:
    """Entry point of the `ldrld` command."""
    codecs.register_error("ldrld", in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ldrld")
    warnings.filterwarnings("ignore", message="left out: ")  # invalid records, which the commands list themselves
    app()
