from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn.layers import (
    MOST_PLAIN_TOKENS,
    Attention,
    Block,
    CrossAttention,
    CrossBlock,
    DropPath,
    Mlp,
    attend,
    init_linear,
)


def by_hand(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of (N, D) queries, one head and one query at a time."""
    width = q.shape[1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        rows = [((k[:, part] @ query) / math.sqrt(width)).softmax(0) @ v[:, part] for query in q[:, part]]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1)


def test_attention_is_softmax_over_tokens_in_each_head() -> None:
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    out = attention(x)
    for sample in range(2):
        q, k, v = attention.qkv(x[sample]).split(12, dim=1)
        torch.testing.assert_close(out[sample], attention.proj(by_hand(q, k, v, 3)))


def test_cross_attention_reads_the_context() -> None:
    attention = CrossAttention(12, 2)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    out = attention(x, context)
    for sample in range(2):
        k, v = attention.kv(context[sample]).split(12, dim=1)
        torch.testing.assert_close(out[sample], attention.proj(by_hand(attention.q(x[sample]), k, v, 2)))


@pytest.mark.parametrize("num_heads", [0, -1, 5, 24])
def test_heads_that_do_not_divide_the_width(num_heads: int) -> None:
    for attention in (Attention, CrossAttention):
        with pytest.raises(ConfigError, match=f"width 12 cannot be divided among {num_heads} heads"):
            attention(12, num_heads)


def test_an_mlp_without_a_hidden_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="larger mlp_ratio"):
        Mlp(8, 0)
    with pytest.raises(ConfigError, match="larger mlp_ratio"):
        Block(8, 2, mlp_ratio=0.1)


@pytest.mark.parametrize(("ratio", "hidden"), [(4.0, 40), (2.67, 26), (0.5, 5)])
def test_the_hidden_width_is_rounded_down_as_timm_does(ratio: float, hidden: int) -> None:
    for block in (Block, CrossBlock):
        assert block(10, 2, ratio).mlp.fc1.out_features == hidden


def test_blocks_add_to_what_they_are_given() -> None:
    block, cross = Block(8, 2), CrossBlock(8, 2)
    for layer in (block.attn.proj, block.mlp.fc2, cross.cross_attn.proj, cross.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 8)
    assert torch.equal(block(x), x)
    assert torch.equal(cross(x, torch.randn(2, 4, 8)), x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.3)
    x = torch.ones(20000, 2, 3)
    out = drop(x)
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    dropped = (per_sample[:, 0] == 0).double().mean()
    assert dropped.item() == pytest.approx(0.3, abs=5 * (0.21 / 20000) ** 0.5)


def test_drop_path_does_nothing_at_rate_zero_or_outside_training() -> None:
    x = torch.randn(4, 2, 3)
    assert DropPath(0.0)(x) is x
    assert DropPath(0.9).eval()(x) is x


def test_drop_path_keeps_the_type() -> None:
    assert DropPath(0.5)(torch.ones(4, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_init_linear() -> None:
    linear, norm = nn.Linear(60, 40), nn.LayerNorm(8)
    nn.init.constant_(norm.bias, 3.0)
    nn.init.constant_(norm.weight, 3.0)
    init_linear(linear)
    init_linear(norm)
    bound = math.sqrt(6 / 100)
    assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert not linear.bias.any()
    assert (norm.weight == 1).all()
    assert not norm.bias.any()


def test_many_tokens_in_bf16_keep_no_square_of_their_number() -> None:
    tokens = MOST_PLAIN_TOKENS + 1
    q, k, v = (torch.randn(1, 1, tokens, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(q, k, v)
    assert max(sizes) <= 8 * tokens
    torch.testing.assert_close(out, attend(q.detach(), k.detach(), v.detach()))
