"""`python -m bench.ulmfit steps | classifier --init RUN [--dataset trec] [--epochs 8] [--seeds 3] [--scales 1 4]`:
glomo's AWD-LSTM and ULMFiT beside plain PyTorch and fastai's (which `make setup` does not install: `pip install fastai`
in an environment of its own).

steps       seconds of a training step of the language model, alternately; peers: the same sizes of `nn.LSTM` without
            any dropout or penalty, and fastai's AWD_LSTM with its penalties
classifier  test error after equal epochs from the same language model, on the same units, with the same documents held
            out: glomo's gradual unfreezing (slanted triangular rates), fastai's text_classifier_learner by its usual
            recipe, all its rates times each of --scales
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn.awd_lstm import AWDLSTMConfig, LSTMLanguageModel
from glomo.training.config import load_recipe
from glomo.training.documents import draw, encode
from glomo.training.finetune import finetune
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.models import load_language_weights
from glomo.training.texts import LabelledData, labelled

ROWS, COLUMNS, UNITS = 32, 70, 8000
SIZES = {"small": (200, 500, 2), "ulmfit": (400, 1150, 3)}


class Plain(nn.Module):
    """Embedding, LSTM layers, tied logits."""

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(UNITS + 1, dim)
        widths = [dim, *[hidden] * (layers - 1), dim]
        self.layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in pairwise(widths))
        self.bias = nn.Parameter(torch.zeros(UNITS + 1))

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        for layer in self.layers:
            x, _ = layer(x)
        return F.cross_entropy(F.linear(x, self.embedding.weight, self.bias).flatten(0, 1), outputs.flatten())


def ours(dim: int, hidden: int, layers: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    config = AWDLSTMConfig.preset("ulmfit", vocab_size=UNITS, dim=dim, hidden=hidden, layers=layers)
    model = LSTMLanguageModel(config)
    return model, lambda inputs, outputs: model(inputs, outputs)[0]


def fastais(dim: int, hidden: int, layers: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    config = {**awd_lstm_lm_config, "emb_sz": dim, "n_hid": hidden, "n_layers": layers}
    model = get_language_model(AWD_LSTM, UNITS + 1, config)

    def loss(inputs: Tensor, outputs: Tensor) -> Tensor:
        logits, raw, dropped = model(inputs)
        penalties = 2 * dropped.square().mean() + (raw[:, 1:] - raw[:, :-1]).square().mean()
        return F.cross_entropy(logits.flatten(0, 1), outputs.flatten()) + penalties

    return model, loss


def steps(seconds: float) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; B {ROWS}, T {COLUMNS}, {UNITS} units, SGD")
    units = torch.randint(1, UNITS, (ROWS, COLUMNS + 1))
    for name, sizes in SIZES.items():
        plain = Plain(*sizes)
        peers = {"ours": ours(*sizes), "nn.LSTM": (plain, plain)}
        try:
            peers["fastai"] = fastais(*sizes)
        except ImportError:
            print("fastai is not installed here")
        times: dict[str, list[float]] = {peer: [] for peer in peers}
        optimizers = {peer: torch.optim.SGD(model.parameters(), lr=0.1) for peer, (model, _) in peers.items()}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times["ours"]) < 7:
            for peer, (_, loss) in peers.items():
                before = time.perf_counter()
                optimizers[peer].zero_grad()
                loss(units[:, :-1], units[:, 1:]).backward()
                optimizers[peer].step()
                times[peer].append(time.perf_counter() - before)
        medians = {peer: statistics.median(found[2:]) for peer, found in times.items()}
        print(f"{name} {sizes}: " + ", ".join(f"{peer} {1000 * m:.0f} ms" for peer, m in medians.items()))
        print("  " + ", ".join(f"ours / {p}: {medians['ours'] / m:.2f}" for p, m in medians.items() if p != "ours"))


def classifier(init: str, dataset: str, epochs: int, seeds: int, scales: Sequence[float]) -> None:
    train_set, test_set = labelled(LabelledData(dataset=dataset))
    found = load_language_weights(init)
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        options = {"tune.init": init, "data.dataset": dataset, "train.seed": str(seed), "train.progress": "0"}
        config = load_recipe("finetune-trec", options, FinetuneConfig, "finetune")
        classes = sorted({label for _, label in train_set})
        documents, test = (
            encode(examples, found.vocabulary, classes, config.data.length, found.backward)
            for examples in (train_set, test_set)
        )
        kept, held = draw(documents, classes, config.data, seed)
        a_pass = -(-len(kept) // config.train.batch_size)
        train = dataclasses.replace(config.train, steps=epochs * a_pass, eval_every=a_pass, checkpoint_every=0)
        with tempfile.TemporaryDirectory() as out:
            before = time.monotonic()
            results = finetune(dataclasses.replace(config, train=train), Path(out) / "run")
            ours_seconds = time.monotonic() - before
        errors.setdefault("glomo", []).append(1 - results["test_accuracy"])
        print(f"seed {seed}: glomo {100 * errors['glomo'][-1]:.2f} % in {ours_seconds:.0f} s", flush=True)
        parts = documents.part(kept), documents.part(held), test
        for scale in scales:
            before, name = time.monotonic(), f"fastai, rates x {scale:g}"
            torch.manual_seed(seed)
            errors.setdefault(name, []).append(_fastai(found, parts, config, len(classes), epochs, scale))
            seconds = time.monotonic() - before
            print(f"seed {seed}: {name} {100 * errors[name][-1]:.2f} % in {seconds:.0f} s", flush=True)
    for name, of in errors.items():
        spread = f" ± {100 * statistics.stdev(of):.2f}" if len(of) > 1 else ""
        print(f"{name}: test error {100 * statistics.fmean(of):.2f}{spread} %")


def _fastai(found: Any, parts: Any, config: FinetuneConfig, classes: int, epochs: int, scale: float) -> float:
    """Test error of fastai's classifier by its usual recipe: an epoch of the head, one of the last two groups, one of
    the last three, the rest of all."""
    from fastai.text.all import (
        AWD_LSTM,
        CrossEntropyLossFlat,
        Datasets,
        Pad_Chunk,
        SortedDL,
        TensorCategory,
        TensorText,
        accuracy,
        awd_lstm_clas_config,
        text_classifier_learner,
    )

    swap = {0: 1, 1: 0}  # fastai's padding is 1, its unknown unit 0
    ids = [[swap.get(unit, unit) for unit in document] for part in parts for document in part.ids]
    labels = [label for part in parts for label in part.labels]
    ends = [0, len(parts[0]), len(parts[0]) + len(parts[1]), len(ids)]
    splits = [list(range(a, b)) for a, b in pairwise(ends)]
    units, label = (lambda i: TensorText(torch.tensor(ids[i]))), (lambda i: TensorCategory(torch.tensor(labels[i])))
    data = Datasets(list(range(len(ids))), tfms=[[units], [label]], splits=splits)
    pad = Pad_Chunk(seq_len=config.classifier.chunk, pad_idx=1)
    loaders = data.dataloaders(bs=config.train.batch_size, dl_type=SortedDL, before_batch=pad, num_workers=0)
    loaders.vocab = [str(n) for n in range(len(found.weights["encoder.embedding.weight"]))]
    lstm, head = config.lstm, config.classifier
    settings = {
        **{**awd_lstm_clas_config, "emb_sz": found.model["dim"], "n_hid": found.model["hidden"]},
        **{"n_layers": found.model["layers"], "input_p": lstm.dropout_input, "hidden_p": lstm.dropout_hidden},
        **{"weight_p": lstm.weight_drop, "embed_p": lstm.dropout_embedding, "output_p": head.dropout / head.drop_mult},
    }
    learner = text_classifier_learner(
        loaders, AWD_LSTM, head.chunk, settings, pretrained=False, drop_mult=head.drop_mult, n_out=classes,
        lin_ftrs=[head.hidden], ps=[head.dropout_last], loss_func=CrossEntropyLossFlat(), metrics=accuracy,
        max_len=head.chunk * head.window,
    )  # fmt: skip
    weights = learner.model.state_dict()
    for name, value in found.weights.items():
        module, _, rest = name.removeprefix("encoder.").partition(".")
        if module == "embedding":
            order = torch.tensor([1, 0, *range(2, len(value))])
            weights["0.module.encoder.weight"] = weights["0.module.encoder_dp.emb.weight"] = value[order]
        elif module == "layers":
            layer, _, kind = rest.partition(".")
            place = "weight_hh_l0_raw" if kind == "weight_hh_l0" else f"module.{kind}"
            weights[f"0.module.rnns.{layer}.{place}"] = value
            if kind == "weight_hh_l0" and f"0.module.rnns.{layer}.module.{kind}" in weights:
                weights[f"0.module.rnns.{layer}.module.{kind}"] = value
    learner.model.load_state_dict(weights)
    with learner.no_bar(), learner.no_logging():
        learner.freeze()
        learner.fit_one_cycle(1, scale * 2e-2)
        for groups, lr in ((-2, scale * 1e-2), (-3, scale * 5e-3)):
            learner.freeze_to(groups)
            learner.fit_one_cycle(1, slice(lr / 2.6**4, lr))
        learner.unfreeze()
        learner.fit_one_cycle(epochs - 3, slice(scale * 1e-3 / 2.6**4, scale * 1e-3))
        found_labels = learner.get_preds(dl=loaders[2])
    return 1 - float((found_labels[0].argmax(-1) == found_labels[1]).float().mean())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("steps", "classifier"))
    parser.add_argument("--init")
    parser.add_argument("--dataset", default="trec")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.part == "steps":
        steps(given.seconds)
    else:
        classifier(given.init, given.dataset, given.epochs, given.seeds, given.scales)


if __name__ == "__main__":
    main(sys.argv[1:])
