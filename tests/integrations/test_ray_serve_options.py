"""The arguments of build_app, and the deployment that they make. No cluster runs."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.errors import InvalidArgumentError, NanoVLLMError, UnknownArgumentError
from nanovllm.integrations.ray.serve import build_app


def deployment_of(**args: Any) -> Any:
    return build_app({"model": "tiny", **args})._bound_deployment


def test_a_replica_asks_for_the_gpus_of_its_engines() -> None:
    assert deployment_of(device="cpu").ray_actor_options == {"num_cpus": 1}
    assert deployment_of().ray_actor_options == {"num_cpus": 1, "num_gpus": 1}
    both = deployment_of(tensor_parallel_size=2, data_parallel_size="2", ray_actor_options='{"num_cpus": 8}')
    assert both.ray_actor_options == {"num_cpus": 8, "num_gpus": 4}
    assert deployment_of(ray_actor_options={"num_gpus": 0.5}).ray_actor_options == {"num_cpus": 1, "num_gpus": 0.5}


def test_requests_wait_in_the_engine_and_more_of_them_start_replicas() -> None:
    deployment = deployment_of(num_replicas="auto", max_num_seqs="64", autoscaling_config={"max_replicas": 5})
    assert deployment._deployment_config.autoscaling_config.target_ongoing_requests == 64
    assert deployment._deployment_config.autoscaling_config.max_replicas == 5
    assert deployment.max_ongoing_requests > 10**6
    given = deployment_of(autoscaling_config={"target_ongoing_requests": 3}, max_ongoing_requests=7)
    assert given._deployment_config.autoscaling_config.target_ongoing_requests == 3
    assert given.max_ongoing_requests == 7
    assert deployment_of(num_replicas="auto")._deployment_config.autoscaling_config.target_ongoing_requests == 512


def test_running_requests_have_the_time_to_end() -> None:
    deployment = deployment_of(drain_timeout=100, num_replicas="3", name="tiny")
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 100
    assert (deployment.num_replicas, deployment.name) == (3, "tiny")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            {"max_num_seq": 8},
            UnknownArgumentError,
            "build_app has no argument 'max_num_seq'. Did you mean 'max_num_seqs'?",
        ),
        ({"num_replica": 8}, UnknownArgumentError, "Did you mean 'num_replicas'?"),
        ({"max_num_seqs": 0}, NanoVLLMError, "build_app: argument --max-num-seqs: '0' is not an integer ≥ 1"),
        ({"max_num_seqs": "9" * 9999}, NanoVLLMError, "999... is not an integer ≥ 1"),
        ({"port": 80}, InvalidArgumentError, "port=80 is not allowed: it must be left out. Ray Serve listens"),
        ({"enable_auto_tool_choice": True}, InvalidArgumentError, "tool_call_parser=None is not allowed"),
    ],
)
def test_a_mistake_in_an_argument(args: dict[str, Any], error: type[NanoVLLMError], message: str) -> None:
    with pytest.raises(error) as caught:
        deployment_of(**args)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
