"""flash-attn's interface (version 2) on attnforge's operators.

Names, argument order, defaults, layouts and masks are flash-attn's. What differs:

- any device, fp32 too, any head dim, a V head dim of its own, pages of any size;
- gradients are always deterministic, so ``deterministic`` changes nothing;
- a row that sees no key has an LSE of -inf (flash-attn: +inf) and, as there, an output of 0;
- ``return_attn_probs`` returns (out, softmax_lse, None): probabilities are never made;
- dropout draws its seed from torch's generator of the CPU (``torch.manual_seed``) and drops other
  elements than flash-attn does.
"""

from attnforge.compat.flash_attn._attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from attnforge.compat.flash_attn._kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
