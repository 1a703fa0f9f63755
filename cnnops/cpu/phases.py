"""Several phases in one run of a task, each of which needs all of the one before.

Workers take the indices of such a task, which is made with `in_order`, in rising order. So whoever waits for
those below its own waits for workers that have begun them: nobody waits for itself, and with one worker
nobody at all. The count of indices done is kept in the task's first argument, an int64 that is passed as
0: its address is the arguments' own.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import os

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd
from cnnops.cpu.compiler import routine

_I64 = ir.IntType(64)

SPINS = 2000
"""Looks at the count, some microseconds of them, before the core is given away."""


@intrinsic
def done(typing_context, address):
    """Count this index as done: who sees the count sees what was written before."""

    def generate(context, builder, signature, values):
        place = builder.inttoptr(values[0], _I64.as_pointer())
        builder.atomic_rmw("add", place, _I64(1), "release")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _count(typing_context, address):
    def generate(context, builder, signature, values):
        place = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _give_way(typing_context):
    """Let another thread have this core, where the system has a call for that."""

    def generate(context, builder, signature, values):
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(simd.declared(builder.module, "sched_yield", kind), [])
        return context.get_dummy_value()

    return types.void(), generate


@routine
def wait(address, indices):
    """Until so many indices are done."""
    looked = 0
    while _count(address) < indices:
        looked += 1
        if looked > SPINS:
            _give_way()  # on a busy machine, whom this waits for may be waiting for this core
