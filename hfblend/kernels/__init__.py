"""The Triton kernels of attention.py, reuse.py, norms.py, rotary.py and contents.py, each next to a plain function.

    attend          attention by position                                   attention.reference_attention
    received        how much attention each key gets from all rows          attention.attention_weights, summed
    load_rows       stored rows into a prompt's buffer, keys realigned      rope.rotate, and a copy
    write_rows      fresh K/V of a pass into a prompt's buffer              index_copy_
    rms_norm        a model's normalisation, six eager kernels in one       the model's own module
    rotary          its rotary embedding, a dozen in one                    the model's own function
    sample          a few elements of every weight                          contents.reference_views

A layer's cached state lies as *rows*, one a token: all heads' keys, then all heads' values (`caches.RowLayout`). A
chunk's rows of a layer are one block, wherever they stand.
"""

from .by_position import attend, received
from .norm import rms_norm
from .rotary import rotary
from .rows import load_rows, tiles_of, write_rows
from .samples import sample
from .state import State

__all__ = ["State", "attend", "load_rows", "received", "rms_norm", "rotary", "sample", "tiles_of", "write_rows"]
