import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import GRIDS, Case
from bench.flops import flops, lengths, pairs
from bench.peers import around
from bench.problems import make


def test_counts_by_hand():
    # 4 positions have 0 + 1 + 2 + 3 = 6 strictly earlier sources; a pair costs 2 * 2 for its score, 2 * 3 for its value
    case = dict(batch=1, heads=1, length=4, dim=2, value_dim=3)
    assert flops(Case("relu2_attention", **case)) == 6 * (4 + 6)
    # backward: the scores anew, dQ, dK (4 each), dP and dV (6 each)
    assert flops(Case("relu2_attention", **case, backward=True)) == 6 * (4 + 6) + 6 * (3 * 4 + 2 * 6)
    assert flops(Case("attention", **case)) == 10 * (4 + 6)  # a target reads itself too
    assert flops(Case("relu2_affinity", **case, causal=False)) == 16 * 4
    # 2 layers of 1 head: 2 scores a pair, the mixed graph once, two running products
    mix = dict(case, layers=2, chains=True)
    assert flops(Case("relu2_graph_mix", **mix)) == 6 * (2 * 4 + 3 * 6)
    # graph_mix gets whole matrices; here one product of the two graphs is cheaper than two running products
    assert flops(Case("graph_mix", **mix)) == 2 * 16 * 3 + 2 * 4**3
    assert flops(Case("graph_mix", **{**mix, "value_dim": 1})) == 2 * 16 * (1 + 2)


@pytest.mark.parametrize("op", ["relu2_affinity", "relu2_attention", "attention"])
def test_forward_is_what_pytorch_counts_in_the_eager_formula(op):
    case = Case(op, batch=2, heads=3, length=7, dim=4, value_dim=5, causal=False)
    problem = make(case, "cpu")
    with around("eager"), FlopCounterMode(display=False) as counter, torch.no_grad():
        problem.call(*problem.tensors)
    assert counter.get_total_flops() == flops(case)


def test_pairs_of_packed_sequences():
    case = Case("relu2_attention_varlen", batch=3, heads=1, length=8)
    assert max(lengths(case)) == 8
    assert min(lengths(case)) >= 2
    assert pairs(case) == sum(sum(j < t for t, j in itertools.product(range(n), repeat=2)) for n in lengths(case))


def test_pairs_of_a_padded_batch():
    case = Case("attention", batch=3, heads=2, length=8, causal=False, padded=True)
    mask = make(case, "cpu").tensors[-1]
    assert pairs(case) == int(mask.expand(3, 1, 8, 8).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_grids_name_every_case_once(name):
    cases = GRIDS[name]()
    distinct = set(cases)
    assert len({case.id for case in distinct}) == len(distinct)
