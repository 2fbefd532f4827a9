from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchmae import presets
from torchmae.config.plan import PlanOptions, number_of
from torchmae.errors import ConfigError
from torchmae.nn.flops import count_flops
from torchmae.nn.mae import parameter_counts
from torchmae.nn.masking import Masker
from torchmae.planning.cost import (
    GPUS,
    MEASURED_MFU,
    activation_bytes,
    assumed_mfu,
    describe,
    plan,
    state_bytes,
    traffic_bytes,
)


def kept(values: dict[str, Any], ratio: float, batch: int) -> int:
    """Bytes of the tensors that PyTorch keeps for a backward pass, weights apart, each memory once."""
    model = presets.construct(values)
    images = torch.randn(batch, values["in_chans"], *values["input_size"])
    mask = Masker(model.encoder, "random", ratio).from_noise(
        torch.rand(batch, Masker(model.encoder, "random").noise_count)
    )
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, mask).loss
        total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert loss.isfinite()
    return total


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_activations_are_those_that_pytorch_keeps(decoder: str) -> None:
    sizes = {"embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_embed_dim": 48, "decoder_depth": 3}
    values = presets.arguments("vit_tiny_32_p4", **sizes, decoder=decoder)
    predicted = 4 * activation_bytes(values, 0.75, bf16=False)
    assert predicted == pytest.approx(kept(values, 0.75, 4), rel=0.1)


def test_memory_by_hand() -> None:
    # 10 weights: 40 bytes, as many of gradients, twice as many of moments, and bf16 copies.
    assert state_bytes(10) == 160 + 20
    assert state_bytes(10, shards=4) == 40 + 20
    values = presets.arguments("vit_huge")
    small = activation_bytes(values, 0.75, recompute=True)
    assert small < activation_bytes(values, 0.75) / 4


def test_traffic_by_hand() -> None:
    assert traffic_bytes(10, 1, "ddp") == 0
    assert traffic_bytes(10, 2, "ddp") == 40
    assert traffic_bytes(10, 4, "ddp", compressed=True) == 30
    assert traffic_bytes(10, 2, "fsdp") == 5 * (2 + 2 + 4)
    assert traffic_bytes(10, 2, "fsdp", accumulate=3) == 5 * (12 + 4)


def test_a_step_is_its_operations_over_what_the_gpu_reaches() -> None:
    options = PlanOptions(model="vit_large", images="1000", epochs=2, batch_size=64, gpus=1, gpu="a100", mfu=0.5)
    cost = plan(options)
    values = presets.arguments("vit_large")
    flops = count_flops(presets.weightless(values), 0.75).training
    assert cost.compute_s == pytest.approx(64 * flops / (312e12 * 0.5))
    assert cost.step_s == cost.compute_s
    assert cost.gpu_hours == cost.hours == pytest.approx(1000 * 2 * flops / (312e12 * 0.5) / 3600)
    assert (cost.bound, cost.fits, cost.accumulate, cost.micro_batch) == ("compute", True, 1, 64)
    assert cost.parameters == sum(parameter_counts(presets.weightless(values))) == pytest.approx(329e6, rel=0.01)


def test_the_share_of_the_peak_is_the_measured_one() -> None:
    for gflop, share in MEASURED_MFU.items():
        assert assumed_mfu(gflop * 1e9) == pytest.approx(share)
    cost = plan(PlanOptions(model="vit_large", gpus=1, batch_size=256))
    assert cost.images_per_s == pytest.approx(2664, rel=0.01)  # as `benchmarks/gpu.sh steps` measured it
    shares = [assumed_mfu(gflop * 1e9) for gflop in (0.1, 1.29, 10, 58, 100, 1000)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (min(MEASURED_MFU.values()), max(MEASURED_MFU.values()))


def test_recomputing_activations_is_slower_and_smaller() -> None:
    plain, again = (plan(PlanOptions(model="vit_huge", checkpoint_activations=flag)) for flag in (False, True))
    assert 1.2 < again.compute_s / plain.compute_s < 1.34
    assert again.micro_batch > plain.micro_batch


def test_what_does_not_fit_is_cut_into_parts() -> None:
    cost = plan(PlanOptions(model="vit_huge", gpus=2, gpu="rtx4090", batch_size=4096))
    assert cost.accumulate > 1
    assert cost.accumulate * cost.micro_batch >= 2048
    used = cost.state_bytes + cost.activation_bytes
    assert used < 0.9 * 24 * 2**30
    huge = PlanOptions(model="vit_huge", gpus=2, gpu="rtx4090", input_size=7168)
    assert not plan(huge).fits
    assert describe(huge, plan(huge)).endswith("not one image fits: try --parallel fsdp")


def test_a_slow_network_bounds_small_batches() -> None:
    options = PlanOptions(model="vit_large", gpus=64, gpu="l40s", batch_size=1024)
    cost = plan(options)
    assert cost.bound == "network"
    assert cost.step_s == pytest.approx(cost.exchange_s + cost.compute_s / 3)
    compressed = plan(PlanOptions(model="vit_large", gpus=64, gpu="l40s", batch_size=1024, compress_gradients=True))
    assert compressed.exchange_s == pytest.approx(cost.exchange_s / 2)


def test_few_cores_bound_small_models() -> None:
    fed, starved = (plan(PlanOptions(model="vit_small", cores=cores)) for cores in (100, 4))
    assert (fed.bound, starved.bound) == ("compute", "data")
    assert starved.images_per_s == pytest.approx(8 * 4 * 550)
    assert starved.cores_per_gpu == pytest.approx(4)


@pytest.mark.parametrize("gpu", GPUS)
def test_more_gpus_never_take_longer(gpu: str) -> None:
    hours = [plan(PlanOptions(gpus=gpus, gpu=gpu)).hours for gpus in (1, 2, 4, 8)]
    assert hours == sorted(hours, reverse=True)


@pytest.mark.parametrize(("text", "number"), [("1.28M", 1.28e6), ("300k", 3e5), ("50,000", 5e4), ("7", 7), ("2B", 2e9)])
def test_counts(text: str, number: float) -> None:
    assert number_of(text) == number


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "inf", "1.2.3M"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="give a count such as"):
        number_of(text)


def test_only_transformers_are_planned() -> None:
    with pytest.raises(ConfigError, match="model is 'mlp'; plan a transformer"):
        plan(PlanOptions(model="mlp"))
