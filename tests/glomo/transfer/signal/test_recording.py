"""Recorded outputs: they are the model's, and are refused for other examples or from a damaged file."""

import pytest
import safetensors.torch
import torch
from torch import nn

from glomo.errors import UserError
from glomo.transfer.signal import batches_fingerprint, distillation_loss, record, recorded


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, units, lengths):
        x = self.embedding(units).sum(1) / lengths[:, None]
        return self.head(self.dropout(self.norm(x)))


def examples(rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, (rows, 6), generator=generator), torch.randint(1, 6, (rows,), generator=generator)


def batches(size, data):
    return [tuple(one[i : i + size] for one in data) for i in range(0, len(data[0]), size)]


def teacher():
    torch.manual_seed(0)
    return Teacher()


def test_what_is_recorded_is_what_the_model_says(tmp_path):
    model, data = teacher(), examples()
    outputs = record(model, batches(4, data), tmp_path / "teacher.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.eval()(*data))
    assert outputs.shape == (11, 3)
    assert not outputs.requires_grad
    # in batches of another size, and as a generator
    found = recorded(tmp_path / "teacher.safetensors", (batch for batch in batches(3, data)))
    assert torch.equal(found, outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_distillation_from_a_record_is_that_from_the_teacher(tmp_path):
    model, data = teacher(), examples()
    record(model, batches(4, data), tmp_path / "t")
    student, indices = torch.randn(3, 3), torch.tensor([7, 0, 10])
    live = model.eval()(*(one[indices] for one in data))
    found = distillation_loss(student, recorded(tmp_path / "t", batches(5, data))[indices], alpha=1.0)
    torch.testing.assert_close(found, distillation_loss(student, live, alpha=1.0))


def test_modes_and_statistics_stay(tmp_path):
    model = teacher().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, batches(4, examples()), tmp_path / "t")
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def broken(*inputs):
        raise RuntimeError("broken")

    model.head.forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        record(model, batches(4, examples()), tmp_path / "u")
    assert model.training
    assert not (tmp_path / "u").exists()


def test_fingerprint_is_of_content_and_order_alone():
    units, lengths = examples()
    known = batches_fingerprint(batches(11, (units, lengths)))
    assert batches_fingerprint(batches(2, (units, lengths))) == known
    assert batches_fingerprint(batches(2, (units.T.contiguous().T, lengths))) == known
    changed = units.clone()
    changed[7, 3] += 1
    order = torch.arange(11).flip(0)
    others = [
        (changed, lengths),
        (units, lengths + 1),
        (units[order], lengths[order]),
        (units[:10], lengths[:10]),
        (units.int(), lengths),
        (units.reshape(11, 3, 2), lengths),
        (lengths, units),
        (units,),
    ]
    found = [batches_fingerprint(batches(4, other)) for other in others]
    assert len({known, *found}) == len(others) + 1
    assert batches_fingerprint([units]) == batches_fingerprint([(units,)]) == found[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float64])
def test_fingerprint_of_any_type(dtype):
    x = (torch.arange(6).view(3, 2) > 2).to(dtype)
    other = ~(x > 0) if dtype == torch.bool else x + 1
    assert batches_fingerprint([x]) == batches_fingerprint([x[:1], x[1:]]) != batches_fingerprint([other])
    assert len(batches_fingerprint([x[:, 0], x[:0, 0]])) == 64
    same_bytes = torch.zeros(3, dtype=torch.int32)
    assert batches_fingerprint([torch.zeros(3)]) != batches_fingerprint([same_bytes])
    assert batches_fingerprint([torch.zeros(3, 0)]) != batches_fingerprint([torch.zeros(2, 0)])


def test_half_precision_comes_back_as_it_was(tmp_path):
    model = nn.Linear(3, 2).bfloat16()
    x = torch.randn(5, 3).bfloat16()
    outputs = record(model, [x], tmp_path / "t")
    found = recorded(tmp_path / "t", [x])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, outputs)


def test_outputs_by_position(tmp_path):
    model = nn.Embedding(10, 3)
    units = examples()[0]
    assert record(model, [units[:4], units[4:]], tmp_path / "t").shape == (11, 6, 3)
    with pytest.raises(ValueError, match=r"an example are \(6, 3\) in one batch and \(5, 3\) in another"):
        record(model, [units[:4], units[4:, :5]], tmp_path / "t")
    assert len(recorded(tmp_path / "t", [units])) == 11  # the file from before is whole


def test_other_examples_are_refused(tmp_path):
    path = tmp_path / "t"
    record(teacher(), batches(4, examples()), path)
    known, found = (batches_fingerprint([examples(seed=seed)])[:12] for seed in (0, 1))
    with pytest.raises(UserError, match=f"other examples: their fingerprint is {known}, and .* given ones {found}"):
        recorded(path, batches(4, examples(seed=1)))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "t"
    record(teacher(), batches(4, examples()), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"t is no record of outputs, or is damaged .* record them again"):
        recorded(path, batches(4, examples()))
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no record of outputs"):
        recorded(path, batches(4, examples()))
    with pytest.raises(FileNotFoundError):
        recorded(tmp_path / "absent", batches(4, examples()))


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="batches hold no example"):
        record(teacher(), [], tmp_path / "t")
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"an output of shape \(8,\) for 4 examples; one row for each is needed"):
        record(nn.Flatten(0), [x], tmp_path / "t")
    with pytest.raises(ValueError, match=r"an output of shape \(\) for 4 examples"):
        record(nn.MSELoss(), [(x, x)], tmp_path / "t")
    with pytest.raises(TypeError, match="the model returns a tuple; a tensor of outputs"):
        record(nn.LSTM(3, 2), [torch.zeros(1, 2, 3)], tmp_path / "t")
    with pytest.raises(ValueError, match=r"as many examples each; the given one has \[3, 2\]"):
        batches_fingerprint([(torch.zeros(3, 2), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"the given one has \[None\]"):
        batches_fingerprint([torch.zeros(())])
    with pytest.raises(ValueError, match="has nothing"):
        batches_fingerprint([()])
