"""cuDNN by its graph API, where the package nvidia-cudnn-frontend is installed: a convolution, planned once.

What `torch.nn.functional.conv2d` asks of cuDNN goes by an older interface and torch's own choice of layout.
Here cuDNN gets the problem as it is, bias and all, and its heuristics choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.suites import Row
from cnnops.ops import new_strides
from cnnops.shapes import ConvShape


class Unavailable(Exception):
    """cuDNN's graph API cannot be asked; the message says why."""


def convolution(row: Row, sets: Sequence[Any]) -> Callable[[int], tuple[Tensor, ...]]:
    """``run(i)``: the row on the i-th of `sets` (`bench.rivals.Inputs`), all of the same strides.

    Raises Unavailable for what is no 2-D or 3-D convolution and without the package, and what cuDNN raises.
    """
    shape = row.shape
    if row.case.kind != "conv" or not isinstance(shape, ConvShape) or shape.dims < 2:
        raise Unavailable("only 2-D and 3-D convolutions are asked of it")
    try:
        import cudnn
    except ImportError:
        raise Unavailable("nvidia-cudnn-frontend is not installed") from None

    types = {
        "float32": cudnn.data_type.FLOAT, "float16": cudnn.data_type.HALF,
        "bfloat16": cudnn.data_type.BFLOAT16, "float64": cudnn.data_type.DOUBLE,
    }  # fmt: skip
    element = types[row.dtype]
    accumulator = types["float64" if row.dtype == "float64" else "float32"]
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=element, intermediate_data_type=accumulator, compute_data_type=accumulator,
        handle=handle,
    )  # fmt: skip

    def declare(t: Tensor) -> Any:
        return graph.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=element)

    window = {
        "pre_padding": [before for before, _ in shape.padding],
        "post_padding": [after for _, after in shape.padding],
        "stride": list(shape.stride),
        "dilation": list(shape.dilation),
        "compute_data_type": accumulator,
    }
    first, bias = sets[0], None
    if row.direction == "fprop":
        names, size = ("x", "w"), shape.y_size
        x, w = (declare(getattr(first, name)) for name in names)
        result = graph.conv_fprop(image=x, weight=w, **window)
        inputs = [x, w]
        if first.bias is not None:
            bias = declare(_along_channels(first.bias, shape.dims))
            result = graph.bias(input=result, bias=bias, compute_data_type=accumulator)
    elif row.direction == "dgrad":
        names, size = ("grad", "w"), shape.x_size
        loss, w = (declare(getattr(first, name)) for name in names)
        result = graph.conv_dgrad(loss=loss, filter=w, **window)
        inputs = [loss, w]
    else:
        names, size = ("grad", "x"), shape.w_size
        loss, x = (declare(getattr(first, name)) for name in names)
        result = graph.conv_wgrad(image=x, loss=loss, **window)
        inputs = [loss, x]
    strides = new_strides(size, row.layout == "channels_last")
    result.set_output(True).set_data_type(element).set_dim(list(size)).set_stride(list(strides))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    device = first.x.device
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)

    def run(i: int) -> tuple[Tensor, ...]:
        t = sets[i % len(sets)]
        out = t.x.new_empty_strided(size, strides)
        given = dict(zip(inputs, (getattr(t, name) for name in names), strict=True))
        if bias is not None:
            given[bias] = _along_channels(t.bias, shape.dims)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        graph.execute({**given, result: out}, workspace, handle=handle)
        return (out,)

    return run


def _along_channels(bias: Tensor, dims: int) -> Tensor:
    """A bias as an activation of one image and one place."""
    return bias.view(1, -1, *(1,) * dims)
