"""Data parallelism: several engines of one model behind one interface. `nanovllm serve --data-parallel-size` uses it.

router.py     Router: which replica gets a request, by cached prefix and queue length. Pure; the simulation of
              tools/simulate_cluster.py runs the same object
placement.py  which GPUs, or how many cores, each replica gets
replica.py    Replica: an engine in a process of its own, which is started again when it dies
engines.py    DataParallelLLM: what the server needs of an AsyncLLM, over all replicas
"""
