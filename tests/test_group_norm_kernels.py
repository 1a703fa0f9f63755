"""The kernels of group and layer normalisation themselves, called as the registry calls them. What stands on
them, in cnnops.ops, has tests of its own.

The reference is PyTorch's in float64: ``F.group_norm`` or ``F.layer_norm``, an activation, autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.base import (
    ALL,
    ENGINES,
    FLOAT32,
    TOLERANCE,
    assert_close,
    device_of,
    laid_out,
    moved,
    normal,
)  # fmt: skip
from cases.norm import ACTIVATIONS
from torch import Tensor

from cnnops.cuda import emulate, group_norm
from cnnops.cuda.launch import trace
from cnnops.shapes import GroupShape, LayerShape, NormShape

Size = tuple[int, ...]
GPU = [engine for engine in ENGINES if not isinstance(engine, str)]
"""Where CUDA kernels run: under the emulator, and on a GPU if there is one."""

HALF = (torch.float16, torch.bfloat16)
NAMES = ("y", "mean", "rstd", "grad_x", "grad_weight", "grad_bias")


@dataclass(frozen=True, kw_only=True)
class Row:
    """x is `scale` · normal numbers + `shift`. `affine`: "both", "weight", "bias" or "none"; in half types
    these are float32 or, with `half_parameters`, half too. `entries`: the launches that the row is there for.
    """

    id: str
    x: Size
    layout: str = "contiguous"
    affine: str = "both"
    half_parameters: bool = False
    scale: float = 1.0
    seed: int = 1
    shift: float = 0.5
    eps: float = 1e-5
    dtypes: tuple[torch.dtype, ...] = FLOAT32
    schedules: bool = False
    entries: str = ""

    @property
    def parameters(self) -> Size:
        raise NotImplementedError

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        raise NotImplementedError

    def backward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        raise NotImplementedError

    def input(self, dtype: torch.dtype) -> Tensor:
        return laid_out(self.x, self.layout, self.values(dtype))

    def values(self, dtype: torch.dtype) -> Any:
        return lambda size: (
            normal(self.seed, torch.float64)(size) * self.scale + self.shift
        ).to(dtype)  # fmt: skip

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """x, weight, bias and grad_y; grad_y lies as x does."""
        narrow = dtype in HALF and not self.half_parameters
        parameter = torch.float32 if narrow else dtype
        x = self.input(dtype)
        weight = (1 + normal(2, torch.float64)(self.parameters) / 4).to(parameter)
        bias = normal(3, parameter)(self.parameters)
        grad_y = replace(self, scale=1.0, shift=0.25, seed=4).input(dtype)
        return {
            "x": moved(x, device),
            "weight": moved(weight, device) if self.affine in ("both", "weight") else None,
            "bias": moved(bias, device) if self.affine in ("both", "bias") else None,
            "grad_y": moved(grad_y, device),
        }

    def results(self, tensors: dict[str, Any], statistics: Size) -> dict[str, Any]:
        """Where the operations put them: images in one of PyTorch's layouts, rows contiguous."""
        x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        last = self.layout.startswith("channels_last")
        like = x if last else x.new_empty(x.shape)
        return {
            "y": torch.empty_like(like),
            "mean": x.new_empty(statistics, dtype=kind),
            "rstd": x.new_empty(statistics, dtype=kind),
            "grad_x": torch.empty_like(like),
            "grad_weight": None if weight is None else torch.empty_like(weight),
            "grad_bias": None if bias is None else torch.empty_like(bias),
        }

    def compute(self, tensors: dict[str, Any]) -> dict[str, Any]:
        results = self.results(tensors, self.statistics)
        self.forward(tensors, results)
        self.backward(tensors, results)
        return results

    @property
    def statistics(self) -> Size:
        raise NotImplementedError

    def expected(self, tensors: dict[str, Any]) -> dict[str, Tensor]:
        names = [n for n in ("x", "weight", "bias") if tensors[n] is not None]
        leaves = {n: tensors[n].detach().cpu().double().requires_grad_() for n in names}
        y = self.reference(leaves["x"], leaves.get("weight"), leaves.get("bias"))
        grads = torch.autograd.grad(y, list(leaves.values()), tensors["grad_y"].cpu().double())
        x = tensors["x"].cpu().double().reshape(*self.statistics, -1)
        var, mean = torch.var_mean(x, -1, correction=0)
        return {
            "y": y.detach(),
            "mean": mean,
            "rstd": (var + self.eps).rsqrt(),
            **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)},
        }


@dataclass(frozen=True, kw_only=True)
class Group(Row):
    groups: int
    activation: str = "none"

    @property
    def shape(self) -> GroupShape:
        return GroupShape.of(self.x, self.groups, self.parameters, self.parameters)

    @property
    def parameters(self) -> Size:
        return self.x[1:2]

    @property
    def statistics(self) -> Size:
        return self.shape.statistics_size

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)  # PyTorch 2.13 has no backward of a bias alone
        # F.group_norm but for its refusal of a single value.
        return ACTIVATIONS[self.activation](
            torch.group_norm(x, self.groups, weight, bias, self.eps)
        )

    def forward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        group_norm.group_norm_fwd(
            self.shape, tensors["x"], tensors["weight"], tensors["bias"], self.eps, self.activation,
            results["y"], results["mean"], results["rstd"],
        )  # fmt: skip

    def backward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        group_norm.group_norm_bwd(
            self.shape, tensors["grad_y"], tensors["x"], tensors["weight"], tensors["bias"], results["mean"],
            results["rstd"], self.activation, results["grad_x"], results["grad_weight"], results["grad_bias"],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layer(Row):
    """`layout`: of `laid_out`, or where rows lie otherwise than one after the other

    beside       neighbouring rows are neighbours in memory: N C *spatial, normalised over C
    every_other  every second value of longer rows
    of_wider     rows, without the ends, of a wider matrix
    swapped      the two outer axes change places in memory
    """

    normalized: int = 1

    @property
    def shape(self) -> LayerShape:
        return LayerShape.of(self.x, self.parameters, self.parameters, self.parameters)

    @property
    def parameters(self) -> Size:
        return self.x[len(self.x) - self.normalized :]

    @property
    def statistics(self) -> Size:
        return self.shape.statistics_size

    def input(self, dtype: torch.dtype) -> Tensor:
        values = self.values(dtype)(self.x)
        *outer, D = self.x
        if self.layout == "beside":
            view = values.new_zeros(outer[0], D, *outer[1:]).movedim(1, -1)
        elif self.layout == "every_other":
            view = values.new_zeros(*outer, 2 * D)[..., ::2]
        elif self.layout == "of_wider":
            view = values.new_zeros(*outer, D + 3)[..., 1 : D + 1]
        elif self.layout == "swapped":
            view = values.new_zeros(outer[1], outer[0], *self.x[2:]).transpose(0, 1)
        else:
            return super().input(dtype)
        return view.copy_(values)

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.parameters, weight, bias, self.eps)

    def forward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        group_norm.layer_norm_fwd(
            self.shape, tensors["x"], tensors["weight"], tensors["bias"], self.eps, results["y"],
            results["mean"], results["rstd"],
        )  # fmt: skip

    def backward(self, tensors: dict[str, Any], results: dict[str, Any]) -> None:
        group_norm.layer_norm_bwd(
            self.shape, tensors["grad_y"], tensors["x"], tensors["weight"], results["mean"], results["rstd"],
            results["grad_x"], results["grad_weight"], results["grad_bias"],
        )  # fmt: skip


WHOLE, SPLIT = "fwd bwd params", "stats merge apply sums merge apply params"
HALF_SPLIT = "fwd sums merge apply params"
"""Of slabs that fit in a block forward, where one tensor is held, but not backward, where two are."""
LARGE_MEAN = {"shift": 100.0, "scale": 0.01, "eps": 1e-8}

ROWS: tuple[Row, ...] = (
    Group(id="usual", x=(3, 8, 6, 6), groups=4, dtypes=ALL, schedules=True, entries=WHOLE),
    Group(id="one_group", x=(3, 8, 6, 6), groups=1),
    Group(id="instance", x=(3, 8, 6, 6), groups=8, dtypes=ALL),
    Group(id="no_place_axis", x=(5, 48), groups=4, schedules=True),
    Group(id="one_axis", x=(3, 6, 11), groups=2),
    Group(id="three_axes", x=(2, 4, 3, 4, 5), groups=2),
    Group(id="planes_of_49", x=(2, 30, 7, 7), groups=3),
    Group(id="one_value_lines", x=(2, 24, 1, 1), groups=3),
    Group(id="vectors", x=(3, 4096), groups=1, entries=SPLIT),
    Group(id="long", x=(2, 6, 100, 130), groups=2, schedules=True, entries=SPLIT),
    Group(id="long_half", x=(1, 6, 160, 104), groups=2, dtypes=HALF, entries=SPLIT),
    Group(id="long_double", x=(1, 3, 66, 65), groups=1, dtypes=(torch.float64,), entries=SPLIT),
    Group(id="long_planes", x=(1, 3, 131, 127), groups=3, entries=HALF_SPLIT),
    Group(id="held", x=(2, 12, 28, 26), groups=2, dtypes=ALL, schedules=True, entries=WHOLE),
    Group(id="held_gelu", x=(2, 12, 28, 26), groups=2, activation="gelu", dtypes=(torch.bfloat16,),
        entries=WHOLE),
    Group(id="held_odd", x=(2, 10, 29, 27), groups=2, dtypes=(torch.float32, *HALF), entries=WHOLE),
    Group(id="held_offset", x=(2, 10, 29, 28), groups=2, layout="offset", dtypes=HALF),
    Group(id="held_plane", x=(2, 3, 90, 64), groups=3, dtypes=(torch.float32, *HALF), entries=WHOLE),
    Group(id="held_forward", x=(1, 10, 64, 60), groups=1, dtypes=HALF, schedules=True, entries=HALF_SPLIT),
    Group(id="many_channels", x=(2, 140, 7, 7), groups=1, activation="relu", entries=SPLIT),
    Group(id="channels_last", x=(3, 16, 6, 5), groups=2,
        layout="channels_last", dtypes=ALL, schedules=True, entries=WHOLE),
    Group(id="channels_last_instance", x=(3, 16, 6, 5), groups=16, layout="channels_last", dtypes=HALF),
    Group(id="channels_last_pairs", x=(2, 16, 6, 5), groups=8,
        layout="channels_last", activation="silu"),
    Group(id="channels_last_33", x=(2, 33, 5, 7), groups=3, layout="channels_last"),
    Group(id="channels_last_long", x=(1, 24, 47, 45), groups=2,
        layout="channels_last", schedules=True, entries=SPLIT),
    Group(id="channels_last_held", x=(1, 16, 30, 31), groups=2,
        layout="channels_last", dtypes=(torch.float32, *HALF), schedules=True, entries=WHOLE),
    Group(id="channels_last_held_6", x=(2, 12, 22, 23), groups=2,
        layout="channels_last", activation="relu", entries=WHOLE),
    Group(id="channels_last_held_odd", x=(1, 15, 23, 25), groups=3,
        layout="channels_last", dtypes=(torch.float32, *HALF)),
    Group(id="channels_last_wide", x=(2, 320, 2, 2), groups=1, layout="channels_last", entries=SPLIT),
    Group(id="channels_last_half", x=(1, 40, 36, 36), groups=4,
        layout="channels_last", activation="relu", dtypes=HALF, entries=SPLIT),
    Group(id="channels_last_offset", x=(3, 16, 6, 5), groups=2, layout="channels_last_offset"),
    Group(id="sliced", x=(3, 4, 6, 5), groups=2, layout="sliced"),
    Group(id="transposed", x=(3, 4, 6, 5), groups=2, layout="transposed"),
    Group(id="expanded", x=(3, 4, 6, 5), groups=2, layout="expanded"),
    Group(id="offset", x=(3, 8, 6, 6), groups=4, layout="offset", dtypes=ALL),
    *(
        Group(id=activation, x=(2, 8, 6, 6), groups=2, activation=activation,
            dtypes=ALL if activation in ("relu", "gelu") else FLOAT32)
        for activation in ACTIVATIONS if activation != "none"
    ),
    Group(id="gelu_channels_last", x=(2, 8, 6, 6), groups=2,
        layout="channels_last", activation="gelu", dtypes=ALL),
    Group(id="half_parameters", x=(3, 8, 6, 6), groups=4,
        half_parameters=True, activation="relu", dtypes=HALF),
    Group(id="plain", x=(3, 8, 6, 6), groups=4, affine="none", activation="silu"),
    Group(id="weight_alone", x=(3, 8, 6, 6), groups=4, affine="weight", activation="silu"),
    Group(id="bias_alone", x=(3, 8, 6, 6), groups=4, affine="bias", activation="silu"),
    Group(id="large_mean", x=(3, 8, 6, 6), groups=4, **LARGE_MEAN),
    Group(id="large_mean_channels_last", x=(3, 8, 6, 6), groups=2, layout="channels_last", **LARGE_MEAN),
    Group(id="large_mean_long", x=(2, 6, 100, 130), groups=2, **LARGE_MEAN),
    Group(id="large_mean_held", x=(1, 12, 28, 26), groups=1, **LARGE_MEAN),
    Group(id="large_mean_channels_last_held", x=(2, 16, 30, 31), groups=2,
        layout="channels_last", **LARGE_MEAN),
    Group(id="large_mean_channels_last_long", x=(1, 24, 47, 45), groups=2,
        layout="channels_last", **LARGE_MEAN),
    Layer(id="rows_of_7", x=(70, 7), entries=WHOLE),
    Layer(id="rows_of_96", x=(5, 13, 96), dtypes=ALL, schedules=True, entries=WHOLE),
    Layer(id="rows_of_1000", x=(3, 7, 1000)),
    Layer(id="rows_of_5000", x=(5, 5000), dtypes=(torch.float32, torch.bfloat16)),
    Layer(id="rows_of_26000", x=(2, 26000), schedules=True, entries=SPLIT),
    Layer(id="rows_of_52000", x=(2, 52000), dtypes=HALF, entries=SPLIT),
    Layer(id="rows_of_13001", x=(2, 13001), dtypes=(torch.float64,), entries=SPLIT),
    Layer(id="rows_of_10000", x=(3, 10000), dtypes=ALL, entries=HALF_SPLIT),
    Layer(id="one_row", x=(96,)),
    Layer(id="planes", x=(3, 4, 6, 10), normalized=2),
    Layer(id="many_rows", x=(9000, 8)),
    Layer(id="beside", x=(2, 7, 9, 24), layout="beside", dtypes=ALL, schedules=True, entries=WHOLE),
    Layer(id="beside_odd", x=(2, 35, 33), layout="beside"),
    Layer(id="beside_384", x=(1, 6, 6, 384), layout="beside", dtypes=(torch.float32, torch.float16)),
    Layer(id="beside_and_long", x=(2, 5, 9000), layout="beside"),
    Layer(id="every_other", x=(5, 6, 40), layout="every_other"),
    Layer(id="of_wider", x=(5, 6, 40), layout="of_wider"),
    Layer(id="swapped", x=(5, 6, 40), layout="swapped"),
    Layer(id="swapped_planes", x=(5, 6, 8, 10), layout="swapped", normalized=2),
    Layer(id="swapped_twice", x=(5, 6, 3, 40), layout="transposed"),
    Layer(id="channels_last_rows", x=(3, 8, 6, 5), layout="channels_last", normalized=3),
    Layer(id="layer_half_parameters", x=(5, 13, 96), half_parameters=True, dtypes=HALF),
    Layer(id="layer_plain", x=(5, 13, 96), affine="none"),
    Layer(id="layer_weight_alone", x=(5, 13, 96), affine="weight"),
    Layer(id="layer_large_mean", x=(5, 13, 96), **LARGE_MEAN),
    Layer(id="layer_large_mean_long", x=(2, 26000), **LARGE_MEAN),
    Layer(id="layer_offset", x=(5, 13, 96), layout="offset", dtypes=HALF),
)  # fmt: skip
BY_ID = {row.id: row for row in ROWS}


TURNS = torch.float64, torch.float16, torch.bfloat16


def _grid(rows: Iterable[Row]) -> list[Any]:
    """Rows in their types; of four all but float32 take turns."""
    return [
        pytest.param(row, dtype, id=f"{row.id}-{str(dtype).removeprefix('torch.')}")
        for i, row in enumerate(rows)
        for dtype in row.dtypes
        if len(row.dtypes) < 4 or dtype in (torch.float32, TURNS[i % 3])
    ]


def _check(row: Row, tensors: dict[str, Any], results: dict[str, Any]) -> None:
    tolerance = TOLERANCE[tensors["x"].dtype]
    for name, want in row.expected(tensors).items():
        got = results[name]
        limit = tolerance.gradient if name.startswith("grad") else tolerance.output
        if name in ("mean", "rstd"):  # not rounded to a half type
            limit = TOLERANCE[got.dtype].output
        assert_close(got, want, limit, f"{row.id}, {name}")


def test_rows_are_named_once() -> None:
    assert len(BY_ID) == len(ROWS)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("row, dtype", _grid(ROWS))
def test_rows(row: Row, dtype: torch.dtype, engine: str) -> None:
    tensors = row.tensors(dtype, device_of(engine))
    _check(row, tensors, row.compute(tensors))


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("row, dtype", _grid(row for row in ROWS if row.entries))
def test_number_of_launches(row: Row, dtype: torch.dtype, engine: str) -> None:
    """A slab that fits in a block takes one launch forward and two backward."""
    tensors = row.tensors(dtype, device_of(engine))
    with trace(run=False) as launches:
        row.compute(tensors)
    names = [launch.kernel.entry for launch in launches]
    assert [name.rpartition("_")[2] for name in names] == row.entries.split()


@pytest.mark.parametrize("engine", GPU[:1])
@pytest.mark.parametrize("row", [row for row in ROWS if row.schedules], ids=lambda row: row.id)
def test_thread_order_does_not_matter(row: Row, engine: str) -> None:
    tensors = row.tensors(torch.float32, "cpu")
    with emulate.schedule("all"):
        _check(row, tensors, row.compute(tensors))


GRADIENTS = ("grad_x", "grad_weight", "grad_bias")


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize(
    "id_", ["usual", "instance", "channels_last", "long", "rows_of_96", "rows_of_26000", "beside"]
)
def test_parts_of_the_gradient(id_: str, engine: str) -> None:
    """Those that are asked for are, bit by bit, what they are when all are."""
    row = BY_ID[id_]
    tensors = row.tensors(torch.float32, device_of(engine))
    every = row.compute(tensors)
    for count in (1, 2):
        for wanted in itertools.combinations(GRADIENTS, count):
            results = {
                n: torch.full_like(every[n], -7.0) if n in wanted else None for n in GRADIENTS
            }
            row.backward(tensors, {**every, **results})
            for name in wanted:
                assert torch.equal(results[name], every[name]), (wanted, name)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("id_", ["beside", "beside_odd", "swapped", "transposed_rows"])
def test_results_in_other_places(id_: str, engine: str) -> None:
    """A layer's results may lie as its input does, and its output's gradient otherwise than its input."""
    row = BY_ID.get(id_, Layer(id="transposed_rows", x=(2, 3, 5, 8), layout="transposed"))
    tensors = row.tensors(torch.float32, device_of(engine))
    results = {**row.results(tensors, row.statistics)}
    results["y"], results["grad_x"] = (torch.empty_like(tensors["x"]) for _ in range(2))
    row.forward(tensors, results)
    tensors["grad_y"] = tensors["grad_y"].contiguous()
    row.backward(tensors, results)
    _check(row, tensors, results)


@pytest.mark.parametrize("engine", GPU)
def test_layouts_that_cross(engine: str) -> None:
    """Channels-last images, a contiguous gradient of the result, and results in either layout."""
    row = BY_ID["usual"]
    tensors = row.tensors(torch.float32, device_of(engine))
    tensors["x"] = tensors["x"].to(memory_format=torch.channels_last)
    for form in (torch.contiguous_format, torch.channels_last):
        results = row.results(tensors, row.statistics)
        for name in ("y", "grad_x"):
            results[name] = results[name].to(memory_format=form)
        row.forward(tensors, results)
        row.backward(tensors, results)
        _check(row, tensors, results)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("channels_last", [False, True])
def test_instance_norm(channels_last: bool, engine: str) -> None:
    row = Group(
        id="", x=(3, 5, 6, 7), groups=5, layout="channels_last" if channels_last else "contiguous"
    )
    tensors = row.tensors(torch.float32, device_of(engine))
    results = row.compute(tensors)
    x, weight, bias = (tensors[n].cpu().double() for n in ("x", "weight", "bias"))
    reference = F.instance_norm(x, None, None, weight, bias, True, 0.1, row.eps)
    assert_close(results["y"], reference, TOLERANCE[torch.float32].output, "y")


CONSTANT = (
    Group(id="group", x=(3, 8, 6, 6), groups=4, scale=0.0),
    Group(id="channels_last", x=(3, 8, 6, 6), groups=4, layout="channels_last", scale=0.0),
    Group(id="long", x=(2, 6, 100, 130), groups=2, scale=0.0),
    Group(id="one_value", x=(3, 40), groups=40),
    Layer(id="layer", x=(5, 13, 96), scale=0.0),
    Layer(id="layer_one_value", x=(6, 1)),
)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("row", CONSTANT, ids=lambda row: row.id)
def test_slabs_of_equal_values(row: Row, engine: str) -> None:
    """Variance 0: rstd is 1 / sqrt(eps), every result the bias, and the weight has no gradient.

    What is left of g after its mean is times a rstd of 316, so grad_x is compared with that.
    """
    tensors = row.tensors(torch.float32, device_of(engine))
    results = row.compute(tensors)
    bias, grad_y = tensors["bias"].cpu(), tensors["grad_y"].cpu()
    if isinstance(row, Group):
        bias = bias.view(-1, *(1,) * (len(row.x) - 2))
    assert torch.equal(results["y"].cpu(), bias.expand(row.x))
    assert torch.equal(
        results["mean"].cpu(), tensors["x"].cpu().reshape(*row.statistics, -1)[..., 0]
    )
    assert torch.allclose(results["rstd"].cpu(), torch.tensor(row.eps).rsqrt())
    assert not results["grad_weight"].any()
    assert_close(results["grad_bias"], row.expected(tensors)["grad_bias"], 1e-6, "grad_bias")
    scale = row.eps**-0.5 * float(grad_y.double().norm())
    assert (
        results["grad_x"].cpu().double() - row.expected(tensors)["grad_x"]
    ).norm() < 1e-6 * scale


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """No plan from before the test, nor from it after."""
    caches = group_norm._fwd_plan, group_norm._bwd_plan
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize(
    "id_", ["usual", "channels_last", "long", "rows_of_96", "rows_of_26000", "beside"]
)
def test_64_bit_indices(
    id_: str, engine: str, fresh_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tensors of 2^31 elements take, of few."""
    monkeypatch.setattr(group_norm, "INT32_MAX", 0)
    row = BY_ID[id_]
    tensors = row.tensors(torch.float32, device_of(engine))
    with trace() as launches:
        results = row.compute(tensors)
    assert {dict(launch.kernel.constants)["INDEX"] for launch in launches} == {"long long"}
    _check(row, tensors, results)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("id_, turns", [
    ("long", 8), ("channels_last_long", 8), ("rows_of_26000", 8), ("many_rows", 1), ("rows_of_1000", 1),
    ("beside", 1),
])  # fmt: skip
def test_few_blocks(
    id_: str, turns: int, engine: str, fresh_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large tensors take, of small ones: one block walks over all rows, or a line in turns."""
    monkeypatch.setattr(group_norm, "WALKERS", 1)
    row = BY_ID[id_]
    tensors = row.tensors(torch.float32, device_of(engine))
    with trace() as launches:
        results = row.compute(tensors)
    assert launches[0].params.turns == turns
    if isinstance(row, Layer):
        assert launches[-1].params.walkers.divisor == 1
    _check(row, tensors, results)


@pytest.mark.parametrize("engine", GPU)
@pytest.mark.parametrize("row", [Group(id="", x=(2, 8, 6, 6), groups=4), Layer(id="", x=(2, 6, 8))])
def test_huge_strides(row: Row, engine: str) -> None:
    """Images so far apart that 32 bits do not number their elements; run where that much memory is cheap."""
    far = 2**31
    tensors = row.tensors(torch.bfloat16, device_of(engine))
    for name in ("x", "grad_y"):
        dense = tensors[name]
        # Address space; only pages that are written become memory.
        space = dense.new_empty(far + dense[0].numel())
        tensors[name] = space.as_strided(dense.shape, (far, *dense.stride()[1:]))
        if dense.is_cuda:
            tensors[name].copy_(dense)
    with trace(run=engine == "cuda") as launches:
        results = row.compute(tensors)
    assert {dict(launch.kernel.constants)["INDEX"] for launch in launches} == {"long long"}
    if engine == "cuda":
        _check(row, tensors, results)


@pytest.mark.parametrize("engine", GPU[:1])
@pytest.mark.parametrize(
    "row",
    [
        Group(id="places", x=(2, 8, 24, 24), groups=4, affine="none"),
        Group(
            id="channels_last", x=(2, 64, 11, 11), groups=2, layout="channels_last", affine="none"
        ),
        Layer(id="rows", x=(64, 1000), affine="none"),
        Layer(id="beside", x=(2, 8, 8, 96), layout="beside", affine="none"),
    ],
    ids=lambda row: row.id,
)
def test_every_tensor_is_read_once(row: Row, engine: str) -> None:
    """Forward one tensor and backward two, and by whole sectors."""
    tensors = row.tensors(torch.float32, "cpu")
    sectors = tensors["x"].numel() * 4 // 32
    with emulate.profile() as launches:
        row.compute(tensors)
    for profile, reads in zip(launches, (1, 2), strict=False):
        for writes, tensors_moved in ((False, reads), (True, 1)):
            lines = [t for t in profile.traffic if not t.shared and t.writes == writes]
            moved_sectors = sum(line.units for line in lines)
            # First values, statistics and partial sums are the rest.
            assert tensors_moved * sectors <= moved_sectors < (tensors_moved + 0.15) * sectors


def test_what_is_supported() -> None:
    group, layer = GroupShape(2, 8, (6, 6), 4), LayerShape((5,), (96,))
    for dtype in ALL:
        assert group_norm.supports("group_norm_fwd", group, dtype) is None
        assert group_norm.supports("layer_norm_bwd", layer, dtype) is None
    for op, shape, dtype, reason in (
        ("group_norm_fwd", layer, torch.float32, "expected a GroupShape, got LayerShape"),
        ("layer_norm_bwd", NormShape(2, 8, (6,)), torch.float32, "expected a LayerShape, got NormShape"),
        ("group_norm_bwd", group, torch.int32, "expected float32, float64, float16 or bfloat16"),
        ("group_norm_fwd", GroupShape(1, 2, (2**31,), 2), torch.float32, "expected at most"),
        ("layer_norm_fwd", LayerShape((2**31,), (1,)), torch.float32, "expected at most"),
    ):  # fmt: skip
        assert reason in (group_norm.supports(op, shape, dtype) or ""), (op, shape)
