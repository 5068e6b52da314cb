"""Measures the engine: a thin script over `nanovllm bench`. `python bench.py --help` lists the options."""

import sys

from nanovllm.cli.bench import main
from nanovllm.cli.main import without_broken_pipe

if __name__ == "__main__":
    sys.exit(without_broken_pipe(lambda: main(sys.argv[1:], prog="bench.py")))
