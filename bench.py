"""Measures the engine: a thin script over `nanovllm bench`. `python bench.py --help` lists the options."""

import sys

from nanovllm.cli.bench import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="bench.py"))
