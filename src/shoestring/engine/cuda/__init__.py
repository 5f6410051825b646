"""The step on a GPU: Triton kernels beside their plain twins. Triton is imported by the kernels' modules only."""
