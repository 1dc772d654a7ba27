"""Triton and Gluon kernels, each next to a plain function that computes the same.

    attend          attention by position                                   reference.reference_attention
    received        how much attention each key gets from all rows          reference.attention_weights, summed
    load_rows       stored rows into a prompt's buffer, keys realigned      rotation.rotate, and a copy
    write_rows      fresh K/V of a pass into a prompt's buffer              index_copy_
    rms_norm        a model's normalisation, six eager kernels in one       the model's own module
    rotary          its rotary embedding, a dozen in one                    the model's own function
    sample          a few elements of every weight                          samples.reference_views

A layer's cached state lies as *rows*, one a token: all heads' keys, then all heads' values (`RowLayout`). A chunk's
rows of a layer are one block, wherever they stand.

Without Triton, which comes with PyTorch for GPUs, only the references are there.
"""

from .device import HAS_TRITON, has_kernels
from .reference import AttentionArgs

if HAS_TRITON:
    from .by_position import attend, received
    from .norm import rms_norm
    from .rotary import rotary
    from .rows import load_rows, tiles_of, write_rows
    from .samples import sample
    from .state import State

__all__ = ["HAS_TRITON", "AttentionArgs", "State", "attend", "has_kernels", "load_rows", "received", "rms_norm",
           "rotary", "sample", "tiles_of", "write_rows"]  # fmt: skip
