"""The devices that run the Triton kernels."""

from functools import cache

import torch

try:
    import triton.language  # noqa: F401
except ImportError:  # it comes with PyTorch for GPUs
    HAS_TRITON = False
else:
    HAS_TRITON = True


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: an NVIDIA GPU of compute capability 8.0 or more."""
    is_nvidia = HAS_TRITON and device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
