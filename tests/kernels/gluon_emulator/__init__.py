"""Runs kernels written in Gluon on a CPU, for tests: Triton's interpreter does not know Gluon.

`emulate(function, seed)` returns the same function, of the host or a kernel, with Gluon's names replaced in its module
and in the modules that it takes kernels from. Kernels run as Python, on torch.

The emulator looks for faults of synchronisation. Copies and matrix products take place as late as their waits allow,
or earlier at random, and warps take turns at random. What nobody has written yet is NaN, and so is what a copy has
begun to overwrite: a missing wait, or a buffer freed too early, gives NaN under some seeds. An AssertionError tells of
shapes that do not fit, accesses outside of a tensor, deadlocks, and work that is still in flight at the end.

It does not emulate the layouts of registers, limits of memory and registers, and clusters. test_compilation.py compiles
the kernels for that.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch

from tests.kernels.gluon_emulator import memory
from tests.kernels.gluon_emulator.machine import Machine, Partition, active, machine
from tests.kernels.gluon_emulator.tensors import OPERATIONS, Pointer, Tensor, as_tensor

__all__ = ["emulate"]

DTYPES = {
    "int1": torch.bool,
    "float8e4nv": torch.float8_e4m3fn,
    "float8e5": torch.float8_e5m2,
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")},
    **{name: getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64", "float64")},
}


def emulate(
    function: Callable[..., Any],
    seed: int = 0,
    programs: int = 4,
    assembly: Mapping[str, Callable[..., Any]] | None = None,
    **replacements: Any,
) -> Any:
    """Returns `function` on the emulator. `kernel[grid](…)` launches, on tensors of the CPU.

    Args:
        seed: of the order in which things happen.
        programs: how many of a grid run at the same time.
        assembly: what `inline_asm_elementwise` computes, by its text: torch tensors in, one or a tuple out.
        replacements: further names to replace in the modules, such as `multiprocessor_count`.
    """
    return _Emulation(seed, programs, assembly or {}, replacements).function(_plain(function))


def _plain(value: Any) -> Any:
    """The function of Python in a kernel or a cached function; None if there is none."""
    if isinstance(value, FunctionType):
        return inspect.unwrap(value)
    if isinstance(value, ModuleType | type):
        return None
    inner = getattr(value, "fn", None) or getattr(value, "__wrapped__", None)
    return _plain(inner) if inner is not None else None


class _Function:
    def __init__(self, emulation: _Emulation, original: FunctionType) -> None:
        names = emulation.names_of(original)
        self.emulation, self.signature = emulation, inspect.signature(original)
        self.__name__ = original.__name__
        self.function = FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        self.function.__kwdefaults__ = original.__kwdefaults__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.emulation.launch, self, grid)


class _Emulation:
    def __init__(
        self, seed: int, programs: int, assembly: Mapping[str, Callable[..., Any]], replacements: dict[str, Any]
    ) -> None:
        self.seed, self.programs = seed, programs
        self.modules: dict[int, dict[str, Any]] = {}
        self.functions: dict[FunctionType, _Function] = {}
        self.replacements = {
            "gl": _Language(assembly),
            "tma": memory.tma,
            "mbarrier": memory.mbarrier,
            "warpgroup_mma": memory.warpgroup_mma,
            "warpgroup_mma_wait": memory.warpgroup_mma_wait,
            "fence_async_shared": memory.fence_async_shared,
            "block_barrier": lambda: machine().pause(),
            "TensorDescriptor": memory.TensorDescriptor,
            "range": _range,
            **replacements,
        }

    def function(self, original: FunctionType) -> _Function:
        if original not in self.functions:
            self.functions[original] = _Function(self, original)
        return self.functions[original]

    def names_of(self, original: FunctionType) -> dict[str, Any]:
        """A module's names, replaced."""
        theirs = original.__globals__
        if id(theirs) not in self.modules:
            ours = self.modules[id(theirs)] = dict(theirs)
            ours.update({name: self._replaced(value) for name, value in theirs.items()})
            ours.update(self.replacements)
        return self.modules[id(theirs)]

    def _replaced(self, value: Any) -> Any:
        if type(value).__name__ == "constexpr":
            return value.value
        original = _plain(value)
        if original is not None and "gl" in original.__globals__:
            return self.function(original)
        return value

    def launch(self, kernel: _Function, grid: Any, *arguments: Any, **named: Any) -> None:
        """Runs a program for each number of the grid, in random order. Of the compiler's options, num_warps counts."""
        known = {name: value for name, value in named.items() if name in kernel.signature.parameters}
        self.replacements["gl"].num_warps = lambda: named.get("num_warps", 4)
        bound = kernel.signature.bind(*arguments, **known)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if "constexpr" not in str(kernel.signature.parameters[name].annotation):
                bound.arguments[name] = _on_device(value)
        sizes = tuple(int(size) for size in grid)
        waiting = list(itertools.product(*[range(size) for size in sizes]))
        ours = Machine(self.seed)
        ours.random.shuffle(waiting)

        def run_programs() -> None:
            while waiting:
                number = waiting.pop()
                program = Partition(
                    f"program {number}", number, sizes, lambda: kernel.function(*bound.args, **bound.kwargs)
                )
                ours.run_together([program])
                left = [work.kind for work in ours.in_flight if work.owner.number == number]
                assert not left, f"{program.name} ends while work is in flight: {left}"

        active.append(ours)
        try:
            ours.run([run_programs] * min(self.programs, len(waiting)))
        finally:
            active.pop()


def _on_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to_tensor(value)
    if isinstance(value, tuple | list):
        items = [_on_device(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return as_tensor(value) if isinstance(value, bool | int | float) else value


def _range(*bounds: Any, **hints: Any) -> Any:
    """In a kernel, the numbers of a loop are tensors."""
    numbers = range(*[int(bound) for bound in bounds])
    return map(as_tensor, numbers) if active else numbers


class _Language:
    """`gl`."""

    def __init__(self, assembly: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(DTYPES)
        self.__dict__.update(OPERATIONS)
        self.assembly = assembly
        self.NVMMASharedLayout = memory.NVMMASharedLayout
        self.allocate_shared_memory = memory.allocate_shared_memory
        self.static_range = range
        self.constexpr = lambda value: value
        self.num_ctas = lambda: 1
        self.barrier = lambda **ignored: machine().pause()
        self.assume = self.static_print = self.device_print = lambda *ignored: None

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *ignored, **named: None
        raise AttributeError(f"the emulator has no gl.{name}: add it to OPERATIONS")

    @staticmethod
    def program_id(axis: int) -> Tensor:
        return as_tensor(machine().running.number[axis])

    @staticmethod
    def num_programs(axis: int) -> Tensor:
        return as_tensor(machine().running.grid[axis])

    @staticmethod
    def static_assert(condition: Any, message: str = "") -> None:
        assert condition, message

    @staticmethod
    def device_assert(condition: Any, message: str = "", mask: Any = True) -> None:
        assert bool((as_tensor(condition).data | ~as_tensor(mask).data).all()), message

    @staticmethod
    def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
        """Runs the partitions, and returns what the first one does."""
        parent = machine().running
        partitions = [
            Partition(
                f"partition {index} ({function.__name__}) of {parent.name}",
                parent.number,
                parent.grid,
                partial(function, *arguments),
            )
            for index, (function, arguments) in enumerate(functions_and_args)
        ]
        machine().run_together(partitions)
        return partitions[0].result

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool = True, pack: int = 1
    ) -> Any:
        result = self.assembly[asm](*[as_tensor(argument).data for argument in args])
        return tuple(map(Tensor, result)) if isinstance(result, tuple) else Tensor(result)
