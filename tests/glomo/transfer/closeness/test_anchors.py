"""What all penalties on weights do: anchors that move and are saved, a model that is no child."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from glomo.transfer.closeness import EWC, L2SP, ConservativeParameters, OnlineEWC


def ewc(model, kind=EWC):
    penalty = kind(model, strength=3.0)
    # not drawn: the same for every model of these shapes
    penalty.consolidate({n: (p.new_ones(()) + len(n)) * torch.ones_like(p) for n, p in model.named_parameters()})
    return penalty


PENALTIES = {
    "L2SP": L2SP,
    "L2SP with new weights": lambda m: L2SP(m, {"embedding.weight": m.embedding.weight.detach() + 1}),
    "ConservativeParameters": lambda m: ConservativeParameters(m, 0.7),
    "EWC": ewc,
    "OnlineEWC": lambda m: ewc(m, OnlineEWC),
}
every = pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


@every
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_a_cast_loses_nothing(make, net, cast):
    """A model and its penalty in one module, cast together: the model is, the anchors are not, but they get wider."""
    both = nn.ModuleList([net, make(net)])
    before = {name: value.clone() for name, value in both[1].state_dict().items()}
    cast(both)
    assert net.layer.weight.dtype.itemsize == 2
    assert all(value.dtype == before[name].dtype for name, value in both[1].state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in both[1].state_dict().items())
    assert both[1]().dtype == torch.float32
    both.double()
    kinds = {value.dtype for value in both[1].state_dict().values() if value.is_floating_point()}
    assert kinds == {torch.float64}


@every
def test_the_model_is_no_child(make, net):
    penalty = make(net)
    assert not list(penalty.parameters())
    assert {name.split(".")[0] for name in penalty.state_dict()} <= {"anchors", "fisher", "new"}
    assert net not in set(penalty.modules())
    assert penalty().shape == ()


@every
def test_anchors_move_and_are_saved(make, make_net, net, tmp_path):
    """Others keep them in a plain dict, which neither `.to()` nor a checkpoint sees."""
    penalty = make(net)
    move(net)
    expected = penalty()
    assert expected > 0
    assert {f"anchors.{name}" for name in penalty.names} <= set(dict(penalty.named_buffers()))
    file = tmp_path / "penalty.safetensors"
    safetensors.torch.save_file(penalty.state_dict(), file)
    other, kind = make_net(), type(penalty)
    fresh = kind(other) if kind is L2SP else kind(other, strength=penalty.strength)
    fresh.load_state_dict(safetensors.torch.load_file(file))
    other.load_state_dict(net.state_dict())
    assert torch.equal(fresh(), expected)
    penalty.double()
    assert all(b.dtype in (torch.float64, torch.bool) for b in penalty.buffers())
    net.double()
    torch.testing.assert_close(penalty().float(), expected)
    net.to("meta")
    with pytest.raises(ValueError, match=r"parameter '[a-z.]+' is on meta and its anchor on cpu"):
        penalty()
    penalty.to("meta")
    assert penalty().device.type == "meta"


@every
def test_copies_of_both_stay_paired(make, net):
    penalty = make(net)
    other_net, other = copy.deepcopy((net, penalty))
    move(other_net)
    assert penalty() == make(net)()
    assert other() > penalty()
    assert {id(p) for p in other.penalised().values()} <= {id(p) for p in other_net.parameters()}


@every
def test_tied_parameters_count_once(make, net):
    penalty = make(net)
    assert "head.weight" not in penalty.names
    assert len({id(p) for p in penalty.penalised().values()}) == len(penalty.names)


@every
def test_half_precision_sums_in_fp32(make, net):
    net.bfloat16()
    penalty = make(net)
    move(net)
    assert penalty().dtype == torch.float32
    penalty().backward()
    assert net.layer.weight.grad.dtype == torch.bfloat16
    assert net.layer.weight.grad.any()


@every
def test_parameters_that_are_replaced_or_lost(make, net):
    penalty = make(net)
    net.load_state_dict({n: torch.zeros_like(p) for n, p in net.state_dict().items()}, assign=True)
    assert penalty() > 0  # the new tensors are seen
    net.layer = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"'layer.weight' is \(5, 4\) and its anchor \(4, 4\)"):
        penalty()
    net.layer = nn.Identity()
    with pytest.raises(ValueError, match=r"no parameter 'layer\.weight' any more"):
        penalty()


@every
def test_frozen_parameters_get_no_gradient(make, net):
    penalty = make(net)
    move(net)
    net.layer.requires_grad_(False)
    penalty().backward()
    assert net.layer.weight.grad is None
    assert net.embedding.weight.grad.any()


def test_nothing_to_penalise(net):
    with pytest.raises(ValueError, match="none of the model's 7 parameters is penalised"):
        L2SP(net, on=lambda name, parameter: False)
    with pytest.raises(ValueError, match="none of the model's 0 parameters"):
        EWC(nn.Tanh(), 1.0)


def test_one_element_and_none():
    model = nn.ParameterList([nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))])
    penalty = ConservativeParameters(model, 0.5)
    with torch.no_grad():
        model[0].fill_(5.0)
    assert penalty() == 0.5 * 9


@pytest.fixture
def mesh():
    """Of one process, this one."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch is built without distributed training")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@every
def test_parameters_must_be_whole(make, net, mesh):
    from torch.distributed.fsdp import fully_shard

    penalty = make(net)
    fully_shard(net, mesh=mesh)
    for call in (penalty, penalty.pulled, lambda: make(net), lambda: ConservativeParameters(net, 1.0)):
        with pytest.raises(ValueError, match=r"parameter '.*' is a DTensor \(.*\), of which each process holds a"):
            call()
