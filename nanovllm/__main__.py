"""`python -m nanovllm`: the same as the command `nanovllm`."""

import sys

from nanovllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
