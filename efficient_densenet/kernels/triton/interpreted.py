"""Triton's interpreter, put right where it does not compute as a device does.

It holds bfloat16 as 16-bit integers, multiplies matrices of them as integers, rounds float32 to
them towards zero, and reads the smallest of them as zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Makes bfloat16 what it is on a device: exact in products, rounded to the nearest even."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(values: Any, source: Any, result: Any, mode: Any) -> Any:
        values = np.ascontiguousarray(values)
        if (source, result) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(values).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16)
        if (source, result) == (tl.bfloat16, tl.float32):
            numbers = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            return numbers.float().numpy().view(np.uint32)
        return convert(values, source, result, mode)

    def of_values(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (builder.cast_impl(f, tl.float32) if f.dtype == tl.bfloat16 else f for f in (a, b))
        return dot(builder, a, b, *rest)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = of_values
