"""In which arithmetic networks multiply. Weights, sums of embeddings, losses and probabilities are always float32."""

from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
NATIVE = ("avx512_bf16", "amx_bf16")
"""Instruction sets of CPUs that multiply bfloat16; without them it is emulated, and slower than float32."""


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that `precision` means on `device`; `auto` is bfloat16 where the device multiplies it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # older versions of PyTorch do not say
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name, False) for name in NATIVE)
    return torch.bfloat16 if native else torch.float32


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which dense layers multiply in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
