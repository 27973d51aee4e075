"""`python -m ldrld.cli`."""

from ldrld.cli import main

main()
