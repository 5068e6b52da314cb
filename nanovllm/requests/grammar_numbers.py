"""EBNF of numbers within bounds."""

from __future__ import annotations

import math
from fractions import Fraction

from nanovllm.requests.grammar_ebnf import UnenforceableError, either, literal, repeated

_MAX_DIGITS = 100  # of a bound
_EXACT_DIGITS = 15  # that a double tells apart
_MAX_MULTIPLES = 1000
_MAX_DIVISOR = 100

INTEGER = '("-"? [1-9] [0-9]* | "0")'
NUMBER = '"-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+\\-]? [0-9] [0-9]?)?'


def integers(low: int | None, high: int | None) -> str | None:
    """Returns the expression of the integers from `low` to `high`; None: without a bound. None if there are none."""
    options = []
    if low is None or low < 0:
        nearest, furthest = 1 if high is None else max(1, -high), None if low is None else -low
        options += [f'"-" {each}' for each in _naturals(nearest, furthest)]
    if (low is None or low <= 0) and (high is None or high >= 0):
        options.append('"0"')
    options += _naturals(max(low or 1, 1), high)
    return either(options) if options else None


def numbers(low: Fraction | None, high: Fraction | None, *, over: bool, under: bool) -> str | None:
    """Returns the expression of the decimals from `low` to `high`, which are excluded with `over` and `under`.

    They have no exponent, and only so many digits after the point that no rounding moves one across an excluded bound.
    """
    if low is None and high is None:
        return NUMBER
    whole = max(len(str(math.floor(abs(bound)))) for bound in (low, high) if bound is not None)
    places = max(0, min(9, _EXACT_DIGITS - whole))
    least = None if low is None else _scaled(low, places, over)
    most = None if high is None else -_scaled(-high, places, under)
    options = []
    if least is None or least < 0:
        nearest, furthest = 1 if most is None else max(1, -most), None if least is None else -least
        options += [f'"-" {each}' for each in _decimals(nearest, furthest, places)]
    options += _decimals(max(least or 0, 0), most, places)
    return either(options) if options else None


def _scaled(low: Fraction, places: int, over: bool) -> int:
    """Returns the least integer that is 10 ** places times a number from `low` on, or past it with `over`."""
    scaled: Fraction = low * 10**places
    return math.floor(scaled) + 1 if over else math.ceil(scaled)


def multiples(divisor: int, low: int | None, high: int | None, rules: dict[str, str]) -> str | None:
    """Returns the expression of the multiples of `divisor` within bounds, and adds the rules that it needs."""
    if low is not None and high is not None and (high - low) // divisor < _MAX_MULTIPLES:
        values = range(-(-low // divisor) * divisor, high + 1, divisor)
        return either(literal(str(value)) for value in values) if values else None
    if divisor == 1:
        return integers(low, high)
    if high is not None or low not in (None, 0, 1) or divisor > _MAX_DIVISOR:
        raise UnenforceableError(
            f"'multipleOf': {divisor} is enforced up to {_MAX_DIVISOR} without bounds, or with a minimum of 0 or 1, or "
            f"with bounds that leave at most {_MAX_MULTIPLES} values"
        )
    name = f"multiple{divisor}"
    for rest in range(divisor):  # what is read so far, modulo the divisor
        options = [f'"{digit}" {name}r{(10 * rest + digit) % divisor}' for digit in range(10)]
        rules[f"{name}r{rest}"] = " | ".join([*options, '""'] if rest == 0 else options)
    start = either(f'"{digit}" {name}r{digit % divisor}' for digit in range(1, 10))
    return start if low == 1 else f'("0" | {start})' if low == 0 else f'("0" | "-"? {start})'


def _naturals(low: int, high: int | None) -> list[str]:
    """Returns expressions that together are the integers from low > 0 to `high`."""
    if high is not None and high < low:
        return []
    if len(str(low if high is None else high)) > _MAX_DIGITS:
        raise UnenforceableError(f"A bound of more than {_MAX_DIGITS} digits is not supported")
    digits = len(str(low))
    if high is not None and len(str(high)) == digits:
        return [_between(str(low), str(high))]
    options = [_between(str(low), "9" * digits)]
    if high is None:
        return [*options, f"[1-9] {repeated('[0-9]', digits, None)}"]
    longest = len(str(high))
    if digits + 1 < longest:
        options.append(f"[1-9] {repeated('[0-9]', digits, longest - 2)}")
    return [*options, _between("1" + "0" * (longest - 1), str(high))]


def _between(low: str, high: str) -> str:
    """Returns the expression of the digits from `low` to `high`, which are equally long."""
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return f"[{low[0]}-{high[0]}] {repeated('[0-9]', rest, rest)}" if rest else f"[{low[0]}-{high[0]}]"
    if low[0] == high[0]:
        return f'"{low[0]}" {_between(low[1:], high[1:])}'
    options = [f'"{low[0]}" {_between(low[1:], "9" * rest)}', f'"{high[0]}" {_between("0" * rest, high[1:])}']
    if int(low[0]) + 1 < int(high[0]):
        options.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] {repeated('[0-9]', rest, rest)}")
    return either(options)


def _decimals(low: int, high: int | None, places: int) -> list[str]:
    """Returns expressions that together are the decimals from low ≥ 0 to `high`, both in units of the last place."""
    if high is not None and high < low:
        return []
    unit = 10**places
    (whole, part), nines = divmod(low, unit), "9" * places
    if high is not None and high // unit == whole:
        return [f'"{whole}"{_fraction(f"{part:0{places}}"[:places], f"{high % unit:0{places}}"[:places])}']
    options = [f'"{whole}"{_fraction(f"{part:0{places}}"[:places], nines)}']
    last = None if high is None else high // unit - 1
    options += [f"{each}{_fraction('0' * places, nines)}" for each in _naturals(whole + 1, last)]
    if high is not None:
        options.append(f'"{high // unit}"{_fraction("0" * places, f"{high % unit:0{places}}"[:places])}')
    return options


def _fraction(low: str, high: str) -> str:
    """Returns the expression, with a space before it, of a fraction whose digits are from `low` to `high`."""
    if not low:
        return ""
    if (digits := _digits(low, high)) is None:
        return ""
    whole = low.strip("0") == ""  # no fraction at all counts as zero
    return f' ("." {digits})?' if whole else f' "." {digits}'


def _digits(low: str, high: str, empty: bool = False) -> str | None:
    """Returns the expression of digits that, with zeros behind them, are from `low` to `high`.

    empty: allow none at all, which counts as zero. None: no digits are left to choose.
    """
    if not low:
        return None
    rest = len(low) - 1
    options: list[str] = []

    def add(first: str, low: str, high: str) -> None:
        behind = _digits(low, high, empty=True)
        options.append(first if behind is None else f"{first} {behind}")

    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        add(f"[{low[0]}-{high[0]}]", "", "") if not rest else options.append(
            f"[{low[0]}-{high[0]}] {repeated('[0-9]', 0, rest)}"
        )
    elif low[0] == high[0]:
        add(f'"{low[0]}"', low[1:], high[1:])
    else:
        add(f'"{low[0]}"', low[1:], "9" * rest)
        add(f'"{high[0]}"', "0" * rest, high[1:])
        if int(low[0]) + 1 < int(high[0]):
            options.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] {repeated('[0-9]', 0, rest)}")
    expression = either(options)
    return f"({expression})?" if empty and low.strip("0") == "" else expression
