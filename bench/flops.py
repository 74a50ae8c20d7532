"""Floating-point operations of a case, counted on paper: matrix products only, a multiplication and an addition each
counted, and no pair (t, j) that a causal graph cannot read.

The same count holds for every peer, so that a ratio of speeds is a ratio of times. As FlashAttention counts it, the
backward pass takes the scores anew: 5 products against 2.
"""

from __future__ import annotations

from bench.cases import VARLEN, Case


def lengths(case: Case) -> list[int]:
    """The sequences of a case: all alike, or in varlen and where padded spread evenly from a quarter of the longest to
    the longest."""
    if case.op not in VARLEN and not case.padded:
        return [case.length] * case.batch
    least = case.length // 4
    return [least + (case.length - least) * (i + 1) // case.batch for i in range(case.batch)]


def pairs(case: Case) -> int:
    """Pairs (target, source) that a single graph of the case may use, summed over the batch."""
    if case.padded:
        return case.length * sum(lengths(case))
    if not case.causal or case.op == "graph_mix":  # graph_mix is given whole matrices, zeros and all
        return sum(t * t for t in lengths(case))
    strict = case.op not in ("attention", "attention_varlen")
    return sum(t * (t - 1) // 2 if strict else t * (t + 1) // 2 for t in lengths(case))


def flops(case: Case) -> int:
    """0 for the pre-training step, whose time is not in one op."""
    n, used = case.layers * case.heads, pairs(case)
    e, ev = case.dim, case.value_dim
    scores = 2 * used * n * e
    if case.op == "pretrain_step":
        return 0
    if case.op == "relu2_affinity":  # backward: the scores again, dQ, dK
        return scores * (1 + 3 * case.backward)
    if case.op in ("graph_mix", "relu2_graph_mix"):
        # the mixed graph times the features once; with chains A_l (Λ_{l-1} F) for each graph, or A_l Λ_{l-1} where
        # graph_mix has that cheaper (few positions, wide features); backward: twice that
        chained = n * ev
        if case.op == "graph_mix":
            chained = min(chained, (n - case.heads) * case.length)
        products = 2 * used * (ev + chained * case.chains) * (1 + 2 * case.backward)
        return products + (scores * (1 + 3 * case.backward) if case.op == "relu2_graph_mix" else 0)
    values = 2 * used * n * ev
    return scores + values + case.backward * (3 * scores + 2 * values)  # backward: S, dQ, dK and dP, dV
