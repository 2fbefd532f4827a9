"""Muon in batches: matrices of one shape are orthogonalised together, for the update of `torch.optim.Muon`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from torchmae.training.runtime import has_fast_bf16


class BatchedMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) with the update size of AdamW (Liu et al. 2025, "match_rms_adamw").

    torch.optim.Muon orthogonalises one matrix after the other. Here all matrices of one shape (or its transpose) are
    one batch. Updates and saved state are the same, except on a processor without bf16 instructions, where the
    iteration runs in fp32.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[min(param.shape), max(param.shape)].append((param, param.grad))
            for shape, pairs in by_shape.items():
                self._step_together(pairs, shape, group)

    def _step_together(self, pairs: list[tuple[Tensor, Tensor]], shape: tuple[int, int], group: dict[str, Any]) -> None:
        """Updates matrices of one shape, wide or tall, by their gradients."""
        params, gradients = (list(column) for column in zip(*pairs, strict=True))
        wide = [param.shape[0] <= param.shape[1] for param in params]
        momenta: list[Tensor] = []
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            momenta.append(self.state[param]["momentum_buffer"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        dtype = torch.bfloat16 if has_fast_bf16(params[0].device) else torch.float32
        stack = torch.empty(len(params), *shape, dtype=dtype, device=params[0].device)
        torch._foreach_copy_(stack.unbind(), _turned(updates, wide))
        orthogonal = orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]).unbind()
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, _turned(orthogonal, wide), alpha=-group["lr"] * 0.2 * sqrt(shape[1]))


def _turned(matrices: Sequence[Tensor], wide: Sequence[bool]) -> list[Tensor]:
    """Transposes the matrices that are not wide."""
    return [matrix if is_wide else matrix.mT for matrix, is_wide in zip(matrices, wide, strict=True)]


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Brings every singular value near 1 by a quintic Newton-Schulz iteration (Jordan et al. 2024).

    `matrices`, (B, M, N) with M <= N, are changed in place. `coefficients` belong to x, x^3 and x^5. Matrices are
    divided by their norm, or by `eps` if that is larger. Returns (B, M, N).
    """
    a, b, c = coefficients
    x = matrices.div_(matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
