"""The command line: `nanovllm`, or `python -m nanovllm`. One file for each subcommand; `main` lists them."""
