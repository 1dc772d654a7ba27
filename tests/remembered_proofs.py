"""Self-tests that passed before, for tests that make the same tiny model again and again.

A self-test takes 40 ms, and most tests are of something else. It is taken from memory only where this process has
tested a model of the same class, device, attention and fingerprint (every weight, module, setting and config), and
neither has hooks of a user, nor a forward that stands in place of its class's.
"""

from __future__ import annotations

import copy
from itertools import chain

from hfblend.model.weights.description import is_foreign

_found = {}  # key -> what the self-test set


def key_of(hf_model):
    """What the self-test of a model depends on; `None` where it must run."""
    model = hf_model.model
    own = list(map(vars, model.modules()))
    hooks = chain.from_iterable((*m["_forward_hooks"].values(), *m["_forward_pre_hooks"].values()) for m in own)
    if any(map(is_foreign, hooks)) or hf_model.is_quantised or any("forward" in m or "_hf_hook" in m for m in own):
        return None
    attention = (model.config._attn_implementation, hf_model.config._attn_implementation)
    return type(model), type(hf_model.decoder), hf_model.device, attention, hf_model.fingerprint.digest


def remembered(prove):
    """A `TestedModel._self_test` that sets what `prove` set for the same model before."""

    def self_test(hf_model):
        key = key_of(hf_model)
        if key not in _found:
            before = dict(vars(hf_model))
            prove(hf_model)
            if key is None:
                return
            _found[key] = {k: v for k, v in vars(hf_model).items() if k not in before or v is not before[k]}
        vars(hf_model).update(copy.deepcopy(_found[key]))

    return self_test
