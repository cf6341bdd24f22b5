"""The row: what a solver does after one evaluation of the UNet, as numbers; and the one function that does it.

Given its time grid, every solver here is linear. From the sample x, the UNet's output o, a sample x_anchor saved at
an earlier row, the last few predictions m_j (m_0 is this row's) and fresh noise z, a row makes

    x̂  = x + churn·z                            (Euler's churn only; else x̂ = x)
    x0 = x0_x·x̂ + x0_out·o, then clipped         the clean image that the UNet believes in
    m  = m_x·x̂ + m_x0·x0 + m_out·o              what the solver keeps: x0, ε, or the output itself
    x' = a·x̂ + p·x_anchor + Σ_j b_j·m_j + c·z

so a solver is a function from a grid to rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Number = Any  # a float; an array (N,) in a table of rows; an array (B, 1, 1, 1) with a row for each sample


class Row(NamedTuple):
    """Coefficients of a row (see the formula above), as floats or as arrays.

    Attributes:
        t: Time that the UNet is told.
        scale: The UNet sees scale·x.
        clip: Bound on |x0|; infinite if there is none.
        keep: 1 if x̂ becomes the anchor, before the update.
        draw: 1 if the row draws noise (a last row may draw it and weigh it with c = 0).
    """

    t: Number
    x0_x: Number
    x0_out: Number
    scale: Number = 1.0
    churn: Number = 0.0
    clip: Number = math.inf
    m_x: Number = 0.0
    m_x0: Number = 0.0
    m_out: Number = 0.0
    a: Number = 0.0
    p: Number = 0.0
    c: Number = 0.0
    keep: Number = 0.0
    draw: Number = 0.0
    b: tuple[Number, ...] = (1.0,)


class Memory(NamedTuple):
    """What a run carries beside the sample: the anchor (B, C, H, W), and the last predictions m, newest first.

    It is empty at the start; for rows as arrays, it is `blank_memory`.
    """

    anchor: Any = None
    history: tuple[Any, ...] = ()


def blank_memory(x: Any, depth: int) -> Memory:
    """A memory whose structure never changes, as rows that are arrays and `lax.scan` need it.

    Args:
        x: (B, C, H, W), the samples at the start.
        depth: `len(row.b)`.
    """
    return Memory(x, (x * 0,) * (depth - 1))


def step(
    row: Row,
    x: Any,
    output: Any,
    memory: Memory,
    noise: Any = None,
    *,
    threshold: tuple[float, float] | None = None,
    want_x0: bool = True,
    xp: Any,
) -> tuple[Any, Any, Any, Memory]:
    """Apply a row to a batch, in the dtype of the samples.

    Args:
        row: Floats, or arrays (B, 1, 1, 1) with a row for each sample.
        x: (B, C, H, W), the samples.
        output: (B, C, H, W), what the UNet gave for `row.scale * x` at `row.t`.
        memory: What the step before returned.
        noise: (B, C, H, W) standard normal; used where `row.draw`.
        threshold: (ratio, bound) of dynamic thresholding, instead of clipping.
        want_x0: Without it, x0 is `None` where the row does not need it.
        xp: The array library, `torch` or `jax.numpy`.

    Returns:
        The next samples, x0, m, and the memory for the next step.
    """
    x = _combine((1.0, x), (row.churn, noise))
    needed = want_x0 or not isinstance(row.m_x0, float) or row.m_x0 != 0
    x0 = _combine((row.x0_x, x), (row.x0_out, output)) if needed else None
    if x0 is None:
        pass
    elif threshold is not None:
        x0 = dynamic_threshold(x0, *threshold, xp=xp)
    elif not (isinstance(row.clip, float) and row.clip == math.inf):
        x0 = xp.clip(x0, -row.clip, row.clip)
    m = _combine((row.m_x, x), (row.m_x0, x0), (row.m_out, output))
    if isinstance(row.keep, float):
        anchor = x if row.keep else memory.anchor
    else:
        anchor = xp.where(row.keep > 0, x, memory.anchor)
    history = (m, *memory.history)[: len(row.b)]
    weighed = zip(row.b, history, strict=False)  # of a run that has just begun the history is shorter, and b = 0 there
    after = _combine((row.a, x), (row.p, anchor), *weighed, (row.c, noise))
    return after, x0, m, Memory(anchor, history[: len(row.b) - 1])


def _combine(*terms: tuple[Number, Any]) -> Any:
    """Σ coefficient·array, without the terms that a plain float says are zero, and without absent noise."""
    used = [(k, v) for k, v in terms if not (v is None or (isinstance(k, float) and k == 0))]
    if not used:
        return terms[0][1] * 0
    k, v = used[0]
    total = v if isinstance(k, float) and k == 1 else v * k
    for k, v in used[1:]:  # torch scales and adds in one pass
        total = total.add(v, alpha=k) if isinstance(k, float) and hasattr(total, "add") else total + v * k
    return total


def dynamic_threshold(x0: Any, ratio: float, bound: float, *, xp: Any) -> Any:
    """Clip to [-s, s] and divide by s, the `ratio` quantile of |x0| in each sample, within [1, bound]; (B, …) → (B, …).

    Imagen's rule for pixels (arXiv 2205.11487, section 2.3); it does not suit latents.
    """
    s = xp.clip(xp.quantile(xp.abs(x0.reshape(len(x0), -1)), ratio, 1), 1, bound)
    s = s.reshape(-1, *(1 for _ in x0.shape[1:]))
    return xp.clip(x0, -s, s) / s


def finish(rows: Sequence[Row], *, clip: float = math.inf, threshold: bool = False, keep_m: bool = True) -> list[Row]:
    """A solver's rows as plain floats, with histories of one length, and m without x0 where nothing bounds x0.

    Without `keep_m`, where no later row looks back at m, it becomes the output itself, which costs nothing.
    """
    done = []
    for row in _even(rows):
        if clip == math.inf and not threshold:  # m is linear in x and the output; this way, ε is exact where it cancels
            m_x, m_out = row.m_x + row.m_x0 * row.x0_x, row.m_out + row.m_x0 * row.x0_out
            row = row._replace(m_x=m_x if abs(m_x) > 1e-14 else 0.0, m_x0=0.0, m_out=m_out)
            if len(row.b) == 1 and not keep_m:
                row = row._replace(a=row.a + row.b[0] * row.m_x, b=(row.b[0] * m_out,), m_x=0.0, m_out=1.0)
        done.append(Row._make([*map(float, row[:-1]), tuple(map(float, row.b))])._replace(clip=clip))
    return done


def _even(rows: Sequence[Row]) -> list[Row]:
    """Rows whose b have one length, filled up with zeros."""
    depth = max(len(row.b) for row in rows)
    return [row._replace(b=(*row.b, *(0.0,) * (depth - len(row.b)))) for row in rows]


def table(rows: Sequence[Row]) -> Row:
    """Rows, of one solver or of several, as one row of float64 arrays (N,) that `lax.scan` can run through."""
    columns = [np.array(column) for column in zip(*_even(rows), strict=True)]
    return Row._make([*columns[:-1], tuple(columns[-1].T)])
