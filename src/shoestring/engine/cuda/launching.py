"""Programmatic dependent launch (Hopper): a kernel of a chain starts while the one in front ends, and waits in it.

Kernels that take `PDL` let the next one start at once, and read nothing that others write before their `gdc_wait`.
"""

from typing import Any

__all__ = ["launch_options"]


def launch_options(pdl: bool) -> dict[str, Any]:
    """What to launch a kernel with, its constant `PDL` included."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
