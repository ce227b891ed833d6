"""Benchmarks, run from a checkout: `python -m benchmarks.ops`, `python -m benchmarks.gpu`."""

import sys
import types
from pathlib import Path

try:
    import fastdino  # noqa: F401
except ImportError:
    # a machine with torch and triton alone: the operations and the networks' shapes need no more
    bare = types.ModuleType("fastdino")
    bare.__path__ = [str(Path(__file__).parent.parent / "fastdino")]
    sys.modules["fastdino"] = bare
