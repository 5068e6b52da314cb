"""Environment variables: defaults, values, and errors that name variable, value and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanovllm.errors import InvalidArgumentError
from nanovllm.utils import env

DEFAULTS = [
    ("NANOVLLM_LOG_LEVEL", env.log_level, "INFO"),
    ("NANOVLLM_CONFIGURE_LOGGING", env.configure_logging, True),
    ("NANOVLLM_LOG_DECODE_INTERVAL", env.log_decode_interval, 10),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, None),
    ("NANOVLLM_OVERLAP", env.overlap, True),
    ("NANOVLLM_GRAMMAR_SECONDS", env.grammar_seconds, 10.0),
    ("NANOVLLM_ENGINE_PROCESS", env.engine_process, None),
    ("NANOVLLM_GRAMMAR_LENGTH", env.grammar_length, 2**18),
    ("NANOVLLM_GRAMMAR_MEMORY_GB", env.grammar_memory_gb, 2.0),
    ("NANOVLLM_LOG_FORMAT", env.log_format, "text"),
    ("NANOVLLM_LOG_FILE", env.log_file, None),
    ("NANOVLLM_LOG_FILE_FORMAT", env.log_file_format, None),
    ("NANOVLLM_TRACE_MAX_MB", env.trace_max_mb, 1000),
    ("NANOVLLM_LOG_PROMPTS", env.log_prompts, False),
    ("NANOVLLM_LOG_STATS_INTERVAL", env.log_stats_interval, 10.0),
    ("NANOVLLM_LOG_SLOW_SECONDS", env.log_slow_seconds, 5.0),
    ("NANOVLLM_TRACE_FILE", env.trace_file, None),
    ("NANOVLLM_TRACE_FUNCTION", env.trace_function, None),
    ("NO_COLOR", env.no_color, False),
    ("NANOVLLM_API_KEY", env.api_key, None),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", env.otlp_endpoint, None),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", env.otlp_traces_endpoint, None),
    ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", env.otlp_metrics_endpoint, None),
    ("OMP_NUM_THREADS", env.omp_num_threads, False),
    ("MKL_NUM_THREADS", env.mkl_num_threads, False),
    ("OMP_WAIT_POLICY", env.omp_wait_policy, False),
    ("GOMP_SPINCOUNT", env.gomp_spincount, False),
    ("NCCL_SOCKET_IFNAME", env.nccl_socket_ifname, False),
]

VALUES = [
    ("NANOVLLM_LOG_LEVEL", env.log_level, "INFO,scheduler=DEBUG", "INFO,scheduler=DEBUG"),
    ("NANOVLLM_CONFIGURE_LOGGING", env.configure_logging, "0", False),
    ("NANOVLLM_CONFIGURE_LOGGING", env.configure_logging, "1", True),
    ("NANOVLLM_OVERLAP", env.overlap, "0", False),
    ("NANOVLLM_LOG_DECODE_INTERVAL", env.log_decode_interval, " 25 ", 25),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "0.5", 0.5),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "2", 2.0),
    ("NANOVLLM_LOG_FORMAT", env.log_format, "json", "json"),
    ("NANOVLLM_API_KEY", env.api_key, "a key", "a key"),
    ("NANOVLLM_ENGINE_PROCESS", env.engine_process, "1", True),
    ("NANOVLLM_LOG_FILE", env.log_file, "logs/run.jsonl", Path("logs/run.jsonl")),
    ("NANOVLLM_LOG_FILE_FORMAT", env.log_file_format, "json", "json"),
    ("NANOVLLM_TRACE_MAX_MB", env.trace_max_mb, "5", 5),
    ("NANOVLLM_LOG_PROMPTS", env.log_prompts, "1", True),
    ("NANOVLLM_LOG_STATS_INTERVAL", env.log_stats_interval, "0.5", 0.5),
    ("NANOVLLM_LOG_SLOW_SECONDS", env.log_slow_seconds, "0.5", 0.5),
    ("NANOVLLM_TRACE_FILE", env.trace_file, "trace.json", Path("trace.json")),
    ("NANOVLLM_TRACE_FUNCTION", env.trace_function, "1", Path("nanovllm_trace_rank0.txt")),
    ("NANOVLLM_TRACE_FUNCTION", env.trace_function, "0", None),
    ("NANOVLLM_TRACE_FUNCTION", env.trace_function, "calls.txt", Path("calls.txt")),
    ("NO_COLOR", env.no_color, "0", True),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", env.otlp_endpoint, "http://localhost:4318", "http://localhost:4318"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", env.otlp_traces_endpoint, "http://a/v1/traces", "http://a/v1/traces"),
    ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", env.otlp_metrics_endpoint, "http://a/v1/metrics", "http://a/v1/metrics"),
]

BAD_VALUES = [
    ("NANOVLLM_OVERLAP", env.overlap, "off"),
    ("NANOVLLM_GRAMMAR_SECONDS", env.grammar_seconds, "0"),
    ("NANOVLLM_GRAMMAR_LENGTH", env.grammar_length, "1e6"),
    ("NANOVLLM_GRAMMAR_MEMORY_GB", env.grammar_memory_gb, "all"),
    ("NANOVLLM_CONFIGURE_LOGGING", env.configure_logging, "maybe"),
    ("NANOVLLM_LOG_DECODE_INTERVAL", env.log_decode_interval, "0"),
    ("NANOVLLM_LOG_DECODE_INTERVAL", env.log_decode_interval, "-3"),
    ("NANOVLLM_LOG_DECODE_INTERVAL", env.log_decode_interval, "2.5"),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "0"),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "-1"),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "nan"),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "inf"),
    ("NANOVLLM_CPU_KVCACHE_GB", env.cpu_kvcache_gb, "4GB"),
    ("NANOVLLM_LOG_FORMAT", env.log_format, "JSON"),
    ("NANOVLLM_LOG_FORMAT", env.log_format, "xml"),
    ("NANOVLLM_LOG_FILE_FORMAT", env.log_file_format, "xml"),
    ("NANOVLLM_TRACE_MAX_MB", env.trace_max_mb, "0"),
    ("NANOVLLM_LOG_PROMPTS", env.log_prompts, "yes"),
    ("NANOVLLM_LOG_STATS_INTERVAL", env.log_stats_interval, "0"),
    ("NANOVLLM_LOG_STATS_INTERVAL", env.log_stats_interval, "nan"),
    ("NANOVLLM_LOG_STATS_INTERVAL", env.log_stats_interval, "10s"),
    ("NANOVLLM_LOG_SLOW_SECONDS", env.log_slow_seconds, "0"),
]


def test_every_variable_is_declared_once_and_tested_here():
    names = [variable.name for variable in env.VARIABLES]
    # Empty, CUDA_VISIBLE_DEVICES means no GPU: the tests of placement have it.
    assert sorted(names) == sorted({"CUDA_VISIBLE_DEVICES", *(name for name, _, _ in DEFAULTS)})
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("variable", "read", "default"), DEFAULTS)
def test_unset_and_empty_give_the_default(monkeypatch, variable, read, default):
    monkeypatch.delenv(variable, raising=False)
    assert read() == default
    monkeypatch.setenv(variable, "  ")
    assert read() == default


@pytest.mark.parametrize(("variable", "read", "text", "value"), VALUES)
def test_values_are_typed_and_read_at_the_call(monkeypatch, variable, read, text, value):
    monkeypatch.setenv(variable, text)
    result = read()
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(("variable", "read", "text"), BAD_VALUES)
def test_a_bad_value_names_variable_value_and_what_is_allowed(monkeypatch, variable, read, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(InvalidArgumentError) as caught:
        read()
    assert caught.value.field == variable
    assert caught.value.value == text
    assert repr(text) in str(caught.value)
    assert caught.value.allowed in str(caught.value)


def test_the_variables_in_force_hide_what_may_be_a_secret(monkeypatch):
    secret = env.Variable("NANOVLLM_SOME_KEY", env.SWITCH, False, "a key")
    monkeypatch.setattr(env, "VARIABLES", (env.log_level, env.overlap, secret))
    monkeypatch.setenv("NANOVLLM_SOME_KEY", "abc")
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", " DEBUG ")
    monkeypatch.delenv("NANOVLLM_OVERLAP", raising=False)
    assert env.variables_in_force() == {"NANOVLLM_LOG_LEVEL": "DEBUG", "NANOVLLM_SOME_KEY": "set"}


def test_no_other_file_of_the_package_reads_the_environment():
    package = Path(env.__file__).parents[1]
    readers = {file.name for file in package.rglob("*.py") if "os.environ" in file.read_text("utf-8")}
    readers |= {file.name for file in package.rglob("*.py") if "getenv(" in file.read_text("utf-8")}
    assert readers == {"env.py"}


def test_nccl_listens_on_the_loopback_interface_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with env.nccl_stays_on_this_machine():
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    with env.nccl_stays_on_this_machine():
        assert os.environ["NCCL_SOCKET_IFNAME"] == "eth1"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth1"
