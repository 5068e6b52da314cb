"""Strict loading: each fault of a checkpoint is named, and nothing is filled twice or left out."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm.errors import ModelLoadError
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.layers.context import LayerContext
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import GatedParallelLinear
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.parameter import WeightPart, empty_parameter
from nanovllm.utils.loader import (
    check_weights,
    checkpoint_files,
    load_dummy_weights,
    load_weights,
    weight_plan,
)

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


class Small(nn.Module):
    """A fused product and a table, under the names that checkpoints use; and a buffer, which is computed."""

    def __init__(self, parallel: TensorParallel | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        context = LayerContext(parallel=parallel or TensorParallel(), dtype=dtype)
        self.gate_up_proj = GatedParallelLinear(
            context, 4, {"gate_proj": 6, "up_proj": 6}, bias=False, act=silu_and_mul
        )
        self.embed_tokens = VocabParallelEmbedding(context, 9, 4)
        self.register_buffer("table", torch.arange(3), persistent=False)


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "gate_proj.weight": torch.randn(6, 4, generator=generator),
        "up_proj.weight": torch.randn(6, 4, generator=generator),
        "embed_tokens.weight": torch.randn(9, 4, generator=generator),
    }


def write(folder: Path, content: Tensors, file: str = "model.safetensors") -> Path:
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / file)
    return folder


def test_every_row_comes_from_its_place(tmp_path: Path) -> None:
    model, content = Small(), tensors()
    report = load_weights(model, write(tmp_path, content), CPU)
    assert torch.equal(model.gate_up_proj.weight, torch.cat([content["gate_proj.weight"], content["up_proj.weight"]]))
    assert torch.equal(model.embed_tokens.weight, content["embed_tokens.weight"])
    assert torch.equal(model.table, torch.arange(3)), "buffers are computed, and loading leaves them alone"
    assert (report.num_tensors, report.num_bytes, report.num_files) == (2, 4 * (12 * 4 + 9 * 4), 1)
    assert all(not parameter.requires_grad for parameter in model.parameters())


def test_ranks_read_their_own_part_and_pad_with_zeros(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, content)
    ranks = [Small(TensorParallel(rank, 2)) for rank in range(2)]
    for model in ranks:
        load_weights(model, tmp_path, CPU)
    gate = torch.cat([model.gate_up_proj.weight[:3] for model in ranks])
    up = torch.cat([model.gate_up_proj.weight[3:] for model in ranks])
    table = torch.cat([model.embed_tokens.weight for model in ranks])
    assert torch.equal(gate, content["gate_proj.weight"])
    assert torch.equal(up, content["up_proj.weight"])
    assert torch.equal(table[:9], content["embed_tokens.weight"])
    assert torch.equal(table[9:], torch.zeros(1, 4))


def test_values_are_converted_to_the_models_dtype(tmp_path: Path) -> None:
    model, content = Small(dtype=torch.bfloat16), tensors()
    load_weights(model, write(tmp_path, content), CPU)
    assert torch.equal(model.embed_tokens.weight, content["embed_tokens.weight"].bfloat16())


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("up_proj.weight"), r"missing from the checkpoint: up_proj\.weight"),
        (lambda content: content | {"head.weight": torch.zeros(1)}, r"unknown to the model: head\.weight"),
        (
            lambda content: content | {"gate_proj.weight": torch.zeros(6, 5)},
            r"of another form: gate_proj\.weight has shape \[6, 5\] and needs \[6, 4\]",
        ),
        (
            lambda content: content | {"gate_proj.weight": torch.zeros(6, 4, dtype=torch.int8)},
            r"gate_proj\.weight has dtype I8 and needs one of \('BF16', 'F16', 'F32', 'F64'\)",
        ),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_faults_are_named_before_anything_is_allocated(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    model = Small()
    with pytest.raises(ModelLoadError, match=message):
        load_weights(model, write(tmp_path, change(tensors())), CPU)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_all_faults_are_in_one_message(tmp_path: Path) -> None:
    content = without("up_proj.weight")(tensors()) | {f"extra.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ModelLoadError, match=r"missing .* up_proj\.weight; unknown .* extra\.0, .* and 2 more"):
        load_weights(Small(), write(tmp_path, content), CPU)


def test_a_redundant_tensor_may_be_there_or_not(tmp_path: Path) -> None:
    redundant = frozenset({"lm_head.weight"})
    load_weights(Small(), write(tmp_path, tensors()), CPU, redundant)
    write(tmp_path, tensors() | {"lm_head.weight": torch.zeros(9, 4)})
    load_weights(Small(), tmp_path, CPU, redundant)
    with pytest.raises(ModelLoadError, match=r"unknown to the model: lm_head\.weight"):
        load_weights(Small(), tmp_path, CPU)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tensors(), "a.safetensors")
    write(tmp_path, {"up_proj.weight": torch.zeros(6, 4)}, "b.safetensors")
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight is in two files: a\.safetensors and b\.safetensors"):
        load_weights(Small(), tmp_path, CPU)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, {"embed_tokens.weight": content.pop("embed_tokens.weight")}, "one.safetensors")
    write(tmp_path, content, "two.safetensors")
    write(tmp_path, tensors(), "consolidated.safetensors")  # the same again, as some publishers add
    write_index(tmp_path, {"gate_proj.weight": "two.safetensors", "embed_tokens.weight": "one.safetensors"})
    assert [path.name for path in checkpoint_files(tmp_path)] == ["one.safetensors", "two.safetensors"]
    assert load_weights(Small(), tmp_path, CPU).num_files == 2


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no \*\.safetensors"):
        load_weights(Small(), tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelLoadError, match="cannot be read as safetensors"):
        load_weights(Small(), tmp_path, CPU)
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, {"gate_proj.weight": "absent.safetensors"})
    with pytest.raises(ModelLoadError, match=r"names files that are not there: absent\.safetensors"):
        load_weights(Small(), tmp_path, CPU)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object, it holds list"):
        load_weights(Small(), tmp_path, CPU)


@pytest.mark.parametrize(
    "beside",
    [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "._model.safetensors",
    ],
)
def test_the_whole_file_is_read_whatever_lies_beside_it(beside: str, tmp_path: Path) -> None:
    write(tmp_path, tensors())
    write(tmp_path, {"another.weight": torch.zeros(2)}, beside)
    assert load_weights(Small(), tmp_path, CPU).num_files == 1


@pytest.mark.parametrize("content", ['{"weight_map": {"gate_proj.weight": "gone.safetensors"}}', "no JSON", "[]"])
def test_the_whole_file_goes_before_an_index_left_from_earlier(content: str, tmp_path: Path) -> None:
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert load_weights(Small(), tmp_path, CPU).num_files == 1


def test_shards_without_an_index_go_before_other_files(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, {"up_proj.weight": content.pop("up_proj.weight")}, "model-00001-of-00002.safetensors")
    write(tmp_path, content, "model-00002-of-00002.safetensors")
    write(tmp_path, tensors(), "consolidated.safetensors")
    assert load_weights(Small(), tmp_path, CPU).num_files == 2
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"missing from the checkpoint: up_proj\.weight"):
        load_weights(Small(), tmp_path, CPU)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "in PyTorch's format only: convert them .*save_pretrained"),
        ("model-q4.gguf", "GGUF files, which are not supported"),
        ("adapter_config.json", "an adapter, not a model: merge it"),
        ("README.md", "no \\*\\.safetensors files"),
    ],
)
def test_a_folder_without_safetensors_is_told_what_it_has(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ModelLoadError, match=message):
        load_weights(Small(), tmp_path, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:outside",
        "sub/model.safetensors",
        *("..", ".", "", "a\0b", 5, None, True, ["a.safetensors"], {"a": "b"}),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, tensors(), "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"up_proj.weight": name}}))
    with pytest.raises(ModelLoadError, match=r"the file of up_proj\.weight is .* a file in the same folder\."):
        load_weights(Small(), folder, CPU)


def test_a_file_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    """As in the caches of huggingface_hub, where files are links to ../../blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs, tensors(), "0123")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, {"up_proj.weight": "model-00001-of-00001.safetensors"})
    assert load_weights(Small(), snapshot, CPU).num_files == 1


@pytest.mark.parametrize("weight_map", [{}, [], None, "model.safetensors", 5])
def test_an_index_without_files_is_refused(weight_map: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match="is not an index of weights: it has no weight_map"):
        load_weights(Small(), tmp_path, CPU)


def test_an_index_that_is_nested_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(ModelLoadError, match="nested too deep"):
        load_weights(Small(), tmp_path, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    for make, unmake in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
        make(tmp_path / name)
        with pytest.raises(ModelLoadError, match=r"it is no regular file\."):
            load_weights(Small(), tmp_path, CPU)
        unmake(tmp_path / name)


def test_the_rotary_buffer_of_older_files_is_left_alone(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load_weights(Small(), write(tmp_path, tensors() | buffer), CPU)


def test_weights_in_float64_are_converted(tmp_path: Path) -> None:
    model, content = Small(), tensors()
    load_weights(model, write(tmp_path, {name: tensor.double() for name, tensor in content.items()}), CPU)
    assert torch.equal(model.embed_tokens.weight, content["embed_tokens.weight"])


def test_a_check_reads_no_weights_and_finds_what_loading_would(tmp_path: Path) -> None:
    model = Small()
    check_weights(model, write(tmp_path, tensors()))
    write(tmp_path, without("up_proj.weight")(tensors()))
    with pytest.raises(ModelLoadError, match=r"missing from the checkpoint: up_proj\.weight"):
        check_weights(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_broken_file_is_refused_or_loaded_and_nothing_else(tmp_path: Path) -> None:
    """Cut short anywhere, or with any bytes of its header changed."""
    path = write(tmp_path, tensors()) / "model.safetensors"
    whole = path.read_bytes()
    (header_len,) = struct.unpack("<Q", whole[:8])
    chance = random.Random(0)
    cut = [whole[: chance.randrange(len(whole))] for _ in range(50)]
    changed = []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(8 + header_len)] = chance.randrange(256)
        changed.append(bytes(content))
    for content in [*cut, *changed, b"", whole + b"more"]:
        path.write_bytes(content)
        with suppress(ModelLoadError):
            load_weights(Small(), tmp_path, CPU)
            assert len(content) == len(whole)


def test_a_header_that_lies_about_offsets_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, tensors()) / "model.safetensors"
    whole = path.read_bytes()
    (header_len,) = struct.unpack("<Q", whole[:8])
    for offsets in ([0, 10**12], [-4, 92], [92, 0], [0, 95], [2**63, 2**64]):
        header = json.loads(whole[8 : 8 + header_len])
        header["gate_proj.weight"]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + header_len :])
        with pytest.raises(ModelLoadError, match="cannot be read as safetensors"):
            load_weights(Small(), tmp_path, CPU)


class Planned(nn.Module):
    """One parameter of 4 rows and whatever plan a test gives it."""

    def __init__(self, parts: Sequence[WeightPart]) -> None:
        super().__init__()
        self.weight = empty_parameter(4, 2, dtype=torch.float32)
        self.parts = parts

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {f"{prefix}.weight": self.parts}


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [WeightPart("a", (3, 2))],
        [WeightPart("a", (2, 2)), WeightPart("b", (2, 2), row=1)],
        [WeightPart("a", (2, 2)), WeightPart("b", (2, 2), row=3)],
        [WeightPart("a", (4, 3))],
    ],
    ids=["none", "too few rows", "overlap", "gap", "too wide"],
)
def test_a_plan_that_does_not_fill_a_parameter_exactly_once_is_refused(parts: Sequence[WeightPart]) -> None:
    with pytest.raises(ModelLoadError, match=r"^layer\.weight"):
        weight_plan(nn.ModuleDict({"layer": Planned(parts)}))


def test_a_parameter_that_no_layer_plans_for_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"^weight: weight_parts fill 0 rows of 3"):
        weight_plan(nn.Linear(2, 3))


def test_dummy_weights_are_those_of_their_seed() -> None:
    def loaded(seed: int) -> Small:
        model = Small(dtype=torch.bfloat16)
        assert load_dummy_weights(model, CPU, seed).num_tensors == 2
        return model

    first, again, other = loaded(1), loaded(1), loaded(2)
    assert torch.equal(first.embed_tokens.weight, again.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    assert torch.equal(first.table, torch.arange(3))


def test_the_file_is_left_as_it_was(tmp_path: Path) -> None:
    """Parameters are copies: writing to one does not reach the mapped file."""
    content = tensors()
    write(tmp_path, content)
    model = Small()
    load_weights(model, tmp_path, CPU)
    model.embed_tokens.weight.zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["embed_tokens.weight"], content["embed_tokens.weight"])


def test_loading_ends_between_two_tensors_where_the_check_raises(tmp_path: Path) -> None:
    """So that a rank does not go on loading for minutes after the engine gave up."""
    looks: list[bool] = []
    model = Small()

    def check() -> None:
        looks.append(model.gate_up_proj.weight.is_meta)
        if len(looks) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        load_weights(model, write(tmp_path, tensors()), CPU, check=check)
    assert looks == [False, False]
    assert torch.equal(model.gate_up_proj.weight[:6], tensors()["gate_proj.weight"])
    load_weights(model, tmp_path, CPU, check=lambda: looks.append(True))
    assert len(looks) == 2 + 4  # gate, up, the table, and its padding, which is none
