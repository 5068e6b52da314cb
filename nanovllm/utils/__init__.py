"""Helpers without a view of the engine. `FlexibleArgumentParser` is here because vLLM's scripts import it from here."""

from nanovllm.utils.argparse_utils import FlexibleArgumentParser as FlexibleArgumentParser
