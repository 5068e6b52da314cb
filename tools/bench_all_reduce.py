"""Times the all-reduce of the ranks by size: the one-shot kernel beside NCCL, on several GPUs of one host.

    python tools/bench_all_reduce.py --ranks 8 [--kb 8 32 128 512 1024 2048]

Figures are microseconds of a call among many back to back in a CUDA graph, bf16, the median over replays on rank 0.
`--device cpu` times gloo between processes instead, without a graph.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.config import EngineConfig
from nanovllm.distributed.process_group import join_ranks, leave_ranks, open_server, open_store
from nanovllm.layers.parallel import TensorParallel

CALLS, REPLAYS = 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kb", type=int, nargs="+", default=[8, 32, 128, 512, 1024, 2048])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
        sys.exit(f"--ranks {args.ranks} needs as many GPUs: this machine has {torch.cuda.device_count()}.")
    config = EngineConfig("tiny", tensor_parallel_size=args.ranks, device=args.device)
    server = open_server(config)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=run_rank, args=(rank, config, server.port, args.kb), daemon=True)
        for rank in range(1, args.ranks)
    ]
    for process in others:
        process.start()
    run_rank(0, config, server.port, args.kb)
    for process in others:
        process.join()


def run_rank(rank: int, config: EngineConfig, port: int, sizes: list[int]) -> None:
    """Joins the other ranks and makes the same calls as they do. Rank 0 prints the times."""
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    parallel = join_ranks(open_store(config, port), rank, config, device)
    tensors = [torch.zeros(kb * 512, dtype=torch.bfloat16, device=device) for kb in sizes]
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{parallel.size} ranks, {name}, microseconds")
        print(f"{'KB':12}" + "".join(f"{kb:>10}" for kb in sizes))
    for name, all_reduce in methods(parallel).items():
        times = [time_calls(all_reduce, tensor) for tensor in tensors]
        if rank == 0:
            print(f"{name:12}" + "".join(f"{each:>10.1f}" for each in times))
    leave_ranks(parallel)


def methods(parallel: TensorParallel) -> dict[str, Callable[[torch.Tensor], object]]:
    group, one_shot = parallel.group, parallel.one_shot
    assert group is not None
    library = type(group).__name__.removeprefix("ProcessGroup")
    found: dict[str, Callable[[torch.Tensor], object]] = {library: lambda tensor: group.allreduce([tensor]).wait()}
    return found if one_shot is None else {"one shot": one_shot, **found}


def time_calls(all_reduce: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> float:
    """Returns the microseconds of a call."""
    if tensor.device.type == "cpu":
        started = time.perf_counter()
        for _ in range(CALLS):
            all_reduce(tensor)
        return (time.perf_counter() - started) * 1e6 / CALLS
    all_reduce(tensor)  # compiles the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            all_reduce(tensor)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return median(times)


if __name__ == "__main__":
    main()
