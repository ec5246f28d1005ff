"""Items embedded in parts on workers are those that one process embeds."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from offtower.config import PolicyConfig
from offtower.data import Catalogue, FeatureEncoding, array_files
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.evaluation.scoring.embedded_items import embed_on_workers
from offtower.execution import LOCAL
from offtower.models import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from tests.mappers import BACKWARDS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("items", [53, 1024])
def test_parts_have_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: int, bias: bool
) -> None:
    """With parts that are no whole pages, and with parts that are mapped side by side."""
    monkeypatch.setattr(array_files, "PART_ROWS", 20 if items == 53 else 512)
    chunk = 10 if items == 53 else 256
    world = SimulatedWorld(items, WorldSettings(4, 4, 4, feature_kinds="all"), seed=1)
    catalogue = Catalogue.from_table(world.catalogue_table(), world.catalogue_schema)
    context = FeatureEncoding.fit(world.log_schema.context, world.log(50))
    item = FeatureEncoding.fit(catalogue.schema.features, [catalogue.table(0, items)])
    torch.manual_seed(0)
    policy = TwoTowerPolicy(PolicyConfig(embedding_dim=8, item_bias=bias), context, item)
    features = ItemFeatures.from_catalogue(catalogue, item)
    policy.eval()
    with torch.no_grad():
        expected = policy.embed_items(features, chunk=chunk)
    arguments: Any = (policy, catalogue, tmp_path)
    assert embed_on_workers(*arguments, LOCAL, chunk=chunk) is None
    found = embed_on_workers(*arguments, BACKWARDS, chunk=chunk)
    assert found is not None
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    for one in (found, pickle.loads(sent)):
        assert torch.equal(one.embedding, expected.embedding)
        assert (one.bias is None) is (not bias)
        if bias:
            assert one.bias is not None and expected.bias is not None
            assert torch.equal(one.bias, expected.bias)
    assert len(list(tmp_path.iterdir())) == 1
    del found, one
    gc.collect()
    assert list(tmp_path.iterdir()) == []
