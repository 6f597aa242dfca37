"""Triton's kernels on a processor, by its interpreter, with what that lacks to compute as a GPU does.

TRITON_INTERPRET=1 must be in the environment before triton is imported.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

INSTALLED = find_spec("triton") is not None and find_spec("liger_kernel") is not None
if INSTALLED:
    import triton
    import triton.language as tl  # an interpreted kernel looks for this name in its module

    @triton.jit
    def rsqrt(x):
        return tl.rsqrt(x)


reason = "needs triton, liger-kernel and TRITON_INTERPRET=1"
interpreted = pytest.mark.skipif(not INSTALLED or os.environ.get("TRITON_INTERPRET") != "1", reason=reason)


def complete_interpreter(monkeypatch):
    """Numbers among a kernel's arguments are tensors, bfloat16 is computed and rounded to nearest, rsqrt is there."""
    import liger_kernel.ops.rms_norm as liger_rms_norm
    from triton.runtime import interpreter

    convert, binary, cast = (
        interpreter._implicit_cvt,
        interpreter.InterpreterBuilder.binary_op,
        interpreter.InterpreterBuilder.cast_impl,
    )

    def handle(values, dtype):
        return interpreter.TensorHandle(values, dtype)

    def widened(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def rounded(values):
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def as_argument(value):
        if isinstance(value, float):
            return tl.tensor(handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        found = op(widened(left.data), widened(right.data))
        return handle(found if found.dtype == np.bool_ else rounded(found.astype(np.float32)), tl.bfloat16)

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return handle(rounded(source.data), tl.bfloat16)
        return cast(self, source, dtype)

    monkeypatch.setattr(interpreter, "_implicit_cvt", as_argument)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "binary_op", binary_op)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(liger_rms_norm, "rsqrt", rsqrt)
