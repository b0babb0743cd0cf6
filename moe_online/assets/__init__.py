"""The trained checkpoint that ships with the library, and the script that trains it.

`PYTHON_MOE_7M` is what `moe_online.models.load` takes.
"""

from pathlib import Path

PYTHON_MOE_7M = Path(__file__).parent / "python-moe-7m"  # a byte-level model of Python source, 7 M parameters
HELDOUT_TEXT = PYTHON_MOE_7M / "heldout.txt"  # files that it was not trained on
