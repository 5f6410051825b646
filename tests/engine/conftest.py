import sys
from pathlib import Path

# The tiny models and the plain comparisons live with the parity tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
