"""numba's compiler, of whose work kernels take the part that they need.

numba makes machine code of every function by itself, with wrappers for calls from Python, and optimises it
again wherever it is called. Of these functions only kernels are ever called, by address. What they call, a
`routine`, is typed, written in LLVM's language, linked, and optimised once, as a piece of a kernel: this
takes 0.6 of the time to compile one.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-subclassing-any
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numba
from numba.core import typed_passes
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass


class _Unhurried:
    """Of a library: its functions are not optimised one by one as they come."""

    _codegen: Any

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout


class _KernelLibrary(_Unhurried, JITCodeLibrary):
    """A kernel with all its routines, optimised once; numba's other rounds look for reference counts."""

    def _optimize_final_module(self):
        manager, builder = self._codegen._module_pass_manager()
        manager.run(self._final_module, builder)


class _RoutineLibrary(_Unhurried, CPUCodeLibrary):
    """Code to be linked into other libraries, as it comes."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


def _new_library(state: Any, kind: type) -> Any:
    library = kind(state.targetctx.codegen(), state.func_id.func_qualname)
    library.enable_object_caching()
    return library


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerKernel(typed_passes.NativeLowering):
    _name = "lower_kernel"

    def run_pass(self, state):
        state.library = _new_library(state, _KernelLibrary)
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerRoutine(typed_passes.NativeLowering):
    _name = "lower_routine"

    def run_pass(self, state):
        state.library = _new_library(state, _RoutineLibrary)
        flags = state.flags
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().run_pass(state)
        # What numba knows the function by: an object like the entry for Python that it would have made, and
        # like no other. To call it raises TypeError.
        entry = object().__dir__
        state.targetctx.insert_user_function(entry, state["cr"].fndesc, [state.library])
        state["cr"] = state["cr"]._replace(cfunc=entry)
        return True


def _pipeline(lower: type) -> type:
    class Pipeline(CompilerBase):
        def define_pipelines(self):
            usual = DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes = PassManager("cnnops")
            for each, description in usual.passes:
                passes.add_pass(lower if each is typed_passes.NativeLowering else each, description)
            passes.finalize()
            return [passes]

    return Pipeline


_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}

routine = partial(numba.njit, **_OPTIONS, pipeline_class=_pipeline(_LowerRoutine))
"""Decorates a function that kernels are made of, which Python itself can't call; takes further options of
`numba.njit`."""


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Most of what the compiler makes stays: to look for garbage takes a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def kernel(function: Callable[..., None], signature: Any) -> tuple[str, bytes]:
    """The name of a kernel's machine code, and the object file that it is in."""
    with _no_garbage():
        compiled = numba.cfunc(
            signature,
            nopython=True,
            fastmath={"contract"},
            pipeline_class=_pipeline(_LowerKernel),
            **_OPTIONS,
        )(function)
        return compiled.native_name, compiled._library._get_compiled_object()
