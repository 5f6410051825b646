import torch


def _n(x, norm):
    return norm(x) if norm is not None else x.float()


def linear(x, weight, out, *, norm=None, bias=None, residual=None, activation=None):
    y = _n(x, norm) @ weight.dense().float().T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    out.copy_(y)


def gated_linear(x, gate, up, out, *, norm=None, activation="silu"):
    x = _n(x, norm)
    g = x @ gate.dense().float().T
    act = (
        torch.nn.functional.silu(g)
        if activation == "silu"
        else torch.nn.functional.gelu(g, approximate="tanh")
    )
    out.copy_(act * (x @ up.dense().float().T))
