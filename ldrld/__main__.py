"""`python -m ldrld` is the `ldrld` command."""
from ldrld.cli import main

main()
