"""The layout: imports point downward, deciding needs no torch, and nothing keeps state in a corner."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanovllm
from tests.processes import ROOT, run_python

FILES = sorted((ROOT / "nanovllm").rglob("*.py"))

# From the public API down: a module may import from its own level and from those after it. A name stands for the
# module, or for the whole package; the entry nearest to a module counts.
LEVELS = [
    ("nanovllm.__main__", "nanovllm.cli"),
    ("nanovllm.integrations",),
    ("nanovllm.server",),
    ("nanovllm.benchmarks",),
    ("nanovllm", "nanovllm.entrypoints", "nanovllm.v1", "nanovllm.engine.async_llm_engine", "nanovllm.report"),
    ("nanovllm.data_parallel",),
    ("nanovllm.llm", "nanovllm.async_llm"),
    ("nanovllm.async_engine",),
    ("nanovllm.streaming",),
    ("nanovllm.generation_log",),
    ("nanovllm.feed",),
    ("nanovllm.engine.llm_engine",),
    ("nanovllm.engine_factory",),
    ("nanovllm.tracing", "nanovllm.diagnostics"),
    ("nanovllm.speculation",),
    ("nanovllm.engine", "nanovllm.distributed"),
    ("nanovllm.runner",),
    ("nanovllm.quantization",),
    ("nanovllm.requests",),
    ("nanovllm.engine.executor", "nanovllm.engine.statistics"),
    ("nanovllm.engine.sequence", "nanovllm.engine.block_manager"),
    ("nanovllm.engine.batch",),
    ("nanovllm.models", "nanovllm.utils.loader"),
    ("nanovllm.experts",),
    ("nanovllm.layers",),
    ("nanovllm.attention",),
    ("nanovllm.kernels",),
    (
        "nanovllm.config",
        "nanovllm.speculative_config",
        "nanovllm.engine_args",
        "nanovllm.compat",
        "nanovllm.inputs",
        "nanovllm.sampling_params",
        "nanovllm.outputs",
        "nanovllm.metrics",
    ),
    ("nanovllm.utils", "nanovllm.logs"),
    ("nanovllm.errors",),
]
TORCH = {"torch", "triton", "transformers", "safetensors", "xgrammar"}
# Deciding needs no torch: the engine but for the model runner, and all that a request goes through before it runs.
WITHOUT_TORCH = ("nanovllm.engine", "nanovllm.speculation", "nanovllm.requests", "nanovllm.tracing", "nanovllm.logs")
WITH_TORCH = {"nanovllm.engine.model_runner"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def level_of(module: str) -> int:
    """The level that the module, or the package nearest above it, is listed at. `nanovllm` is the public API alone."""
    name = module
    while name:
        for level, names in enumerate(LEVELS):
            if name in names and (name != "nanovllm" or module == "nanovllm"):
                return level
        name = name.rpartition(".")[0]
    raise AssertionError(f"{module} has no level: add it to LEVELS")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """Every module of nanovllm that `source` imports, wherever the statement stands and whatever form it has."""
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    loggers = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup_logger"
    }
    for node in ast.walk(tree):
        if id(node) in loggers:
            continue
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # A name is a module where there is one, else something that the base defines.
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found = [node.value]  # what importlib is given
        for name in found:
            if name.split(".")[0] == "nanovllm" and isinstance(node, (ast.stmt, ast.expr)):
                yield name, node


def is_package_name(name: str, node: ast.stmt | ast.expr) -> bool:
    """Whether the node is the text "nanovllm": a logger's name or a prefix, which imports nothing."""
    return isinstance(node, ast.Constant) and name == "nanovllm"


def arrows_up(source: str, module: str, is_package: bool = False) -> list[str]:
    return [
        f"{module}:{node.lineno} imports {name}"
        for name, node in imports(source, module, is_package)
        if level_of(name) < level_of(module) and not is_package_name(name, node)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    path = MODULES[module]
    assert arrows_up(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanovllm.utils.logger", "from nanovllm.config import EngineConfig"),
        ("nanovllm.utils.logger", "import nanovllm"),
        ("nanovllm.utils.logger", "from nanovllm import __version__"),
        ("nanovllm.utils.logger", "from .. import config"),
        ("nanovllm.utils.logger", "from ..engine.batch import ScheduledBatch"),
        ("nanovllm.errors", "from nanovllm.utils import env"),
        ("nanovllm.layers.linear", "def f():\n    import nanovllm.models.qwen3 as q"),
        ("nanovllm.kernels.sample", "if TYPE_CHECKING:\n    from nanovllm.attention.interface import LayerKVCache"),
        ("nanovllm.models.registry", "importlib.import_module('nanovllm.engine.batch')"),
        ("nanovllm.engine.batch", "from nanovllm.llm import LLM"),
    ],
)
def test_an_arrow_up_is_seen_in_every_form(module: str, source: str) -> None:
    assert len(arrows_up(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "nanovllm.engine.batch",
            "from nanovllm import errors\nfrom nanovllm.utils import env\nimport nanovllm.config",
        ),
        ("nanovllm.engine.row_table", "from .sequence import Sequence\nfrom ..outputs import FinishReason"),
        ("nanovllm.utils.logger", "PACKAGE = 'nanovllm'\nimport numpy, torch"),
        ("nanovllm", "from nanovllm.llm import LLM"),
    ],
)
def test_an_arrow_down_or_beside_is_fine(module: str, source: str) -> None:
    assert arrows_up(source, module, is_package=module == "nanovllm") == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types count too."""
    graph = {}
    for module, path in MODULES.items():
        found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        graph[module] = {name for name, node in found if not is_package_name(name, node)} - {module}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle


# Optional packages, and who may import them besides themselves: everything else meets them behind an interface that
# it owns. `engine_factory` puts them together.
OPTIONAL = {
    "nanovllm.diagnostics": {"nanovllm.llm", "nanovllm.async_llm", "nanovllm.engine_factory"},
    "nanovllm.tracing": {"nanovllm.engine_factory"},
    "nanovllm.quantization": {"nanovllm.runner.model_plan"},
    "nanovllm.report": {"nanovllm.cli.report"},
    "nanovllm.data_parallel": {"nanovllm.server.dev", "nanovllm.server.service"},
    "nanovllm.server": {"nanovllm.cli.generate", "nanovllm.cli.serve", "nanovllm.integrations.ray.serve"},
    "nanovllm.integrations": set(),
}


def uses(source: str, module: str, package: str, is_package: bool = False) -> bool:
    names = {name for name, node in imports(source, module, is_package) if not isinstance(node, ast.Constant)}
    return any(name == package or name.startswith(f"{package}.") for name in names)


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_core_does_not_import_an_optional_package(package: str) -> None:
    found = {
        module
        for module, path in MODULES.items()
        if uses(path.read_text(encoding="utf-8"), module, package, path.name == "__init__.py")
    }
    inside = {module for module in found if module == package or module.startswith(f"{package}.")}
    assert found - inside <= OPTIONAL[package]


def test_an_import_of_an_optional_package_is_seen_in_a_function_and_for_types() -> None:
    for source in (
        "def f():\n    from nanovllm.diagnostics.rank import RankDiagnostics",
        "if TYPE_CHECKING:\n    from nanovllm.diagnostics import memory",
        "from nanovllm import diagnostics",
    ):
        assert uses(source, "nanovllm.engine.executor", "nanovllm.diagnostics")
    assert not uses("from nanovllm.engine import executor", "nanovllm.runner.startup", "nanovllm.diagnostics")


# ---- what an import costs


def output_of(script: str) -> str:
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_of_the_package_is_fast_and_brings_no_torch() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import nanovllm; elapsed = time.perf_counter() - start;"
        "nanovllm.SamplingParams; nanovllm.RequestOutput; nanovllm.NanoVLLMError; dir(nanovllm);"
        "assert not {'torch', 'numpy', 'transformers', 'triton'} & set(sys.modules);"
        "print(elapsed)"
    )
    assert any(float(output_of(script)) < 0.3 for _ in range(10))  # the best of ten, on a busy machine


def decides(module: str) -> bool:
    return module.startswith(tuple(f"{package}." for package in WITHOUT_TORCH)) and module not in WITH_TORCH


def test_deciding_loads_no_torch() -> None:
    names = ", ".join(filter(decides, MODULES))
    output_of(f"import sys; import {names}; assert not {TORCH} & set(sys.modules)")


@pytest.mark.parametrize("module", [*filter(decides, MODULES)])
def test_no_decision_names_torch(module: str) -> None:
    """At the top of the module: what a request alone needs, xgrammar say, is imported by the function that needs it."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & TORCH


@pytest.mark.parametrize("name", nanovllm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(nanovllm, name)
    assert value.__name__ == name
    assert getattr(importlib.import_module(value.__module__), name) is value
    assert value.__doc__


def test_type_checkers_see_every_public_name_in_the_module_it_comes_from() -> None:
    tree = ast.parse(MODULES["nanovllm"].read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == nanovllm._MODULE_OF


def test_what_is_not_public_is_not_there() -> None:
    assert sorted(nanovllm.__all__) == sorted(set(nanovllm.__all__))
    assert set(nanovllm.__all__) <= set(dir(nanovllm))
    missing = "Sequence"
    with pytest.raises(AttributeError, match="'nanovllm' has no attribute 'Sequence'"):
        getattr(nanovllm, missing)


# ---- habits


def trespasses(source: str) -> list[str]:
    """Ambient state: process-wide torch defaults, `global`, and the environment."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            found.append("global")
        if isinstance(node, ast.Attribute) and (
            node.attr.startswith("set_default_") or node.attr in ("environ", "getenv", "putenv")
        ):
            found.append(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "torch"):
            found += [
                a.name for a in node.names if a.name in ("environ", "getenv") or a.name.startswith("set_default_")
            ]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_ambient_state(module: str) -> None:
    # utils/env.py reads a variable, and sets and removes GOMP_SPINCOUNT and NCCL_SOCKET_IFNAME while they are read.
    allowed = ["environ"] if module == "nanovllm.utils.env" else []
    assert trespasses(MODULES[module].read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "torch.set_default_dtype(x)",
        "def f():\n    global x",
        "import os\nos.environ['A']",
        "os.getenv('A')",
        "from os import environ",
        "from torch import set_default_device",
    ],
)
def test_ambient_state_is_seen(source: str) -> None:
    assert len(trespasses(source)) == 1


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "an empty __init__.py alone needs no docstring"


def test_a_script_beside_a_checkout_imports_the_package(tmp_path: Path) -> None:
    """A checkout is a folder of the package's name, and Python takes one without __init__.py for a package, too."""
    if not list(importlib.metadata.Distribution.discover(name="nanovllm")):
        pytest.skip("nanovllm is not installed")
    (tmp_path / "nanovllm").mkdir()
    script = tmp_path / "script.py"
    script.write_text("from nanovllm import LLM\nprint(LLM.__name__)\n")
    ended = run_python(str(script), cwd=tmp_path, PYTHONPATH="")
    assert ended.stdout == "LLM\n", ended.stderr
