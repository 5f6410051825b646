"""Amounts as people write them: 98362432 -> "98.4 MB"."""

__all__ = ["format_bytes"]


def format_bytes(count: int) -> str:
    """A number of bytes with three digits and a decimal unit."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
