"""`python -m flashrt`, the same as the console script."""

import os
import sys

# -m puts the current directory first on the path of imports: a json.py beside a checkpoint is not to be executed.
sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]

from flashrt.cli import main  # noqa: E402

main()
