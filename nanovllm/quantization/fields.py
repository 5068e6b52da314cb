"""Fields: the quantization_config of a config.json, or an object in it, each field read with a check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanovllm.errors import ModelLoadError, shown


class Fields:
    """An object of config.json. Each accessor raises ModelLoadError that names field, value and what is supported."""

    def __init__(self, values: object, path: str = "quantization_config") -> None:
        """path: of the object in config.json, for the errors."""
        self.path = path
        if not isinstance(values, Mapping):
            raise ModelLoadError(f"config.json: {path}={shown(values)} is not supported: it must be an object.")
        self.values: Mapping[str, Any] = values

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def unsupported(self, name: str, supported: str, hint: str = "") -> ModelLoadError:
        """Returns the error that names a field, its value, and what is supported."""
        value = shown(self.values[name]) if name in self.values else "missing"
        text = f"config.json: {self.path}.{name}={value} is not supported: it must be {supported}."
        return ModelLoadError(f"{text} {hint}" if hint else text)

    def inner(self, name: str) -> Fields | None:
        """Returns an object within this one; None for null."""
        return None if self.get(name) is None else Fields(self.get(name), f"{self.path}.{name}")

    def objects(self, name: str) -> Iterator[Fields]:
        """Yields the objects within the object `name`."""
        outer = Fields(self.get(name), f"{self.path}.{name}")
        for key in outer.values:
            yield Fields(outer.values[key], f"{outer.path}.{shown(key)}")

    def choice(self, name: str, allowed: Sequence[object], default: object = None, hint: str = "") -> Any:
        """Returns one of `allowed`. default: what null and a field that is left out mean."""
        value = default if self.get(name) is None else self.get(name)
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise self.unsupported(name, " or ".join(map(repr, allowed)), hint)
        return value

    def names(self, *fields: str) -> tuple[str, ...]:
        """Returns the texts that are listed in any of some fields; null lists none."""
        found: list[str] = []
        for field in fields:
            value = self.get(field)
            if value is not None and not (
                isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
            ):
                raise self.unsupported(field, "a list of names of modules")
            found += value or ()
        return tuple(found)
