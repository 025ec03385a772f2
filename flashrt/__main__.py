"""`python -m flashrt`, the same as the console script."""

import os
import sys

# -m puts the current directory first on the path of imports: a json.py beside a checkpoint is not to be executed.
try:
    current = os.getcwd()
except FileNotFoundError:  # the folder was removed
    current = ""
sys.path[:] = [entry for entry in sys.path if entry not in ("", current)]

from flashrt.cli import main  # noqa: E402

main()
