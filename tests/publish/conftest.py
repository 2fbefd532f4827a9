import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "interop"))  # its networks are small enough for these tests too
