"""Measures the engine: `nanovllm bench`, or `bench.py` in a checkout.

- `settings`: what to run, from the command line and the device
- `workloads`: the requests, drawn from a seed
- `offline`: runs workloads and makes the report
- `report`: the entries of the report, and the same as text
- `traffic`: the bytes that decoding has to read
- `peers`: the figures of other engines
- `machine`: device, versions, copy bandwidth
- `transformers_comparison`: the same work in transformers
- `logging_overhead`: what logging adds to decoding
- `decode_latency`: a separate benchmark, of the time between tokens
"""
