"""Numbers as people read them: three significant digits and a decimal prefix."""

from math import floor, isfinite, log10

_PREFIXES = {
    -5: "f",
    -4: "p",
    -3: "n",
    -2: "µ",
    -1: "m",
    0: "",
    1: "k",
    2: "M",
    3: "G",
    4: "T",
    5: "P",
    6: "E",
}


def scaled(value: float, unit: str, *, trim: bool = False) -> str:
    """`scaled(1.234e9, "B")` -> `1.23 GB`; `trim` drops trailing zeros, as in `3.35 TB/s` and `8 TB/s`."""
    if value == 0 or not isfinite(value):
        return f"{value:.0f} {unit}"
    exponent = thousands(value)
    return f"{digits(value / 1000.0**exponent, trim=trim)} {_PREFIXES[exponent]}{unit}"


def thousands(value: float) -> int:
    """The power of 1000 that a value is written with, rounding to three digits included; 0 for what is no number."""
    if not value or not isfinite(value):
        return 0
    exponent = min(max(floor(log10(abs(value)) / 3), min(_PREFIXES)), max(_PREFIXES))
    rounds_up = abs(value) / 1000.0**exponent >= 999.5 and exponent < max(_PREFIXES)
    return exponent + rounds_up


def digits(value: float, *, trim: bool = False) -> str:
    """Three significant digits, more where the whole part has more: `1.23`, `45.6`, `789`, `12,345`."""
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if trim and decimals else text


def seconds(value: float) -> str:
    """A time: `1.23 ms`."""
    return f"{value:,.0f} s" if value >= 1000 else scaled(value, "s")


def byte_count(value: float) -> str:
    """Bytes with decimal prefixes: `12.3 GB`; below a kilobyte exact."""
    return f"{value:.0f} B" if value < 1000 else scaled(value, "B")


def flops(value: float) -> str:
    """A number of floating-point operations: `4.20 TFLOP`."""
    return f"{value:.0f} FLOP" if value < 1000 else scaled(value, "FLOP")


def count(value: float) -> str:
    """A bare number: `8.03 B`, as parameters are written, `125 M`, `999`."""
    if not value >= 1000:
        return f"{value:.0f}"
    exponent = min(thousands(value), 4)
    return f"{digits(value / 1000.0**exponent)} {('', 'k', 'M', 'B', 'T')[exponent]}"


def rate(value: float, unit: str) -> str:
    """A published peak: `3.35 TB/s`, trailing zeros dropped; four digits, since vendors print as many."""
    exponent = thousands(value)
    if unit.startswith(("FLOP", "OP")) and exponent > 4:
        exponent = 4  # TFLOP/s is what data sheets print
    text = f"{value / 1000.0**exponent:,.4g}" if value < 1e4 * 1000.0**exponent else digits(value / 1000.0**exponent)
    return f"{text} {_PREFIXES[exponent]}{unit}"


def per_second(value: float) -> str:
    """A throughput, three significant digits without prefix: `221,000`, `2,150`, `4.56`."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else digits(value)


def percent(share: float) -> str:
    """A share: `13.6%`, `0.27%`, `<0.01%`, `100%`."""
    value = share * 100
    if 0 < value < 0.01:
        return "<0.01%"
    if value >= 99.95:
        return f"{value:.0f}%"
    return "0%" if value == 0 else f"{value:.1f}%" if value >= 1 else f"{value:.2f}%"


def ratio(value: float) -> str:
    """A factor: `3.7x`, `120x`."""
    return f"{value:,.0f}×" if value >= 99.5 else f"{value:.2f}×" if value < 9.95 else f"{value:.1f}×"
