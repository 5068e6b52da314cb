"""Quantised weights: how checkpoints store them, how the engine keeps them, and how it multiplies by them.

A format (`checkpoint_fp8`, `compressed_tensors`, `awq`, `gptq`) says which tensors a checkpoint has for a matrix and
reads values and scales from them. A linear method (`fp8`, `int8`, `int4`) keeps these in a layer and multiplies by
them; it also makes them from an unquantised weight. `experts` stacks what it keeps for the experts of a mixture.
`registry` chooses both.
"""
