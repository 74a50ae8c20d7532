"""A second, slow implementation of GLoMo (loops over units, layers and heads, no ops of ours) and small inputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from glomo.nn import GLoMo, GLoMoConfig


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


SMALL = {
    "vocab_size": 13,
    "dim": 8,
    "layers": 2,
    "heads": 2,
    "head_dim": 3,
    "conv_blocks": 2,
    "horizon": 2,
    "positions": 0,
}


def small_model(name: str = "paper", **overrides) -> GLoMo:
    torch.manual_seed(1)
    model = GLoMo(GLoMoConfig.preset(name, **{**SMALL, **overrides})).double()
    for parameter in model.parameters():  # zeros and equal start values would hide mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(*sequences: list[int]):
    size = max(len(s) for s in sequences)
    tokens = torch.tensor([s + [0] * (size - len(s)) for s in sequences])
    return tokens, torch.tensor([len(s) for s in sequences])


def causal_cnn(cnn, x):
    for conv, norm in zip(cnn.convs, cnn.norms, strict=True):
        width = conv.weight.shape[-1]
        rows = []
        for t in range(len(x)):
            y = conv.bias.clone()
            for k in range(width):
                source = t - (width - 1) + k
                if source >= 0:
                    y = y + conv.weight[:, :, k] @ x[source]
            if isinstance(norm, torch.nn.LayerNorm):
                y = (y - y.mean()) / torch.sqrt(((y - y.mean()) ** 2).mean() + norm.eps) * norm.weight + norm.bias
            rows.append(y.clamp(min=0))
        x = torch.stack(rows)
    return x


def one_graph(g, config, layer, head, for_query, for_key, ids):
    """A of one head as a list of rows of floats-tensors."""
    n = layer * config.heads + head
    rows = slice(n * config.head_dim, (n + 1) * config.head_dim)
    size = len(ids)
    graph = torch.zeros(size, size, dtype=torch.float64)
    for t in range(size):
        score = {}
        for j in range(t):
            if ids[j] in config.masked_sources:
                continue
            if config.activation in ("uniform", "none"):
                score[j] = torch.tensor(float(config.activation == "uniform"), dtype=torch.float64)
                continue
            q = g.to_query.weight[rows] @ for_query[t] + g.to_query.bias[rows]
            before = for_key[j - 1] if j else torch.zeros_like(for_key[0])
            k = g.to_key.weight[rows] @ (before if config.keys_before else for_key[j]) + g.to_key.bias[rows]
            s = (q * k).sum() * (1 / math.sqrt(config.head_dim) if config.scaled else 1)
            if config.sparsity == "threshold":
                s = s - (g.threshold_weight[layer] @ q + g.threshold[layer])
            else:
                s = s + g.bias[layer]
            if config.distance_bias:
                s = s + g.distance[n, min(t - j, config.distance_bias) - 1]
            if config.equal_bias and ids[j] == ids[t] > 1:
                s = s + 10 * g.equal[0, n]
            if config.equal_bias and j > 0 and ids[j - 1] == ids[t] > 1:
                s = s + 10 * g.equal[1, n]
            score[j] = s
        if config.activation == "softmax":
            total = sum(torch.exp(s) for s in score.values())
            for j, s in score.items():
                graph[t, j] = torch.exp(s) / total
        else:
            total = sum(s.clamp(min=0) ** 2 for s in score.values())
            for j, s in score.items():
                if s > 0:
                    graph[t, j] = s**2 / (total + config.eps)
    return graph


def gru_cell(weight_ih, weight_hh, bias_ih, bias_hh, x, h):
    d = len(h)
    i, s = weight_ih @ x + bias_ih, weight_hh @ h + bias_hh
    r = torch.sigmoid(i[:d] + s[:d])
    z = torch.sigmoid(i[d : 2 * d] + s[d : 2 * d])
    n = torch.tanh(i[2 * d :] + r * s[2 * d :])
    return (1 - z) * n + z * h


def update(f_module, config, layer, aggregate, f):
    if config.norm_aggregate:
        norm = f_module.norms[layer]
        aggregate = F.layer_norm(aggregate, aggregate.shape, norm.weight, norm.bias)
    if config.update == "linear":
        linear = f_module.linears[layer]
        return f + linear.weight @ aggregate + linear.bias
    x = torch.cat([aggregate * f, aggregate]) if config.update == "gru_product" else aggregate
    cell = f_module.cell
    return gru_cell(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, x, f)


def gru(rnn, x):
    """States `(T, d)` of the last layer, from zeros."""
    for layer in range(rnn.num_layers):
        weights = [getattr(rnn, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, states = torch.zeros_like(x[0]), []
        for unit in x:
            h = gru_cell(*weights, unit, h)
            states.append(h)
        x = torch.stack(states)
    return x


def run_direction(model, index, ids):
    """Graphs `[layer][head]` and f^L of one sequence, in the direction's order."""
    config = model.config
    g = model.graph_predictor.directions[index]
    coupled = config.coupled and config.learns_graphs
    x = model.graph_predictor.embedding.weight[ids] * (config.dim**0.5 if config.scaled_embedding else 1.0)
    if config.activation == "rnn":
        return [], gru(model.rnns[index], x)
    f_module = g.features if coupled else model.feature_predictors[index]
    for_query = for_key = None
    if not coupled and config.learns_graphs:
        for_query, for_key = causal_cnn(g.query_cnn, x), causal_cnn(g.key_cnn, x)
    f, graphs, width = x, [], config.dim // config.heads
    for layer in range(config.layers):
        q_source, k_source = (f, f) if coupled else (for_query, for_key)
        heads = [one_graph(g, config, layer, h, q_source, k_source, ids) for h in range(config.heads)]
        new = []
        for t in range(len(ids)):
            parts = []
            for h, graph in enumerate(heads):
                part = torch.zeros(width, dtype=torch.float64)
                for j in range(len(ids)):
                    value = f_module.values[layer].weight @ f[j] if config.value_projection else f[j]
                    part = part + graph[t, j] * value[h * width : (h + 1) * width]
                parts.append(part)
            new.append(update(f_module, config, layer, torch.cat(parts), f[t]))
        f = torch.stack(new)
        graphs.append(heads)
    return graphs, f


def decode(model, index, start, inputs, targets):
    """Cross-entropies of `targets`, the decoder started from `start`, `inputs` the units it is fed after the zero."""
    rnn, table = model.decoders[index].rnn, model.graph_predictor.embedding.weight
    state = [start] * rnn.num_layers
    losses = []
    for step, target in enumerate(targets):
        scale = model.config.dim**0.5 if model.config.scaled_embedding else 1.0
        x = torch.zeros_like(start) if step == 0 else table[inputs[step - 1]] * scale
        for layer in range(rnn.num_layers):
            names = [f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}"]
            state[layer] = gru_cell(*(getattr(rnn, n) for n in names), x, state[layer])
            x = state[layer]
        logits = table @ x
        losses.append(torch.logsumexp(logits[1:], 0) - logits[target])  # nothing is padding
    return losses


def oracle_loss(model, *sequences):
    """The pre-training loss over all positions of unpadded sequences."""
    config, total = model.config, 0.0
    for index in range(2):
        losses = []
        for sequence in sequences:
            ids = sequence[::-1] if index else sequence
            _, f = run_direction(model, index, ids)
            if config.objective == "sentence":
                half = max(1, len(ids) // 2)
                start = sum(f[t] for t in range(half)) / half
                losses += decode(model, index, start, ids[half:], ids[half:])
                continue
            for t in range(len(ids)):
                ahead = ids[t + 1 : t + 1 + config.horizon]
                losses += decode(model, index, f[t], ahead, ahead)
        total = total + 0.5 * sum(losses) / len(losses)
    return total


class Oracle:
    small = staticmethod(small_model)
    batch = staticmethod(batch)
    run_direction = staticmethod(run_direction)
    gru_cell = staticmethod(gru_cell)
    loss = staticmethod(oracle_loss)


@pytest.fixture
def oracle():
    return Oracle
