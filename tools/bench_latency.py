"""Runs `python -m nanovllm.benchmarks.decode_latency`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.benchmarks.decode_latency import main

if __name__ == "__main__":
    main()
