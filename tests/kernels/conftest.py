"""Puts this folder on the import path, for the helpers the kernel tests and benchmarks share (`kernel_caches` and others)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
