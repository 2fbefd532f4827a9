"""Transformer blocks. Parameter names and shapes are timm's (`norm1`, `attn.qkv`, `attn.proj`, `mlp.fc1`, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchmae.errors import ConfigError

LAYER_NORM_EPS = 1e-6
FEW_TOKENS = 64
MOST_PLAIN_TOKENS = 1024  # in bf16; with more, plain attention weights take more memory than the rest of a block


def _heads(width: int, num_heads: int) -> int:
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"width {width} cannot be divided among {num_heads} heads", "use a divisor of the width")
    return num_heads


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, heads, N, D) queries and (B, heads, M, D) keys and values.

    This is PyTorch's fused attention, except for training on the CPU in bf16 or with few tokens. There the fused
    backward pass takes longer than plain matrix products: 1.2 to 6 times in bf16 (17 to 257 tokens), up to 2.4 times in
    fp32 (17 to 50 tokens); see benchmarks/attention.py.
    """
    if q.device.type == "cpu":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # one copy here saves several inside
        most = MOST_PLAIN_TOKENS if q.dtype == torch.bfloat16 else FEW_TOKENS
        if q.requires_grad and k.shape[-2] <= most:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            return weights.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; `num_heads` divides the width `dim`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = _heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        batch, tokens, dim = x.shape
        # unbind, not indexing: each index would allocate a gradient of zeros for all three.
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).unbind(2)  # (B, N, heads, D/heads) each
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to context tokens, both of width `dim`, which `num_heads` divides."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = _heads(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries (B, M, D) and context (B, K, D) to (B, M, D)."""
        batch, queries, dim = x.shape
        q = self.q(x).view(batch, queries, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(context).view(batch, context.shape[1], 2, self.num_heads, -1).unbind(2)
        out = attend(q, k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, queries, dim))


class Mlp(nn.Module):
    """Two linear layers, from `dim` to `hidden_dim` and back, with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ConfigError(f"an MLP of width {dim} has {hidden_dim} hidden values", "use a larger mlp_ratio")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))

    def flops(self, tokens: int) -> int:
        """Operations of a forward pass."""
        return 2 * 2 * tokens * self.fc1.in_features * self.fc1.out_features


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): training zeroes a sample's residual with probability `rate`, in [0, 1)."""

    drop_share: Tensor
    keep_share: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.active = rate > 0
        # Tensors, not numbers: blocks that differ only in their rate then share their compiled code.
        self.register_buffer("drop_share", torch.tensor(float(rate)), persistent=False)
        self.register_buffer("keep_share", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...)."""
        if not (self.active and self.training):
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.drop_share
        return x * keep / self.keep_share


class Block(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2021).

    The MLP's width is `mlp_ratio` times `dim`, rounded down as in timm; `drop_path` is the stochastic depth rate.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self, tokens: int) -> int:
        """Operations of a forward pass: projections, attention, MLP."""
        dim = self.norm1.normalized_shape[0]
        return 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim + self.mlp.flops(tokens)


class CrossBlock(nn.Module):
    """A pre-norm block whose queries attend to a context and not to each other (Fu et al. 2024, CrossMAE)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries (B, M, D) and context (B, K, D) to (B, M, D)."""
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))

    def flops(self, queries: int, context: int) -> int:
        """Operations of a forward pass with `context` tokens."""
        dim = self.norm1.normalized_shape[0]
        projections = 2 * dim * dim * (2 * queries + 2 * context)
        return projections + 4 * queries * context * dim + self.mlp.flops(queries)


def blocks_flops(blocks: nn.ModuleList, *tokens: int) -> int:
    """Operations of a forward pass of one image through the blocks."""
    return sum(cast(Block | CrossBlock, block).flops(*tokens) for block in blocks)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, ones and zeros for norms (paper section A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built in this context are on the device "meta": shapes without memory, and no random numbers drawn."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Skips random fills. For a tensor without memory they do nothing, and would import the compiler: 2 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **kwargs or {})
