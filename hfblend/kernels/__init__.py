"""Triton and Gluon kernels, each next to a plain function that computes the same.

    by_position.attend      attention by position                               reference.reference_attention
    by_position.received    how much attention each key gets from all rows      reference.attention_weights, summed
    rows.load_rows          stored rows into a prompt's buffer, keys realigned  rotation.rotate, and a copy
    rows.write_rows         fresh K/V of a pass into a prompt's buffer          index_copy_
    correction.OffsetKernels  what recomputed rows foretell, added to reused    corrector.Corrector with offset
    trust.Asking            how far keys are corrected                          blend.trust.trust
    small.rms_norm          a model's normalisation, six eager kernels in one   the model's own module
    small.rotary            its rotary embedding, a dozen in one                the model's own function
    small.sample            a few elements of every weight                      samples.reference_views

A layer's cached state lies as *rows*, one a token: all heads' keys, then all heads' values (`RowLayout`). A chunk's
rows of a layer are one block, wherever they stand.

Without Triton, which comes with PyTorch for GPUs, only the references can be imported: `device.HAS_TRITON` tells.
"""
