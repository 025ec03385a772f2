"""`python -m flashrt`, the same as the console script."""

from flashrt.cli import main

main()
