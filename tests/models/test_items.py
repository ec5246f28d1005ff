"""The chunked item tower is the plain one, in less memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from offtower.config import TowerConfig
from offtower.data import Catalogue, CatalogueSchema, FeatureEncoding, FeatureSpec
from offtower.models import ItemFeatures, Tower, embed_items

N, DIM = 37, 4


def build(config: TowerConfig, *, bias: bool = True) -> tuple[Tower, ItemFeatures]:
    rng = np.random.default_rng(0)
    import pyarrow as pa

    table = pa.table(
        {
            "item_id": np.arange(N),
            "v": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=3 * N)), 3),
            "c": rng.integers(0, 5, N),
            "b": [list(range(i % 4)) for i in range(N)],
        }
    )
    specs = (
        FeatureSpec(name="v", kind="vector"),
        FeatureSpec(name="c", kind="category"),
        FeatureSpec(name="b", kind="bag"),
    )
    encoding = FeatureEncoding.fit(specs, [table])
    catalogue = Catalogue.from_table(table, CatalogueSchema(features=specs))
    torch.manual_seed(1)
    tower = Tower(encoding, DIM, config, bias=bias)
    return tower, ItemFeatures.from_catalogue(catalogue, encoding, chunk=10)


def gradients(tower: Tower, features: ItemFeatures, chunk: int) -> list[torch.Tensor]:
    torch.manual_seed(5)
    tower.zero_grad(set_to_none=True)
    items = embed_items(tower, features, chunk=chunk)
    weight = torch.linspace(-1, 1, N * DIM).reshape(N, DIM)
    loss = (items.embedding * weight).sum()
    if items.bias is not None:
        loss = loss + (items.bias * torch.linspace(0, 1, N)).sum()
    loss.backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in tower.parameters()]


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 100])
@pytest.mark.parametrize("normalize", [False, True])
def test_chunked_values_and_gradients_equal_plain_autograd(chunk: int, normalize: bool) -> None:
    tower, features = build(TowerConfig(hidden_layer_sizes=(6,), normalize=normalize))
    tower.eval()
    plain = tower(features.slice(0, N))
    chunked = embed_items(tower, features, chunk=chunk)
    torch.testing.assert_close(chunked.embedding, plain[0])
    torch.testing.assert_close(chunked.bias, plain[1])
    for got, wanted in zip(
        gradients(tower, features, chunk), gradients(tower, features, N), strict=True
    ):
        # float32 sums of 37 terms of size one, in another order.
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_random_parts_draw_the_same_forward_and_backward() -> None:
    """With dropout the gradient must be that of the network that the forward pass drew."""
    config = TowerConfig(hidden_layer_sizes=(32,), dropout=0.5, unknown_rate=0.3)
    tower, features = build(config)
    tower.train()
    torch.manual_seed(5)
    items = embed_items(tower, features, chunk=10)
    # The same draws, chunk by chunk, with a graph.
    torch.manual_seed(5)
    parts = [tower(features.slice(s, min(s + 10, N)))[0] for s in range(0, N, 10)]
    joined = torch.cat(parts)
    torch.testing.assert_close(items.embedding, joined)
    wanted = torch.autograd.grad(joined.square().sum(), list(tower.parameters()), allow_unused=True)
    got = torch.autograd.grad(
        items.embedding.square().sum(), list(tower.parameters()), allow_unused=True
    )
    for a, b in zip(got, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_generator_is_left_as_the_forward_pass_left_it() -> None:
    tower, features = build(TowerConfig(hidden_layer_sizes=(8,), dropout=0.5))
    tower.train()
    torch.manual_seed(3)
    items = embed_items(tower, features, chunk=10)
    before = torch.get_rng_state()
    items.embedding.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_taking_by_index_equals_slicing() -> None:
    tower, features = build(TowerConfig(hidden_layer_sizes=(6,)))
    tower.eval()
    index = torch.tensor([5, 5, 0, 36, 11])
    whole = tower(features.slice(0, N))[0]
    torch.testing.assert_close(tower(features.at(index))[0], whole[index])


def test_a_training_step_over_many_items_stays_in_bounded_memory() -> None:
    """150,000 featured items, layers of 128: plain autograd would hold over 300 MB more."""
    code = """
import resource, numpy as np, torch
from offtower.config import TowerConfig
from offtower.data import Catalogue, FeatureEncoding
from offtower.models import ItemFeatures, Tower, embed_items
torch.set_num_threads(2)
n = 150_000
catalogue = Catalogue.from_arrays(np.arange(n), {"v": np.zeros((n, 8), np.float32)})
encoding = FeatureEncoding.fit(catalogue.schema.features, [catalogue.table(0, n)])
tower = Tower(encoding, 16, TowerConfig(hidden_layer_sizes=(128, 128)))
features = ItemFeatures.from_catalogue(catalogue, encoding)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
embed_items(tower, features, chunk=8192).embedding.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Embeddings and their gradient are 2 x 10 MB; a chunk's activations 8192 x 256 x 4 x 2 = 17 MB.
    assert int(done.stdout) / 1024 < 150
