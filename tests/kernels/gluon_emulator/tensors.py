"""Tensors in registers, pointers, and what Gluon computes with them, in torch.

Layouts are ignored; shapes and types are not. What is undefined on a GPU is filled with bytes of 0xFF: NaN in every
floating-point type. Unlike Triton's, maxima do not hide NaN. To add an operation: an entry in OPERATIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tests.kernels.gluon_emulator.machine import machine

RAW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: types for copies and for 0xFF…


def is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and dtype is not torch.bool


def undefined(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.ones(tuple(shape), dtype=dtype)
    return torch.full(tuple(shape), -1, dtype=RAW[dtype.itemsize]).view(dtype)


class Tensor:
    """A tensor in registers. A scalar has rank 0."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.shape = list(data.shape)
        self.dtype = self.element_ty = data.dtype
        self.numel = data.numel()
        self.layout = None

    @property
    def type(self) -> Tensor:
        return self

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        return Tensor(self.data.contiguous().view(dtype) if bitcast else self.data.to(dtype))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in OPERATIONS:
            raise AttributeError(f"the emulator's tensors have no {name}")
        return partial(OPERATIONS[name], self)

    def _only(self) -> Any:
        assert self.data.dim() == 0, f"a tensor of shape {self.shape} where a scalar is needed"
        return self.data.item()

    def __bool__(self) -> bool:
        return bool(self._only())

    def __int__(self) -> int:
        return int(self._only())

    def __index__(self) -> int:
        assert is_integer(self.dtype), f"{self.dtype} where an integer is needed"
        return int(self._only())

    def __repr__(self) -> str:
        return f"Tensor({self.data!r})"

    def __neg__(self) -> Tensor:
        return Tensor(-self.data)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    __hash__ = None  # type: ignore[assignment]


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A number of Python becomes what Triton makes of it: int1, int32 or int64 by its size, float32."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    assert isinstance(value, bool | int | float), f"a {type(value).__name__} where a tensor or a number is needed"
    if dtype is None:
        fits = isinstance(value, int) and -(2**31) <= value < 2**31
        dtype = torch.bool if isinstance(value, bool) else torch.int32 if fits else torch.int64
        dtype = torch.float32 if isinstance(value, float) else dtype
    return Tensor(torch.tensor(value, dtype=torch.int64 if is_integer(dtype) else None).to(dtype))


def common_type(a: Any, b: Any) -> torch.dtype:
    """The type of a result: the wider of two tensors, and a tensor's own where the other is a number of Python."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.promote_types(a.dtype, b.dtype)
    tensor, number = (a, b) if isinstance(a, Tensor) else (b, a)
    if not isinstance(tensor, Tensor):
        return torch.promote_types(as_tensor(a).dtype, as_tensor(b).dtype)
    if isinstance(number, float) and not tensor.dtype.is_floating_point:
        return torch.float32
    if tensor.dtype is torch.bool and not isinstance(number, bool):
        return torch.int32
    return tensor.dtype


def check_ranks(*shapes: Sequence[int]) -> None:
    ranks = {len(shape) for shape in shapes if len(shape)}
    assert len(ranks) <= 1, f"shapes of different ranks: {[list(shape) for shape in shapes]}"


def binary(function: Callable[..., torch.Tensor], compares: bool = False) -> Callable[[Any, Any], Any]:
    """An elementwise operation. Integers are computed in 64 bits and cut to the type of the result."""

    def apply(a: Any, b: Any, **ignored: Any) -> Any:
        if isinstance(a, Pointer) or isinstance(b, Pointer):
            return NotImplemented
        dtype = common_type(a, b)
        wide = torch.int64 if is_integer(dtype) else dtype
        a, b = as_tensor(a).data.to(wide), as_tensor(b).data.to(wide)
        check_ranks(a.shape, b.shape)
        result = function(a, b)
        return Tensor(result if compares else result.to(dtype))

    return apply


def divide(a: Any, b: Any) -> Tensor:
    dtype = common_type(a, b)
    floating = dtype if dtype.is_floating_point else torch.float32
    return binary(torch.div)(as_tensor(a, floating), as_tensor(b, floating))  # type: ignore[no-any-return]


# Quotients and remainders of integers are those of C.
ARITHMETIC = {
    "add": binary(torch.add),
    "sub": binary(torch.sub),
    "mul": binary(torch.mul),
    "truediv": divide,
    "floordiv": binary(partial(torch.div, rounding_mode="trunc")),
    "mod": binary(torch.fmod),
    "and": binary(torch.bitwise_and),
    "or": binary(torch.bitwise_or),
    "xor": binary(torch.bitwise_xor),
    "lshift": binary(torch.bitwise_left_shift),
    "rshift": binary(torch.bitwise_right_shift),
}
COMPARISONS = {name: binary(getattr(torch, name), compares=True) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
for _name, _function in ARITHMETIC.items():
    setattr(Tensor, f"__{_name}__", lambda self, other, f=_function: f(self, other))
    setattr(Tensor, f"__r{_name}__", lambda self, other, f=_function: f(other, self))
for _name, _function in COMPARISONS.items():
    setattr(Tensor, f"__{_name}__", lambda self, other, f=_function: f(self, other))


class Pointer:
    """Places in a tensor of the host, as offsets from its first element. Its memory ends where its last one does."""

    def __init__(self, memory: torch.Tensor, offset: Tensor) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = self.element_ty = memory.dtype
        self.shape = offset.shape

    @property
    def type(self) -> Pointer:
        return self

    @staticmethod
    def to_tensor(tensor: torch.Tensor) -> Pointer:
        return Pointer(flat(tensor), as_tensor(0, torch.int64))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset - other)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets, which of them are accessed); raises where one lies outside the memory."""
        check_ranks(self.shape, as_tensor(mask).shape)
        accessed = as_tensor(mask).data.expand(self.offset.data.shape)
        used = self.offset.data[accessed]
        outside = used[(used < 0) | (used >= self.memory.numel())]
        assert not outside.numel(), f"elements {outside.tolist()[:4]} … of {self.memory.numel()} are accessed"
        return self.offset.data, accessed


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first to its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))


def load(pointer: Pointer, mask: Any = True, other: Any = None, **hints: Any) -> Tensor:
    machine().pause()
    offsets, accessed = pointer.places(True if mask is None else mask)
    result = undefined(offsets.shape, pointer.dtype)
    if other is not None:
        result = as_tensor(other, pointer.dtype).data.expand(offsets.shape).clone()
    result[accessed] = pointer.memory[offsets[accessed]]
    return Tensor(result)


def store(pointer: Pointer, value: Any, mask: Any = True, **hints: Any) -> None:
    machine().pause()
    offsets, accessed = pointer.places(True if mask is None else mask)
    value = as_tensor(value, pointer.dtype)
    check_ranks(pointer.shape, value.shape)
    pointer.memory[offsets[accessed]] = value.data.expand(offsets.shape)[accessed]


def atomic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A read, an operation and a write that nothing comes between; lanes follow one another."""

    def apply(pointer: Pointer, value: Any, mask: Any = True, **order: Any) -> Tensor:
        machine().pause()
        offsets, accessed = pointer.places(True if mask is None else mask)
        values = as_tensor(value, pointer.dtype).data.expand(offsets.shape)
        old = undefined(offsets.shape, pointer.dtype)
        for lane in accessed.nonzero():
            place = offsets[tuple(lane)]
            old[tuple(lane)] = pointer.memory[place]
            pointer.memory[place] = function(Tensor(pointer.memory[place]), Tensor(values[tuple(lane)])).data
        return Tensor(old)

    return apply


def reduction(function: Callable[..., torch.Tensor]) -> Callable[..., Tensor]:
    """Over one axis, or over all; integers below 32 bits become int32, and bf16 becomes float32, as in Triton."""

    def apply(value: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
        data = value.data
        if not data.dtype.is_floating_point and data.dtype.itemsize < 4:
            data = data.to(torch.int32)
        data = data.float() if data.dtype is torch.bfloat16 else data
        if axis is None:
            return Tensor(function(data.flatten(), 0).to(data.dtype))
        return Tensor(function(data, axis, keepdim=keep_dims).to(data.dtype))

    return apply


def unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Tensor]:
    return lambda value: Tensor(function(as_tensor(value).data))


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    dtype = common_type(a, b)
    first, second = as_tensor(a, dtype).data, as_tensor(b, dtype).data
    check_ranks(condition.shape, first.shape, second.shape)
    return Tensor(torch.where(condition.data.bool(), first, second))


def zeros(shape: Sequence[Any], dtype: torch.dtype, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype)


def full(shape: Sequence[Any], value: Any, dtype: torch.dtype, layout: Any = None) -> Tensor:
    return Tensor(as_tensor(value, dtype).data.expand([int(size) for size in shape]).clone())


def sizes(arguments: Sequence[Any]) -> list[int]:
    """Sizes or axes, given one by one or as one list."""
    listed = arguments[0] if isinstance(arguments[0], list | tuple) else arguments
    return [int(size) for size in listed]


def reshape(value: Tensor, *shape: Any, **ignored: Any) -> Tensor:
    assert math.prod(sizes(shape)) == value.numel, f"{value.shape} cannot become {sizes(shape)}"
    return Tensor(value.data.reshape(sizes(shape)))


def same(value: Any, *ignored: Any, **hints: Any) -> Any:
    return value


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: unary(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "cos", "sin", "sqrt", "rsqrt")},
    **{name: unary(getattr(torch, name)) for name in ("abs", "erf", "floor", "ceil")},
    **{name: ARITHMETIC[name] for name in ("add", "sub", "mul")},
    "fdiv": divide,
    "div_rn": divide,
    "fma": lambda a, b, c: a * b + c,
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "cdiv": lambda a, b: (a + b - 1) // b,
    "sum": reduction(torch.sum),
    "max": reduction(torch.amax),
    "min": reduction(torch.amin),
    "where": where,
    "cast": lambda value, dtype, bitcast=False: as_tensor(value).to(dtype, bitcast),
    "to_tensor": as_tensor,
    "full": full,
    "zeros": zeros,
    "full_like": lambda value, number, **ignored: full(value.shape, number, value.dtype),
    "zeros_like": lambda value, **ignored: full(value.shape, 0, value.dtype),
    "arange": lambda first, end, layout=None: Tensor(torch.arange(int(first), int(end), dtype=torch.int32)),
    "expand_dims": lambda value, axis: Tensor(value.data.unsqueeze(axis)),
    "reshape": reshape,
    "ravel": lambda value: reshape(value, value.numel),
    "permute": lambda value, *order: Tensor(value.data.permute(sizes(order))),
    "trans": lambda value, *order: Tensor(value.data.permute(sizes(order or [range(len(value.shape))[::-1]]))),
    "join": lambda a, b: Tensor(torch.stack([a.data, b.data], dim=-1)),
    "split": lambda value: tuple(Tensor(half.contiguous()) for half in value.data.unbind(-1)),
    "broadcast_to": lambda value, *shape: Tensor(value.data.expand(sizes(shape))),
    "convert_layout": same,
    "set_auto_layout": same,
    "multiple_of": same,
    "max_contiguous": same,
    "max_constancy": same,
    "load": load,
    "store": store,
    "atomic_add": atomic(ARITHMETIC["add"]),
    "atomic_max": atomic(binary(torch.maximum)),
    "atomic_min": atomic(binary(torch.minimum)),
    "atomic_xchg": atomic(lambda old, new: new),
}
