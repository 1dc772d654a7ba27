"""Triton's interpreter in two thirds of its time: it replaces `triton.language`'s functions once a kernel.

By itself it looks through all of them again at every call of a function inside a kernel.
"""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace

from triton import language


def once_a_kernel(patch_lang):
    """An interpreter's `_patch_lang` that leaves modules unchanged which the kernel around a call has patched."""
    patched: set[ModuleType] = set()

    def patch(fn):
        modules = {one for one in fn.__globals__.values() if inspect.ismodule(one)} & {language, language.core}
        if modules and modules <= patched:
            return SimpleNamespace(restore=lambda: None)
        is_kernel, scope = not patched, patch_lang(fn)
        patched.update(modules)
        if is_kernel:
            put_back = scope.restore
            scope.restore = lambda: (patched.clear(), put_back())
        return scope

    return patch
