import torch

import glomo
from bench import peers
from bench.measure import extra_memory, timings


def test_authors_formulation_is_what_we_compute():
    query, key, value = torch.randn(3, 2, 6, 9, 4).double().unbind()
    bias = torch.randn(2, 6, 9, 1).double()
    ours = glomo.relu2_attention(query, key, value, bias, is_causal=True, diagonal=-1)
    torch.testing.assert_close(peers.authors_attention(query, key, value, bias), ours)
    features, weights, chains = value[:, 0], torch.rand(6).double(), torch.rand(6).double()
    ours = glomo.relu2_graph_mix(
        *(query, key, features, weights, chains, bias), num_heads=2, is_causal=True, diagonal=-1
    )
    torch.testing.assert_close(peers.authors_graph_mix(query, key, features, weights, chains, bias, 2), ours)


def test_measurements():
    found = timings({"a": lambda: sum(range(20_000)), "b": lambda: None}, rounds=5)
    assert found["a"].p20 <= found["a"].median <= found["a"].p80
    assert found["a"].median > found["b"].median
    assert extra_memory(lambda: torch.ones(32 << 20, dtype=torch.uint8)) >= 30 << 20
