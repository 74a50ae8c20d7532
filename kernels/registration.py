"""How a backend's forward and backward functions become one differentiable PyTorch custom op.

A custom op is opaque to torch.compile and torch.export, which see its schema, its fake version (shapes only) and its
gradient formula: both capture it whole, with static and dynamic shapes.

Inductor caches compiled graphs on disk and knows a custom op there by its name alone: an op whose outputs or saved
tensors change in number, shape, strides or dtype from one release to the next needs a new name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from .arguments import accumulator_dtype, without_autocast

Op = Callable[..., Any]


def differentiable_op(
    name: str,
    forward: Op,
    backward: Callable[..., Sequence[Tensor]],
    fake: Op,
    differentiable: Sequence[str],
    saved_outputs: int = 0,
    fake_gradients: Op | None = None,
) -> Op:
    """Registers `glomo::<name>` and `glomo::<name>_backward` and returns a function that calls the first.

    Args:
        name: the op's name, unique in the package.
        forward: forward(*inputs) -> outputs, a tuple of tensors; its annotations give the op's schema.
        backward: backward(grad_outputs, outputs, *inputs, needs) -> one gradient for every differentiable input,
            an empty tensor where `needs` (a list of bools, in the order of `differentiable`) says False.
        fake: fake(*inputs) -> empty tensors with the shapes and dtypes of the outputs.
        differentiable: names of the inputs that get gradients.
        saved_outputs: how many of the last outputs are only for the backward pass: grad_outputs has none for them.
        fake_gradients: fake_gradients(outputs, *inputs) -> empty tensors like the gradients, in the order of
            `differentiable`, for a backward that does not lay out all of them contiguously.
    """
    plain_forward, plain_backward = _without_autocast(forward), _without_autocast(backward)
    schema = torch.library.infer_schema(forward, mutates_args=())
    arguments, returns = schema[1:].rsplit(") -> ", 1)
    op = torch.library.custom_op(f"glomo::{name}", plain_forward, mutates_args=(), schema=schema)
    names = list(inspect.signature(forward).parameters)
    positions = [names.index(n) for n in differentiable]
    num_outputs = returns.count("Tensor")
    num_grads = num_outputs - saved_outputs

    # no lists of tensors: PyTorch's rule for a batch of gradients (is_grads_batched) cannot take them
    def listed_backward(*tensors, needs):
        grads, rest = list(tensors[:num_grads]), tensors[num_grads:]
        return tuple(plain_backward(grads, list(rest[:num_outputs]), *rest[num_outputs:], needs=needs))

    def fake_backward(*tensors, needs):
        outputs, inputs = tensors[num_grads : num_grads + num_outputs], tensors[num_grads + num_outputs :]
        if fake_gradients is not None:
            found = fake_gradients(outputs, *inputs)
        else:
            found = [None if inputs[p] is None else inputs[p].new_empty(inputs[p].shape) for p in positions]
        return tuple(g if need else tensors[0].new_empty(0) for g, need in zip(found, needs, strict=True))

    before = [f"Tensor grad_{n}" for n in range(num_grads)] + [f"Tensor output_{n}" for n in range(num_outputs)]
    backward_op = torch.library.custom_op(
        f"glomo::{name}_backward",
        listed_backward,
        mutates_args=(),
        schema=f"({', '.join(before)}, {arguments}, *, bool[] needs) -> ({', '.join(['Tensor'] * len(positions))})",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if num_outputs > 1 else (output,)
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*outputs, *(inputs[i] for i in tensors))
        ctx.set_materialize_grads(False)
        ctx.tensors = tensors
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]

    def autograd_backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = list(ctx.inputs)
        for i, t in zip(ctx.tensors, saved[num_outputs:], strict=True):
            inputs[i] = t
        needs = [ctx.needs_input_grad[p] for p in positions]
        outputs = list(saved[:num_outputs])
        results = zip(grad_outputs[: num_outputs - saved_outputs], outputs, strict=False)
        grads = [torch.zeros_like(o) if g is None else g for g, o in results]
        direct = False
        if not torch.compiler.is_compiling():
            direct = not torch.is_grad_enabled() and is_plain((*grads, *saved))
            if not direct:
                _refuse_transforms(name, (*grads, *saved))
        if direct:
            gradients = plain_backward(grads, outputs, *inputs, needs=needs)
        else:
            gradients = backward_op(*grads, *outputs, *inputs, needs=needs)
        result: list[Tensor | None] = [None] * len(inputs)
        for position, need, gradient in zip(positions, needs, gradients, strict=True):
            if need:
                result[position] = gradient
        return tuple(result)

    def autograd_forward(ctx: Any, *inputs: Any) -> Any:
        output = plain_forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def no_double_backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"The gradient of glomo's {name} is not differentiable itself: run the forward pass inside "
            'glomo.kernels.use_backend("reference"), which is plain PyTorch, for second derivatives.'
        )

    op.register_fake(fake)
    op.register_autograd(autograd_backward, setup_context=setup_context)
    backward_op.register_fake(fake_backward)
    backward_op.register_autograd(no_double_backward)
    for each in (op, backward_op):
        each.register_vmap(_slice_by_slice(each))

    # the same gradient without the dispatcher; autograd calls the node by the name of the class
    methods = dict(forward=staticmethod(autograd_forward), backward=staticmethod(autograd_backward))
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if is_plain([x for x in inputs if isinstance(x, Tensor)]):
            if wants_gradient(*[inputs[p] for p in positions]) and not _below_autograd():
                return function.apply(*inputs)
            return plain_forward(*inputs)
        _refuse_transforms(name, inputs)
        return op(*inputs)

    return call


def _slice_by_slice(op: Op) -> Op:
    """A rule for torch.vmap, and for batches of gradients: op once a slice. Batch dimensions are the fast way."""

    def rule(info: Any, in_dims: Any, *inputs: Any, **options: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError("torch.vmap over no slices says nothing of the result's shape: give it one slice or more.")
        leaves, structure = pytree.tree_flatten(inputs)
        dims = pytree.tree_leaves(in_dims)
        slices = [
            op(
                *pytree.tree_unflatten(
                    [x if dim is None else x.select(dim, n) for x, dim in zip(leaves, dims, strict=True)], structure
                ),
                **options,
            )
            for n in range(info.batch_size)
        ]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return (found := [torch.stack(parts) for parts in zip(*slices, strict=True)]), [0] * len(found)

    return rule


def _key_set(*names: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


_NO_MODES = (_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect"))
"""What PyTorch adds to every dispatch where no mode, tracer or transform is on, and in inference mode."""
_PLAIN_TENSORS = tuple(
    _key_set(*names)
    for device in ("CPU", "CUDA")
    for names in ((device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"), (device, f"Autocast{device}"))
)
"""Dispatch keys of a tensor on the device, and of one made in inference mode."""


def _below_autograd() -> bool:
    """Whether PyTorch records nothing here even where gradients are enabled, as in inference mode."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether a call through PyTorch's dispatcher would come straight to the op's own functions. The way through it
    takes the host longer than all else that an op does (bench/NOTES.md), so that such calls go there themselves."""
    return not torch.autograd._profiler_enabled() and is_unwatched(tensors)


def is_unwatched(tensors: Iterable[Tensor]) -> bool:
    """Whether no mode, tracer, transform or subclass would see or change what is done with the tensors."""
    if torch._C._dispatch_tls_local_include_set() not in _NO_MODES:
        return False
    if forward_ad._current_level >= 0 or any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext  # it concerns new tensors only
        for i in range(torch._C._len_torch_function_stack())
    ):
        return False
    keys = torch._C._dispatch_keys
    return all(type(t) in (Tensor, torch.nn.Parameter) and keys(t) in _PLAIN_TENSORS for t in tensors)


def wants_gradient(*inputs: Any) -> bool:
    """Whether a backward pass may follow a call with these inputs."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True  # within torch.vmap a tensor does not say whether what it is a slice of requires a gradient
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def saving(op: Op) -> Op:
    """op with one more argument: whether a backward pass may follow."""
    return lambda *inputs: op(*inputs, wants_gradient(*inputs))


def fake_rows(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes of an attention-like op: out (..., T, Ev) and one number a target (..., T)."""
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    statistic = query.new_empty(*lead, query.size(-2), dtype=accumulator_dtype(query.dtype))
    return query.new_empty(*lead, query.size(-2), value.size(-1)), statistic


def fake_packed_rows(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The same for packed sequences: out (total_q, ..., Ev) and (total_q, ...)."""
    statistic = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    return query.new_empty(*query.shape[:-1], value.size(-1)), statistic


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with without_autocast(tensor.device):
            return function(*args, **kwargs)

    return run


def _refuse_transforms(name: str, inputs: tuple[Any, ...]) -> None:
    """Forward-mode derivatives would lose the tangent without a word, torch.func.grad fails with an inner message."""
    stack = torch._C._functorch.peek_interpreter_stack()
    transformed = stack is not None and stack.key() in (TransformType.Grad, TransformType.Jvp)
    if not transformed and forward_ad._current_level >= 0:
        tensors = (t for t in inputs if isinstance(t, Tensor))
        transformed = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if transformed:
        raise RuntimeError(
            f"glomo's {name} knows reverse-mode gradients by torch.autograd only: for torch.func and forward-mode "
            'derivatives run it inside glomo.kernels.use_backend("reference"), which is plain PyTorch.'
        )
