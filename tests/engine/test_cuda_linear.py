"""The few-row products against their twin: every kind of weight, fused part and way to launch."""

from dataclasses import dataclass, replace

import pytest
import torch
from interpreted_triton import DEVICE
from triton.tools.tensor_descriptor import TensorDescriptor

from shoestring.engine.cuda.candidates import candidates
from shoestring.engine.cuda.linear import gated_linear, linear, linear_twin
from shoestring.engine.cuda.products import LinearWorkspace, Product, chosen, launches, widest_left
from shoestring.engine.cuda.tuning import LaunchConfig, Problem, Tuning, heuristic, of_gpu
from shoestring.engine.cuda.weights import pack_weight
from shoestring.errors import RequestError

FEW = LaunchConfig("few_rows", 16, 64, 16, split_k=3, warps=1, stages=2)
ONE = LaunchConfig("one_row", 8, 64, 1, warps=1, stages=1)
FRAGMENT_ROW = LaunchConfig("fragments", 16, 512, 1, warps=2, stages=2, fuse_norm=False)
FRAGMENTS = LaunchConfig("fragments", 16, 256, 8, warps=2, fuse_norm=False)


@dataclass(frozen=True)
class RowNorm:
    gain: torch.Tensor
    epsilon: float = 1e-5
    adds_one: bool = False


@pytest.fixture(scope="module")
def workspace():
    return LinearWorkspace.allocate(DEVICE, width=1536, shares=1 << 20)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def assert_near(found: torch.Tensor, x: torch.Tensor, *weights, rounding: float = 1e-6, **extras) -> None:
    """No further from the exact result than twice what PyTorch's own float32 is (or its noise on sums this short)."""
    exact = linear_twin(x.double(), *weights, **extras, dtype=torch.float64)
    plain = linear_twin(x, *weights, **extras)
    size = exact.norm()
    assert found.isfinite().all()
    assert (found - exact).norm() / size <= max(2 * float((plain - exact).norm() / size), rounding)


@pytest.mark.parametrize(
    ("quantize", "outputs", "inputs", "rows"),
    [
        (None, 40, 576, 1), (None, 33, 960, 5), (None, 24, 1536, 16), (None, 72, 192, 64), (None, 40, 112, 2),
        ("int8", 40, 576, 1), ("int8", 33, 96, 5), ("int8", 24, 960, 2), ("int8", 40, 192, 33),
        ("int4", 40, 576, 1), ("int4", 33, 96, 5), ("int4", 24, 960, 2), ("int4", 40, 192, 33),
    ],
)  # fmt: skip
def test_linear_and_gated(workspace, quantize, outputs, inputs, rows):
    x, weight = random(rows, inputs), pack_weight(random(outputs, inputs), quantize)
    norm = RowNorm(random(inputs, seed=1), adds_one=rows % 2 == 0)
    bias, residual = random(outputs, seed=2), random(rows, outputs, seed=3)
    out = residual.clone()  # the result replaces what it is added to
    extras = {"norm": norm, "bias": bias, "activation": {1: "gelu", 5: None, 2: "relu"}.get(rows, "silu")}
    linear(x, weight, out, residual=out, workspace=workspace, **extras)
    assert_near(out, x, weight, residual=residual, **extras)
    up = pack_weight(random(outputs, inputs, seed=4), quantize)
    out.fill_(float("nan"))
    gated_linear(x, weight, up, out, norm=norm, activation="gelu_tanh", workspace=None)
    assert_near(out, x, weight, up, norm=norm, activation="gelu_tanh")
    assert not workspace.arrived.any()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_split_sums_are_the_same_in_every_run(workspace, quantize):
    x, weight = random(18, 288), pack_weight(random(20, 288), quantize)
    norm = RowNorm(random(288, seed=1))
    outs = []
    for _ in range(2):
        workspace.shares.fill_(float("nan"))
        outs.append(torch.full((18, 20), float("nan"), device=DEVICE))
        linear(x, weight, outs[-1], norm=norm, workspace=workspace, config=FEW)
        assert not workspace.arrived.any()
    assert torch.equal(*outs)
    assert not workspace.shares.isnan().all(), "nothing was split"
    assert_near(outs[0], x, weight, norm=norm)
    up, out = pack_weight(random(20, 288, seed=5), quantize), torch.empty(18, 20, device=DEVICE)
    gated_linear(x, weight, up, out, norm=norm, workspace=workspace, config=FEW)
    assert_near(out, x, weight, up, norm=norm, activation="silu")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("config", [ONE, replace(ONE, unroll=2), replace(FEW, block_m=8, split_k=1)])
def test_one_row_by_any_launch(workspace, quantize, config):
    x, weight = random(1, 288), pack_weight(random(21, 288), quantize)
    norm = RowNorm(random(288, seed=1))
    out = torch.full((1, 21), float("nan"), device=DEVICE)
    linear(x, weight, out, norm=norm, workspace=None, config=config)
    assert_near(out, x, weight, norm=norm)


def test_norm_in_front_equals_norm_on_the_way(workspace):
    x, weight, norm = (
        random(3, 160),
        pack_weight(random(17, 160)),
        RowNorm(random(160, seed=1), adds_one=True),
    )
    for config in (replace(FEW, fuse_norm=False), replace(ONE, fuse_norm=False)):
        rows = x if config.kernel == "few_rows" else x[:1]
        out = torch.empty(len(rows), 17, device=DEVICE)
        linear(rows, weight, out, norm=norm, workspace=workspace, config=config)
        assert_near(out, rows, weight, norm=norm)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("inputs", [256, 224])
@pytest.mark.parametrize(("written", "tma"), [(True, False), (True, True), (False, True)])
def test_written_out_weights_and_copied_rows(workspace, quantize, inputs, written, tma):
    x, norm = random(18, inputs), RowNorm(random(inputs, seed=1))
    weights = [pack_weight(random(40, inputs, seed=seed), quantize) for seed in (0, 1)]
    config = replace(FEW, block_k=128, split_k=2, written=written, tma=tma)
    bare = list(launches(Product(x, weights[0], None, random(18, 40)), workspace, Tuning(), config))[-1]
    assert sum(isinstance(one, TensorDescriptor) for one in bare.arguments) == (written and tma), "only rows"
    out = torch.full((18, 40), float("nan"), device=DEVICE)
    linear(x, weights[0], out, norm=norm, workspace=workspace, config=config)
    assert_near(out, x, weights[0], norm=norm)
    gated_linear(x, *weights, out, norm=norm, workspace=workspace, config=replace(config, fuse_norm=False))
    assert_near(out, x, *weights, norm=norm, activation="silu")


@pytest.mark.parametrize(
    ("inputs", "slices", "block_k", "tail", "fuse_norm"),
    [
        (224, 4, 256, 0, True),
        (256, 2, 256, 0, True),
        (160, 8, 256, 0, False),
        (160, 2, 128, 32, True),
        (192, 4, 128, 64, False),
        (160, 4, 128, 64, True),
    ],
)
def test_all_inputs_at_once(workspace, inputs, slices, block_k, tail, fuse_norm):
    x, norm = random(18, inputs), RowNorm(random(inputs, seed=1))
    weights = [pack_weight(random(40, inputs, seed=seed)) for seed in (0, 1)]
    config = LaunchConfig(
        "whole_rows", 16, block_k, 16, warps=2, fuse_norm=fuse_norm, slices=slices, tail=tail
    )
    residual, bias = random(18, 40, seed=3), random(40, seed=2)
    out = residual.clone()
    extras = {"norm": norm, "bias": bias}
    linear(x, weights[0], out, residual=out, workspace=workspace, config=config, **extras)
    assert_near(out, x, weights[0], residual=residual, **extras)
    gated_linear(x, *weights, out, norm=norm, workspace=workspace, config=config)
    assert_near(out, x, *weights, norm=norm, activation="silu")
    for refused, other in (
        (weights[0], replace(config, block_k=128, tail=0)),
        (pack_weight(random(40, inputs), "int4"), config),
    ):
        with pytest.raises(RequestError, match="dense inputs was chosen for"):
            linear(x, refused, out, workspace=workspace, config=other)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(
    ("inputs", "rows", "config"),
    [
        (256, 1, FRAGMENTS),  # one trip
        (512, 1, FRAGMENT_ROW),
        (1024, 1, replace(FRAGMENT_ROW, block_n=32)),
        (288, 1, replace(FRAGMENT_ROW, stages=1)),
        (1600, 1, replace(FRAGMENT_ROW, block_k=1024, warps=2)),
        (512, 8, FRAGMENTS),  # two
        (288, 3, FRAGMENTS),  # the last of them half outside, and an odd group
        (192, 18, replace(FRAGMENTS, block_n=32, block_m=16, block_k=64, warps=1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))  # not interpreted
def test_integers_straight_into_fragments(workspace, quantize, inputs, rows, config, dtype):
    weights = [pack_weight(random(40, inputs, seed=seed), quantize, dtype) for seed in (0, 1)]
    x, residual, bias = random(rows, inputs).to(dtype), random(rows, 40, seed=3), random(40, seed=2)
    out = residual.clone()
    linear(x, weights[0], out, residual=out, bias=bias, workspace=None, config=config)
    # What integers are unpacked with is taken off again, which costs a few bits of a sum.
    rounding = 1e-6 if DEVICE == "cpu" else 3e-4 if dtype == torch.float16 else 2e-5
    assert_near(out, x.float(), weights[0], residual=residual, bias=bias, rounding=rounding)
    gated_linear(x, *weights, out, workspace=None, config=config)
    assert_near(out, x.float(), *weights, activation="silu", rounding=rounding)
    norm, wide = RowNorm(random(inputs, seed=1)), random(rows, inputs)
    linear(wide, weights[0], out, norm=norm, workspace=workspace, config=config)
    expected = linear_twin(wide, weights[0], norm=norm)
    error = (out - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps, "the norm in front leaves rows of this type"


def test_fragments_are_for_integers_and_rows_in_words(workspace):
    weight = pack_weight(random(32, 64), "int4", torch.float16)
    tuning = Tuning({Problem(32, 64, 1, "int4", compute=torch.float16).key: FRAGMENTS})
    for x, room in ((random(1, 64), None), (random(2, 65).half()[:1, 1:], None)):
        out = torch.empty(1, 32, device=DEVICE)
        with pytest.raises(RequestError, match="float16 rows was chosen for int4 weights and rows of"):
            linear(x, weight, out, workspace=room, config=FRAGMENTS)
        assert chosen(Product(x, weight, None, out), room, tuning).kernel == "few_rows"
        linear(x, weight, out, workspace=room, tuning=tuning)  # by what takes any rows
        expected = linear_twin(x.float(), weight)
        assert (out - expected).norm() / expected.norm() < 1e-3
    x, norm = random(1, 64), RowNorm(random(64, seed=1))
    assert chosen(Product(x, weight, None, out, norm), workspace, tuning) == FRAGMENTS
    assert chosen(Product(x.half(), weight, None, out), None, tuning) == FRAGMENTS
    with pytest.raises(RequestError, match="chosen for dense weights"):
        linear(x.half(), pack_weight(random(32, 64).half()), out, workspace=None, config=FRAGMENTS)


@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (replace(FEW, split_k=1), replace(FEW, split_k=1)),
        (FEW, FEW),
        (LaunchConfig("whole_rows", 32, 256, 8, slices=4), LaunchConfig("whole_rows", 16, 128, 16, slices=2)),
        (
            LaunchConfig("whole_rows", 32, 128, 8, slices=2, tail=32),
            LaunchConfig("whole_rows", 16, 64, 16, slices=2, tail=64),
        ),
        (FEW, replace(FEW, split_k=1, fuse_norm=False, tma=True)),
    ],
)
def test_rows_are_left_for_the_next_norm(workspace, first, second, adds_one):
    x, residual = random(18, 160), random(18, 120, seed=3)
    weights = [pack_weight(random(120, 160)), *(pack_weight(random(40, 120, seed=seed)) for seed in (1, 2))]
    norm = RowNorm(random(120, seed=1), adds_one=adds_one)
    middle = residual.clone()
    scaled = linear(x, weights[0], middle, residual=middle, next_norm=norm, workspace=workspace, config=first)
    assert_near(middle, x, weights[0], residual=residual)
    gain = norm.gain + 1 if adds_one else norm.gain
    torch.testing.assert_close(scaled.values.float(), middle * gain)
    assert len(scaled.squares) == -(-120 // first.block_n)
    torch.testing.assert_close(scaled.squares.sum(0), middle.square().sum(1))
    out = torch.full((18, 40), float("nan"), device=DEVICE)
    extras = {"norm": norm, "workspace": workspace, "config": second}
    nowhere = torch.full_like(middle, float("nan"))  # the rows are read from where they were left
    linear(nowhere, weights[1], out, scaled=scaled, **extras)
    assert_near(out, middle, weights[1], norm=norm)
    gated_linear(nowhere, *weights[1:], out, scaled=scaled, **extras)
    assert_near(out, middle, *weights[1:], norm=norm, activation="silu")
    assert not workspace.arrived.any()


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    [
        (1, "row", "row"),
        (1, "row", "rows"),
        (3, "rows", "rows"),
        (3, "rows", "few"),
        (1, "few", "row"),
    ],
)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_rows_are_left_by_fragments_and_for_them(workspace, quantize, rows, first, second):
    configs = {"row": FRAGMENT_ROW, "rows": FRAGMENTS, "few": FEW}
    x, residual = random(rows, 160).half(), random(rows, 96, seed=3)
    weights = [pack_weight(random(96, 160), quantize, torch.float16)]
    weights += [pack_weight(random(40, 96, seed=seed), quantize, torch.float16) for seed in (1, 2)]
    norm, middle = RowNorm(random(96, seed=1), adds_one=True), residual.clone()
    scaled = linear(
        x, weights[0], middle, residual=middle, next_norm=norm, workspace=workspace, config=configs[first]
    )
    expected = linear_twin(x.float(), weights[0], residual=residual)
    assert (middle - expected).norm() / expected.norm() < 1e-3
    torch.testing.assert_close(scaled.squares.sum(0), middle.square().sum(1))
    out = torch.full((rows, 40), float("nan"), device=DEVICE)
    nowhere = torch.full_like(middle, float("nan"))  # the rows are read from where they were left
    gated_linear(
        nowhere, *weights[1:], out, norm=norm, scaled=scaled, workspace=workspace, config=configs[second]
    )
    expected = linear_twin(middle, *weights[1:], norm=norm, activation="silu")
    assert (out - expected).norm() / expected.norm() < 2e-3


def test_one_row_is_left_where_several_are_too_wide(workspace):
    weight, norm = pack_weight(random(2560, 64), "int4", torch.float16), RowNorm(random(2560, seed=1))
    wide = LinearWorkspace.allocate(DEVICE, width=2560, shares=1 << 20)
    for rows, left in ((1, True), (2, False)):
        x, out = random(rows, 64).half(), torch.empty(rows, 2560, device=DEVICE)
        config = replace(FRAGMENT_ROW if rows == 1 else FRAGMENTS, block_n=64)
        found = linear(x, weight, out, next_norm=norm, workspace=wide, config=config)
        assert (found is not None) == left
    assert widest_left(1) > 2560 > widest_left(2)


def test_rows_are_not_left_where_the_next_product_does_not_want_them(workspace):
    weight, norm = pack_weight(random(64, 64)), RowNorm(random(64, seed=1))
    for rows, config, room in ((1, ONE, workspace), (2, FEW, None)):
        x, out = random(rows, 64), torch.empty(rows, 64, device=DEVICE)
        assert linear(x, weight, out, next_norm=norm, workspace=room, config=config) is None
    # One row is read anew: its norm costs nothing on the way.
    x, out = random(1, 64), torch.empty(1, 64, device=DEVICE)
    scaled = linear(random(1, 64), weight, x, next_norm=norm, workspace=workspace, config=FEW)
    linear(x, weight, out, norm=norm, scaled=scaled, workspace=workspace, config=ONE)
    assert_near(out, x, weight, norm=norm)


@pytest.mark.parametrize("split_k", [1, 3])
def test_tiles_brought_by_the_copy_engine(workspace, split_k):
    x, weights = random(18, 232), [pack_weight(random(40, 232, seed=seed)) for seed in (0, 1)]
    config = replace(FEW, split_k=split_k, fuse_norm=False, tma=True)
    residual, norm = random(18, 40, seed=3), RowNorm(random(232, seed=1))
    launched = list(
        launches(Product(x, weights[0], None, residual, norm, residual=residual), workspace, Tuning(), config)
    )
    assert len([one for one in launched[-1].arguments if isinstance(one, TensorDescriptor)]) == 3
    out = residual.clone()
    linear(x, weights[0], out, norm=norm, residual=out, workspace=workspace, config=config)
    assert_near(out, x, weights[0], norm=norm, residual=residual)
    gated_linear(x, *weights, out, norm=norm, workspace=workspace, config=config)
    assert_near(out, x, *weights, norm=norm, activation="silu")
    # Rows whose addresses the engine cannot take are read in the ordinary way.
    odd = random(18, 235)[:, :232]
    linear(odd, weights[0], out, workspace=workspace, config=config)
    assert_near(out, odd, weights[0])


@pytest.mark.parametrize(("tail", "split_k"), [(0, 1), (16, 1), (16, 3)])
def test_wide_tiles_and_their_tails(workspace, tail, split_k):
    x, weights = random(18, 232), [pack_weight(random(120, 232, seed=seed)) for seed in (0, 1)]
    config = LaunchConfig("wide_tiles", 32, 64, 16, split_k, warps=1, tail=tail, fuse_norm=False, tma=True)
    norm, bias = RowNorm(random(232, seed=1), adds_one=True), random(120, seed=2)
    residual = random(18, 120, seed=3)
    out = residual.clone()
    extras = {"workspace": workspace, "config": config}
    left = linear(x, weights[0], out, bias=bias, norm=norm, residual=out, next_norm=norm, **extras)
    assert left is None, "who comes next takes the norm"
    assert_near(out, x, weights[0], bias=bias, norm=norm, residual=residual)
    gated_linear(x, *weights, out, norm=norm, **extras)
    assert_near(out, x, *weights, norm=norm, activation="silu")
    linear(x, weights[1], out, **extras)
    assert_near(out, x, weights[1])
    assert not workspace.arrived.any()
    # Rows that another product has left for the norm.
    few = replace(FEW, split_k=1)
    middle, last = torch.zeros(18, 120, device=DEVICE), pack_weight(random(72, 120))
    next_norm = RowNorm(random(120, seed=4))
    scaled = linear(x, weights[0], middle, next_norm=next_norm, workspace=workspace, config=few)
    out = torch.full((18, 72), float("nan"), device=DEVICE)
    linear(torch.full_like(middle, float("nan")), last, out, norm=next_norm, scaled=scaled, **extras)
    assert_near(out, middle, last, norm=next_norm)


def test_wide_tiles_are_for_what_the_copy_engine_takes(workspace):
    config = LaunchConfig("wide_tiles", 32, 64, 16, warps=1, tail=16, fuse_norm=False, tma=True)
    weight, out = pack_weight(random(40, 232)), torch.empty(18, 40, device=DEVICE)
    tuning = Tuning({Problem(40, 232, 18, "float32", compute=torch.float32).key: config})
    for x, kernel in ((random(18, 232), "wide_tiles"), (random(18, 235)[:, :232], "few_rows")):
        product = Product(x, weight, None, out)
        assert chosen(product, workspace, tuning).kernel == kernel
        linear(x, weight, out, workspace=workspace, tuning=tuning)
        assert_near(out, x, weight)
    with pytest.raises(RequestError, match="rows and dense weights that the copy engine takes"):
        linear(x, weight, out, workspace=workspace, config=config)
    integers = pack_weight(random(40, 192), "int8")
    with pytest.raises(RequestError, match="the copy engine takes was chosen for int8 weights"):
        linear(random(18, 192), integers, out, workspace=workspace, config=config)
    # No room for rows that a norm has seen.
    wanted = Product(random(18, 232), weight, None, out, RowNorm(random(232)))
    assert chosen(wanted, None, tuning).kernel == "few_rows"


def test_strided_rows_and_narrow_types():
    x = random(1, 200).bfloat16()
    weight = pack_weight(random(24, 96).bfloat16())
    out = torch.zeros(1, 40, dtype=torch.bfloat16, device=DEVICE)
    linear(
        x[:, 8:104],
        weight,
        out[:, :24],
        norm=RowNorm(random(96, seed=1).bfloat16()),
        workspace=None,
        config=ONE,
    )
    expected = linear_twin(x[:, 8:104].float(), weight, norm=RowNorm(random(96, seed=1).bfloat16()))
    torch.testing.assert_close(
        out[:, :24].float(), expected, rtol=2**-7, atol=1e-3
    )  # the interpreter truncates
    assert not out[:, 24:].any()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_prefill(quantize):
    x, weight, up = random(257, 96), *(pack_weight(random(20, 96, seed=s), quantize) for s in (0, 1))
    norm, bias, residual = RowNorm(random(96, seed=1)), random(20), random(257, 20)
    out = residual.clone()
    linear(x, weight, out, norm=norm, bias=bias, residual=out, activation="relu", workspace=None)
    assert_near(out, x, weight, norm=norm, bias=bias, residual=residual, activation="relu")
    gated_linear(x, weight, up, out, norm=norm, workspace=None)
    assert_near(out, x, weight, up, norm=norm, activation="silu")


def test_no_rows_are_no_work():
    x, weight, out = random(0, 64), pack_weight(random(8, 64)), torch.empty(0, 8, device=DEVICE)
    assert not list(launches(Product(x, weight, None, out), None, Tuning()))
    linear(x, weight, out, workspace=None)


def test_misfits_are_refused():
    x, weight, out = random(2, 64), pack_weight(random(8, 64)), torch.empty(2, 8, device=DEVICE)
    with pytest.raises(RequestError, match=r"\[2, 32\] and a weight \[8, 64\]"):
        linear(x[:, :32], weight, out, workspace=None)
    with pytest.raises(RequestError, match="'tanh'"):
        linear(x, weight, out, activation="tanh", workspace=None)
    with pytest.raises(RequestError, match="differ"):
        gated_linear(x, weight, pack_weight(random(8, 64), "int8"), out, workspace=None)
    with pytest.raises(RequestError, match="one-row launch was chosen for 2"):
        linear(x, weight, out, workspace=None, config=ONE)


SHAPES = [
    (960, 576), (576, 576), (576, 1536), (49152, 576), (12288, 4096), (4096, 11008), (32000, 4096), (16, 16),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int4"])
def test_heuristics_are_launchable(kind):
    for outputs, inputs in SHAPES:
        for rows in (1, 2, 16, 20, 64, 256):
            compute = torch.float32 if kind == "float32" else torch.bfloat16
            problem = Problem(outputs, inputs, rows, kind, outputs == 960, compute)
            choices = candidates(problem)
            assert choices[0] == heuristic(problem)
            assert len(set(choices)) == len(choices) <= 180
            for config in choices:
                assert config.kernel in ("few_rows", "whole_rows", "fragments", "wide_tiles") or rows == 1
                for size in (config.block_n, config.block_k, config.block_m, config.warps, config.tail or 1):
                    assert size & (size - 1) == 0 < size
                if config.kernel == "whole_rows":
                    assert config.tail < config.block_k
                    assert config.tail % 16 == 0
                    assert inputs <= config.block_k + config.tail
                assert config.block_k >= (64 if problem.quantised else 16)
                assert 1 <= config.split_k <= max(1, inputs // config.block_k)
            copied = heuristic(problem, copies=True)
            assert copied.tma or rows <= 16 or not problem.quantised, "tiles of many rows"
            assert not copied.tma or rows > 16, "of them alone"
            assert 1 <= copied.split_k <= max(1, inputs // copied.block_k)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rows", "gated", "together"),
    [
        (12288, 4096, 64, False, 1), (11008, 4096, 32, True, 1), (14336, 4096, 64, True, 2), (4096, 11008, 64, False, 1),
        (6144, 4096, 24, False, 1), (32000, 4096, 64, False, 2), (11008, 4096, 128, True, 1), (8192, 28672, 256, False, 1),
    ],
)  # fmt: skip
def test_many_rows_take_full_waves_of_wide_tiles(outputs, inputs, rows, gated, together):
    found = heuristic(Problem(outputs, inputs, rows, "bfloat16", gated), 132, copies=True)
    assert found.kernel == "wide_tiles"
    programs = -(-outputs // found.width) * -(-rows // found.block_m) * found.split_k
    assert 0.7 <= programs / (132 * -(-programs // 132)) <= 1
    # Memory for the tiles of so many programs on a multiprocessor.
    stage = 2 * found.block_k * (found.width * (2 if gated else 1) + found.block_m)
    assert together * found.stages * stage <= 227 << 10
    assert found.stages >= 2


@pytest.mark.parametrize("shape", [(2048, 2048, 64), (4096, 4096, 32), (12288, 4096, 16), (18944, 3584, 64)])
def test_others_do_not(shape):
    assert heuristic(Problem(*shape, "bfloat16", shape[0] == 18944), 132, copies=True).kernel == "few_rows"
    assert heuristic(Problem(12288, 4096, 64, "bfloat16"), 132).kernel == "few_rows", "without a copy engine"


def test_winners_are_kept_in_a_file(tmp_path):
    problem = Problem(960, 576, 1, "bfloat16")
    winner = replace(ONE, block_n=2, lines=4)
    Tuning({problem.key: winner}, pdl=True).write(tmp_path / "gpu.json")
    read = Tuning.read(tmp_path / "gpu.json")
    assert read.pdl
    assert read.config(problem) == winner
    other = replace(problem, rows=2)
    assert read.config(other) == heuristic(other)
    assert replace(problem, rows=7).key == replace(problem, rows=8).key != problem.key
    assert read.capability is None
    Tuning({replace(problem, rows=16).key: winner}).write(tmp_path / "sixteen.json")
    sixteen = Tuning.read(tmp_path / "sixteen.json")
    assert [sixteen.config(replace(problem, rows=rows)) == winner for rows in (1, 2, 8, 16, 17, 256)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    text = (tmp_path / "gpu.json").read_text().replace('"lines"', '"line"')
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(RequestError, match=r"unknown field 'line' \(did you mean 'lines'\?\)"):
        Tuning.read(tmp_path / "gpu.json")


def test_an_untuned_gpu_takes_what_was_measured_on_its_sibling(tmp_path):
    own, sibling = Problem(960, 576, 1, "bfloat16"), Problem(576, 576, 1, "bfloat16")
    Tuning({own.key: ONE}, capability=(9, 0)).write(tmp_path / "nvidia-a.json")
    Tuning({sibling.key: ONE}, pdl=True, capability=(9, 0)).write(tmp_path / "nvidia-b-80gb.json")
    assert set(of_gpu("NVIDIA B 80GB", (9, 0), tmp_path).configs) == {sibling.key}
    assert set(of_gpu("NVIDIA C", (9, 0), tmp_path).configs) == {own.key}
    assert of_gpu("NVIDIA D", (8, 0), tmp_path) == Tuning()
    shipped = of_gpu("NVIDIA H100 80GB HBM3", (9, 0))
    assert shipped.pdl
    assert shipped.capability == (9, 0)
    unseen = Problem(4000, 4000, 64, "int4")
    assert shipped.config(unseen) == heuristic(unseen, copies=True) != Tuning().config(unseen)
