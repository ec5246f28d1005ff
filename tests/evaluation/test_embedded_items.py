"""Items embedded in parts on workers are those that one process embeds."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import PolicyConfig, ServingConfig
from offtower.data import Catalogue, FeatureEncoding, array_files
from offtower.data.rows import encode_rows
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.evaluation.scoring.embedded_items import embed_on_workers
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.execution import LOCAL
from offtower.models import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.serving.limits import new_items
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


def test_limits_on_new_items_apply_to_embedded_items() -> None:
    """The new items come from features, which embeddings lack, for each way to serve."""
    world = SimulatedWorld(53, WorldSettings(4, 4, 4, feature_kinds="all"), seed=1)
    catalogue = Catalogue.from_table(world.catalogue_table(), world.catalogue_schema)
    log = pa.concat_tables(world.log(40))
    context = FeatureEncoding.fit(world.log_schema.context, [log])
    item = FeatureEncoding.fit(catalogue.schema.features, [catalogue.table(0, 53)])
    torch.manual_seed(0)
    policy = TwoTowerPolicy(PolicyConfig(embedding_dim=8), context, item).eval()
    features = ItemFeatures.from_catalogue(catalogue, item)
    price = world.catalogue_table()["price"].to_numpy()
    limits: Any = {"feature": "price", "below": float(np.median(price)), "at_least": 0.8}
    serving = ServingConfig(new_items=limits)
    assert serving.new_items is not None
    new = new_items(serving.new_items, item, features)
    assert new.tolist() == (price < np.median(price)).tolist()
    rows = encode_rows(log, world.log_schema, catalogue, context, 0)
    expected = PolicyScorer(policy, features, serving=serving).score(rows).importance_weight
    plain = PolicyScorer(policy, policy.embed_items(features))
    found = plain.served_as(serving, new=new)
    np.testing.assert_array_equal(found.score(rows).importance_weight, expected)
    softer = found.served_as(ServingConfig(temperature=2.0, new_items=limits))
    assert torch.equal(softer.served.new, new)  # type: ignore[attr-defined]
    assert not np.allclose(plain.score(rows).importance_weight, expected)
    with pytest.raises(ValueError, match="features"):
        PolicyScorer(policy, policy.embed_items(features), serving=serving)
