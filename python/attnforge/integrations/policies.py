"""Sparse decode policies in transformers by name: ``attn_implementation="attnforge:quest"``.

    import attnforge.integrations.policies as sparse_decode
    sparse_decode.enable("quest", budget=1024, dense=(0, 1))
    model.set_attn_implementation("attnforge:quest")
    model.generate(...)

A step of one token per sequence attends to the keys that the policy chooses from the model's own
cache. A prompt is dense and the policy looks at it, or goes in chunks that choose keys for
themselves (``prefill="chunks"``). Layers in ``dense`` are always dense.

Served: causal models without gradients, batches, padding before and behind a sequence, caches that
hold all keys, prompts in pieces. Windows, softcap, sinks, packed sequences and masks of other form
raise an error except in dense layers. A sequence begins where a call has as many keys as queries:
what the policy knew of the layer is forgotten there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import attnforge
from attnforge.integrations._hook import Handle, describe, refuse, register
from attnforge.integrations._mask_plan import Piece, Plan
from attnforge.integrations._paged_states import PagedStates
from attnforge.integrations.transformers import attention_forward
from attnforge.policies import POLICIES, Policy

__all__ = ["Handle", "PolicyAttention", "enable"]

_WHERE = "attnforge.integrations.policies"


class PolicyAttention:
    """The attention function of a policy, called as `transformers.attention_forward` is.

    make: gives a fresh policy. ``policies`` has the one of the batch under None, where all
    sequences are alike, else that of each sequence: a policy knows no padding.
    """

    def __init__(
        self, make: Callable[[], Policy], *, dense: Collection[int] = (), prefill: str = "dense",
        chunk: int = 256,
    ) -> None:  # fmt: skip
        if prefill not in ("dense", "chunks"):
            raise ValueError(f"{_WHERE}: prefill is {prefill!r}; want 'dense' or 'chunks'")
        self.make, self.dense = make, frozenset(dense)
        self.chunk = chunk if prefill == "chunks" else None
        self.policies: dict[int | None, Policy] = {}
        policy = self.policy(None)
        if self.chunk is not None and not policy.chunked:
            raise ValueError(f"{_WHERE}: {type(policy).__name__} does not choose keys for a chunk "
                             "of queries; want prefill='dense'")  # fmt: skip

    def policy(self, sequence: int | None) -> Policy:
        """The policy of a sequence; None is the whole batch."""
        if sequence not in self.policies:
            self.policies[sequence] = self.make()
        return self.policies[sequence]

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer: Any = module.layer_idx
        if layer in self.dense:
            return attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, sliding_window,
                softcap, is_causal, s_aux, position_ids=position_ids, **kwargs,
            )  # fmt: skip
        refuse(dropout, kwargs)
        self._refuse(query, key, softcap, s_aux, kwargs)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        plan = describe(q, k, attention_mask, bool(causal), sliding_window)
        if not isinstance(plan, Plan):
            plan.split_at_restarts(position_ids)
            plan = plan.plan()
        if scaling is not None:  # policies and indices see one scale
            ratio = scaling * q.shape[-1] ** 0.5
            q = q if abs(ratio - 1) < 1e-6 else q * ratio
        if plan.uniform is not None:
            return self._run(self.policy(None), layer, q, k, v, plan.uniform), None
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])  # rows of padding stay 0
        seen: set[int] = set()
        for piece in plan.pieces:
            if piece.batch in seen:
                raise ValueError(f"{_WHERE}: packed sequences are not supported; want one sequence "
                                 "per row of the batch")  # fmt: skip
            seen.add(piece.batch)
            b = slice(piece.batch, piece.batch + 1)
            own = self.policy(piece.batch)
            out[b] = self._run(own, layer, q[b], k[b], v[b], piece)
        return out, None

    def _refuse(
        self, query: Tensor, key: Any, softcap: Any, sinks: Any, kwargs: dict[str, Any]
    ) -> None:
        given = {
            "gradients": torch.is_grad_enabled() and query.requires_grad,
            "softcap": softcap,
            "sinks": sinks is not None,
            "cu_seq_lens_q": kwargs.get("cu_seq_lens_q") is not None,
            "a PagedCache": isinstance(key, PagedStates),
        }
        for name, there in given.items():
            if there:
                raise ValueError(
                    f"{_WHERE}: policies do not serve {name}; use "
                    'attn_implementation="attnforge", or name the layer in dense='
                )

    def _run(self, policy: Policy, layer: int, q: Tensor, k: Tensor, v: Tensor, p: Piece) -> Tensor:
        """One piece of all batch entries given; rows outside it are 0."""
        if not p.causal or p.left >= 0 or p.q_index is not None:
            raise ValueError(
                f"{_WHERE}: a mask is not plain causal (a window, chunks, a bidirectional layer, "
                'or padding between tokens); use attn_implementation="attnforge", or name the '
                "layer in dense="
            )
        rows = q.shape[1]
        q, k, v = q[:, p.q0 : p.q1], k[:, p.k0 : p.k1], v[:, p.k0 : p.k1]
        if q.shape[1] == k.shape[1]:
            policy.forget(layer)
        if q.shape[1] == 1 and k.shape[1] > 1:
            out: Tensor = policy.attend(q, k, v, layer=layer)
        else:
            if self.chunk is None:
                out = attnforge.flash_attention(q, k, v, causal=True)
            else:
                out = policy.prefill(q, k, v, layer=layer, chunk=self.chunk)
            policy.observe(q, k, v, layer=layer)
        around = (p.q0, rows - p.q1)
        return out if around == (0, 0) else torch.nn.functional.pad(out, (0, 0, 0, 0, *around))


def enable(
    policy: str | Callable[[], Policy], *, name: str | None = None, dense: Collection[int] = (),
    prefill: str = "dense", chunk: int = 256, **settings: Any,
) -> Handle:  # fmt: skip
    """Make a policy available to transformers models as ``attn_implementation="attnforge:..."``.

    policy: a name of `attnforge.policies.POLICIES`, made with ``settings`` (its budget among
        them); or a function that makes a policy, with a name of its own.
    name: what models select; default "attnforge:" and the policy's name. Calling again with the
        same name replaces the policy.
    dense: layers that attend to all keys. prefill: "dense", or "chunks" of ``chunk`` queries that
        choose budget keys each.

    Returns:
        a `Handle` with `.remove()`, also a context manager.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: no such policy, settings that do not fit, or the name is used by others.
        TypeError: the policy has no such setting.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"{_WHERE}.enable: no policy {policy!r}; there are {sorted(POLICIES)}")
        name = f"attnforge:{policy}" if name is None else name
        kind = POLICIES[policy]
        make: Callable[[], Policy] = lambda: kind(**settings)  # noqa: E731
    else:
        make = policy
    if name is None or not name.startswith("attnforge:"):
        raise ValueError(f'{_WHERE}.enable: name is {name!r}; want one like "attnforge:mine"')
    function = PolicyAttention(make, dense=dense, prefill=prefill, chunk=chunk)
    return register(_WHERE, name, function, lambda taken: isinstance(taken, PolicyAttention))
