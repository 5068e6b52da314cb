"""Measures the engine: `nanovllm bench`, or `bench.py` in a checkout.

Offline, all requests at once:

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

Online, requests that arrive over time (`--workload online`):

- `online_settings`: what to run, from the command line and the device
- `arrivals`: the requests and when each arrives, drawn from a seed
- `online`: sends the requests of one run and measures each
- `online_measurement`: warm-up, then a run for each rate and seed, on any engine
- `online_summary`: percentiles, goodput, medians over runs, and the tables
- `online_run`: chooses the engines and makes the report
- `openai_client`: a server as the engine
- `vllm_comparison`: vLLM as the engine, in a process of its own
"""
