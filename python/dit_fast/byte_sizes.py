"""Numbers of bytes as people write and read them."""

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(size: int | float | str, what: str) -> int:
    """Bytes from a number or a string such as "2GiB" or "500 MB"; ValueError names the argument `what`."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([A-Za-z]*)\s*", size)
        unit = match[2].upper().removesuffix("B") if match else None
        if match is None or unit not in _UNITS:
            raise ValueError(f"{what} {size!r} is not understood: give bytes or a string such as '2GiB'")
        size = float(match[1]) * _UNITS[unit]
    if not size > 0:
        raise ValueError(f"{what} must be positive, got {size}")
    return int(size)


def format_bytes(size: float) -> str:
    """123456789 → "118 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5:  # three digits at most
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
