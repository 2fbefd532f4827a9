from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from torchmae.config.evaluate import AttentiveOptions, EvaluateOptions
from torchmae.errors import ConfigError
from torchmae.evaluation import attentive
from torchmae.evaluation.attentive import AttentiveProbe, held_tokens, open_tokens
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.scores import Result
from torchmae.evaluation.subject import Subject
from torchmae.training.progress import Display


def measure(train: ImageSet, test: ImageSet, options: AttentiveOptions, seed: int = 0) -> Result:
    return attentive.measure(tiny.bench(train, test), tiny.subject(), EvaluateOptions(attentive=options, seed=seed))


def test_the_order_of_products_does_not_change_attention() -> None:
    mean, std = torch.randn(12), torch.rand(12) + 0.5
    probe = AttentiveProbe(mean, std, num_queries=3, num_classes=5)
    torch.nn.init.normal_(probe.head.weight)
    tokens = torch.randn(2, 7, 12)
    # As written in the textbooks: every token's value, then the weighted sum of values.
    x = (tokens - mean) / std
    keys, values = x[:, None].expand(-1, 3, -1, -1), torch.einsum("bld,hkd->bhlk", x, probe.value)
    pooled = F.scaled_dot_product_attention(probe.query.expand(2, -1, -1).unsqueeze(2), keys, values, scale=1.0)
    expected = probe.head(probe.norm(pooled.flatten(1)))
    torch.testing.assert_close(probe(tokens), expected)


def test_the_probe_finds_what_the_mean_hides() -> None:
    """The class is written on one token of 16, whose place changes; the others outweigh it in the mean."""
    labels = torch.arange(400) % 2
    tokens = torch.randn(400, 16, 8)
    place = torch.randint(16, (400,))
    tokens[torch.arange(400), place, 0] = 8.0  # says "here"
    tokens[torch.arange(400), place, 1] = 3.0 * (2 * labels - 1)
    held = held_tokens(tokens[:300].half(), labels[:300], tiny.CPU)
    probe = AttentiveProbe(torch.zeros(8), torch.ones(8), 1, 2)
    for _ in attentive.train_head(probe, held, 60, AttentiveOptions(lr=1e-2, batch_size=100), 0):
        pass
    with torch.no_grad():
        assert (probe(tokens[300:]).argmax(1) == labels[300:]).float().mean() > 0.9


def test_held_and_encoded_tokens_give_the_same_figures() -> None:
    train, test = tiny.digits("train", 120), tiny.digits("val", 60)
    found = [measure(train, test, AttentiveOptions(epochs=3, memory_limit=limit)) for limit in (1.0, 1e-6)]
    assert found[0] == found[1]
    assert sum(item["images"] for item in found[0].details["attentive"]["per_class"]) == 60


def test_it_repeats_and_depends_on_its_seed() -> None:
    train, test = tiny.digits("train", 100), tiny.digits("val", 50)
    before = torch.random.get_rng_state()
    found = [measure(train, test, AttentiveOptions(epochs=2), seed).details for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokens_in_memory_are_half_precision_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, train, order = tiny.subject(), tiny.digits("train", 64), np.arange(64)
    encode, seen = Subject.encode, []
    monkeypatch.setattr(Subject, "encode", lambda *args: (seen.append(len(args[1])), encode(*args))[1])
    held, encoded = (open_tokens(subject, train, tiny.RUNTIME, limit) for limit in (1.0, 1e-6))
    assert attentive.token_bytes(subject, 64) == 64 * 16 * 16 * 2
    for tokens, times in ((held, 1), (encoded, 4)):  # the held ones when they were opened
        for _ in range(3):
            (pair,) = tokens.batches(order, 64)
        assert torch.equal(pair[0].half().float(), pair[0])
        assert sum(seen) == 64 * times


class Enough(Exception):
    """Ends a training whose length is known."""


# By default 2,000 steps at least, of 2 an epoch.
@pytest.mark.parametrize(("epochs", "expected"), [(4, 4), (None, 1000)])
def test_the_number_of_epochs(epochs: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def preparing(self: Display, what: str, done: int, total: int) -> None:
        told.append((done, total))
        if done == 4:
            raise Enough

    monkeypatch.setattr(Display, "preparing", preparing)
    train = tiny.digits("train", 30)
    with pytest.raises(Enough):
        measure(train, train, AttentiveOptions(epochs=epochs, batch_size=15))
    assert told == [(done, expected) for done in range(1, 5)]


def test_queries_divide_the_width_of_tokens() -> None:
    train = tiny.digits("train", 30)
    with pytest.raises(ConfigError, match="attentive.queries is 5 and tokens have 16 values; use 4"):
        measure(train, train, AttentiveOptions(queries=5))


def test_statistics_are_those_of_the_tokens() -> None:
    tokens = torch.randn(40, 6, 5) * 3 + torch.arange(5.0)
    tokens[..., 4] = 2.0
    held = held_tokens(tokens.half(), torch.zeros(40, dtype=torch.int64), tiny.CPU)
    mean, std = attentive.statistics(held, size=16)
    flat = tokens.half().float().flatten(0, 1)
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(std[:4], flat.std(0, correction=0)[:4])
    assert std[4] == 1.0
    assert np.isfinite(std.numpy()).all()
