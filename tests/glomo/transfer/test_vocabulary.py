import pytest
import torch

from glomo.transfer.vocabulary import converted_rows, overlap

OLD = ["<pad>", "<unk>", "the", "cat", "<end>"]
NEW = ["<pad>", "<unk>", "dog", "cat", "mat", "the", "<end>"]


def test_known_rows_are_copied_and_new_ones_are_the_mean():
    torch.manual_seed(0)
    weight = torch.randn(5, 3)
    found = converted_rows(weight, OLD, NEW)
    mean = (weight[1] + weight[2] + weight[3] + weight[4]) / 4
    expected = torch.stack([torch.zeros(3), weight[1], mean, weight[3], mean, weight[2], weight[4]])
    torch.testing.assert_close(found, expected)


def test_a_bias():
    found = converted_rows(torch.tensor([9.0, 1.0, 2.0, 3.0, 6.0]), OLD, NEW)
    assert found.tolist() == [9.0, 1.0, 3.0, 3.0, 3.0, 2.0, 6.0]


def test_the_same_vocabulary_changes_nothing():
    weight = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    found = converted_rows(weight, OLD, OLD)
    assert not found.requires_grad
    assert torch.equal(found[1:], weight[1:])
    assert (found[0] == 0).all()
    found.zero_()
    assert (weight != 0).all()  # a copy


def test_padding_is_no_word():
    """A unit of the new vocabulary that is named like padding is new, and padding has the row of padding."""
    weight = torch.tensor([[7.0], [1.0], [3.0]])
    assert converted_rows(weight, ["<pad>", "a", "b"], ["<nothing>", "<pad>", "b"]).tolist() == [[0.0], [2.0], [3.0]]
    assert overlap(["<pad>", "a", "b"], ["<nothing>", "<pad>", "b"]) == (1, 1)


def test_half_precision():
    weight = torch.full((5000, 2), 1.001).bfloat16()
    names = [str(n) for n in range(5000)]
    assert torch.equal(converted_rows(weight, names, ["0", "new"])[1], weight[1])


def test_overlap():
    assert overlap(OLD, NEW) == (4, 2)
    assert overlap(OLD, OLD) == (4, 0)
    assert overlap(OLD, []) == (0, 0)


def test_wrong_names():
    weight = torch.randn(5, 3)
    with pytest.raises(ValueError, match="5 rows have 4 names"):
        converted_rows(weight, OLD[:4], NEW)
    with pytest.raises(ValueError, match="the name 'the' stands for two"):
        converted_rows(weight, ["<pad>", "the", "a", "the", "<end>"], NEW)
    with pytest.raises(ValueError, match="at least 2 rows"):
        converted_rows(weight[:1], OLD[:1], NEW)
    with pytest.raises(ValueError, match="no unit"):
        converted_rows(weight, OLD, [])
