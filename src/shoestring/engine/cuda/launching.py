"""Programmatic dependent launch (Hopper): a kernel of a chain starts while the one in front ends, and waits in it.

Kernels that take `PDL` let the next one start at once, so that several of a chain may be under way. Before their `gdc_wait`
they read only what none of the chain writes: weights, tables, and the step's layout, which is there before the chain begins
(it begins behind a kernel that is launched in the ordinary way, `embed`).
"""

from typing import Any

__all__ = ["launch_options"]


def launch_options(pdl: bool) -> dict[str, Any]:
    """What to launch a kernel with, its constant `PDL` included."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
