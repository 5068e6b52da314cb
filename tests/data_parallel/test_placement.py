"""place_replicas: GPUs as CUDA_VISIBLE_DEVICES names them, and cores in equal shares."""

from __future__ import annotations

import pytest

from nanovllm import InvalidArgumentError
from nanovllm.config import EngineConfig
from nanovllm.data_parallel import placement
from nanovllm.data_parallel.placement import place_replicas


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def gpus_of(config: EngineConfig, num_replicas: int) -> list[str]:
    placements = place_replicas(config, num_replicas)
    assert {(each.config.device, each.config.engine_process) for each in placements} == {("cuda", True)}
    return [each.variables["CUDA_VISIBLE_DEVICES"] for each in placements]


@pytest.mark.parametrize(
    ("visible", "device", "size", "expected"),
    [
        (None, "cuda", 1, ["0", "1"]),
        (None, "cuda:2", 2, ["2,3", "4,5"]),
        ("3,1,2", "cuda", 1, ["3", "1"]),
        ("GPU-8f, GPU-2a,MIG-77/1/0", "cuda:1", 1, ["GPU-2a", "MIG-77/1/0"]),
        ("7,6,5,4", "cuda", 2, ["7,6", "5,4"]),
    ],
)
def test_each_replica_sees_its_own_gpus_as_they_were_given(
    visible: str | None, device: str, size: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of(EngineConfig("tiny", device=device, tensor_parallel_size=size), 2) == expected


@pytest.mark.parametrize(("visible", "size", "most"), [("0", 1, 1), ("0,1,2", 2, 1), ("", 1, 0), ("0,-1,1", 1, 1)])
def test_too_few_gpus_are_an_error(visible: str, size: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = EngineConfig("tiny", device="cuda", tensor_parallel_size=size)
    with pytest.raises(InvalidArgumentError, match=rf"data_parallel_size=2 .* at most {most}: CUDA_VISIBLE_DEVICES"):
        place_replicas(config, 2)


def test_auto_is_the_gpu_where_one_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "has_gpu", lambda: True)
    assert gpus_of(EngineConfig("tiny"), 2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert {each.config.device for each in place_replicas(EngineConfig("tiny"), 2)} == {"auto"}


@pytest.mark.parametrize(("replicas", "threads"), [(1, "8"), (2, "4"), (3, "2"), (9, "1")])
def test_cores_are_shared_out(replicas: int, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.env, "num_usable_cores", lambda: 8)
    placements = place_replicas(EngineConfig("tiny", device="cpu", block_size=32), replicas)
    assert [each.variables for each in placements] == [{"OMP_NUM_THREADS": threads}] * replicas
    assert placements[0].config.kvcache_block_size == 32


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_that_was_set_is_kept(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "3")
    assert place_replicas(EngineConfig("tiny", device="cpu"), 2)[0].variables == {}


def test_each_replica_writes_traces_to_files_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_TRACE_FILE", "run/trace.json")
    monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", "1")
    files = [
        (each.variables["NANOVLLM_TRACE_FILE"], each.variables["NANOVLLM_TRACE_FUNCTION"])
        for each in place_replicas(EngineConfig("tiny", device="cpu"), 2)
    ]
    assert files == [
        (f"run/trace.json.replica{index}", f"nanovllm_trace_rank0.txt.replica{index}") for index in range(2)
    ]


def test_an_engine_in_a_thread_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="engine_process=False"):
        place_replicas(EngineConfig("tiny", device="cpu", engine_process=False), 2)
