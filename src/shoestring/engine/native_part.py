"""The native part where it is installed: one place that asks for it, and whether it is new enough."""

from typing import Any

__all__ = ["native_part"]


def native_part(*needed: str) -> Any:
    """The module `shoestring._native`; None where it is not installed, or older than the classes that are `needed`."""
    try:
        from shoestring import _native
    except ImportError:
        return None
    return _native if all(hasattr(_native, name) for name in needed) else None
