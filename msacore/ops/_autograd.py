"""What the autograd formulas of all operators share: registration, the short way, function transforms."""

import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msacore.ops import _torch

Formula = Callable[..., Any]


def _flatten(nested: Sequence[Any]) -> list[Any]:
    return [t for item in nested for t in (item if isinstance(item, (list, tuple)) else [item])]


def _nest(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if size is None else [next(items) for _ in range(size)] for size in sizes]


def _sizes(nested: Sequence[Any]) -> list[int | None]:
    return [len(item) if isinstance(item, (list, tuple)) else None for item in nested]


class _Lists:
    """Where lists of tensors stand among the arguments of a call and, once it has run, among its results.

    An autograd function takes and returns tensors, not lists of them.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.arguments = _sizes(arguments)
        self._results: list[int | None] | None = None
        self._is_list = False

    def flatten_results(self, output: Any) -> Any:
        if not isinstance(output, list) and (isinstance(output, Tensor) or list not in map(type, output)):
            return output
        self._is_list = isinstance(output, list)
        self._results = _sizes(output)
        return tuple(_flatten(output))

    def nest_results(self, flat: Any) -> Any:
        if self._results is None:
            return flat
        return list(flat) if self._is_list else tuple(_nest(flat, self._results))


def _name(op: Any) -> str:
    return op.name().removesuffix(".default")


def _refuse_tangents(op: Any, arguments: Sequence[Any]) -> None:
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in _flatten(arguments)):
        raise RuntimeError(
            f"{_name(op).removesuffix('_backward')}: forward-mode differentiation is not implemented, and an argument "
            "carries a tangent; use reverse mode (backward, torch.func.vjp, torch.func.jacrev)"
        )


class _Saved:
    """What a backward formula sees of the context, with the saved tensors read.

    They are read only once, because each reading unpacks them, which checkpoints allow only once; and they are read
    before anything else, because reading them makes a checkpoint run the model's forward pass again.
    """

    def __init__(self, ctx: Any) -> None:
        vars(self).update(vars(ctx))
        self.saved_tensors = ctx.saved_tensors
        self.needs_input_grad = ctx.needs_input_grad


def _short_function(op: Any, setup_context: Formula | None, backward: Formula) -> type[torch.autograd.Function]:
    """The formula as an autograd function, which costs less host time than torch's registered form of it."""

    # The older form of forward: torch inspects the signature of the newer one on every call. What is not a tensor comes
    # last, so that `ctx.needs_input_grad` has the positions that the registered formula expects.
    def forward(ctx: Any, *inputs: Any) -> Any:
        *flat, lists, options = inputs
        arguments = _nest(flat, lists.arguments) if lists else flat
        if _torch.is_in_transform():
            with _torch.outer_transforms(), _torch.below_autograd():
                output = op(*arguments, **options)
        else:
            with _torch.below_autograd():
                output = op(*arguments, **options)
        if setup_context is not None:
            setup_context(ctx, arguments, options, output) if options else setup_context(ctx, arguments, output)
        ctx.lists = lists
        return lists.flatten_results(output) if lists else output

    def call_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = _Saved(ctx)
        if ctx.lists:
            saved.needs_input_grad = _nest(ctx.needs_input_grad, ctx.lists.arguments)
            grads = ctx.lists.nest_results(grads)
        # create_graph=True, forward mode, transforms: the gradient operator is called like any other, and refuses what
        # is not implemented.
        if torch.is_grad_enabled() or _torch.forward_mode_may_be_active() or _torch.is_in_transform():
            return *_flatten(backward(saved, *grads)), None, None
        with _torch.below_autograd():
            return *_flatten(backward(saved, *grads)), None, None

    # Profilers and anomaly mode show the name of the class.
    members = {"forward": staticmethod(forward), "backward": staticmethod(call_backward)}
    return types.new_class(_name(op), (torch.autograd.Function,), exec_body=lambda body: body.update(members))


def _loop_over_batch(op: Any) -> Formula:
    """Batching rule of an operator for ``torch.vmap``."""

    def element(value: Any, dim: Any, take: Callable[[Tensor, int | None], Tensor]) -> Any:
        if isinstance(value, (list, tuple)):
            return [element(v, d, take) for v, d in zip(value, dim, strict=True)]
        return take(value, dim) if isinstance(value, Tensor) else value

    def each(results: Any, change: Callable[..., Any], *others: Any) -> Any:
        if isinstance(results, (list, tuple)):
            return type(results)(each(item, change, *rest) for item, *rest in zip(results, *others, strict=True))
        return change(results, *others)

    def rule(info: Any, in_dims: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        def call(take: Callable[[Tensor, int | None], Tensor]) -> Any:
            return op(*element(arguments, in_dims, take), **options)

        def fake(t: Tensor, dim: int | None) -> Tensor:
            return t.new_empty([size for i, size in enumerate(t.shape) if i != dim], device="meta")

        def element_of(i: int) -> Callable[[Tensor, int | None], Tensor]:
            return lambda t, dim: t if dim is None else t.select(dim, i)

        if info.batch_size:
            first, *others = [call(element_of(i)) for i in range(info.batch_size)]
            batch = each(first, lambda *results: torch.stack(results), *others)
        else:  # the fake kernel knows the shapes that an element would have
            device = next(t.device for t in _flatten(arguments) if isinstance(t, Tensor))
            batch = each(call(fake), lambda t: t.new_empty((0, *t.shape), device=device))
        return batch, each(batch, lambda _: 0)

    return rule


class _GuardedLibrary(torch.library.Library):
    """Registers torch's autograd kernel of an operator behind ``guard``."""

    def __init__(self, guard: Callable[[Formula], Formula]) -> None:
        super().__init__("msacore", "FRAGMENT")
        self._guard = guard

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        super().impl(op_name, self._guard(fn) if dispatch_key == "Autograd" else fn, dispatch_key, **options)


_libraries: list[torch.library.Library] = []  # a library that is garbage-collected takes its kernels with it


def _register(op: Any, setup_context: Formula | None, backward: Formula) -> type[torch.autograd.Function]:
    """Register formula and batching rule, and refuse tangents, which torch would drop silently."""
    function = _short_function(op, setup_context, backward)

    def in_transform(*arguments: Any, **options: Any) -> Any:
        lists = _Lists(arguments)
        flat = _torch.apply_in_transform(function, *_flatten(arguments), lists, options)
        return lists.nest_results(flat)

    def guard(registered: Formula) -> Formula:
        def kernel(keys: Any, *arguments: Any, **options: Any) -> Any:
            if _torch.forward_mode_may_be_active():
                _refuse_tangents(op, arguments)
            if _torch.is_in_transform():
                return in_transform(*arguments, **options)
            return registered(keys, *arguments, **options)

        return kernel

    library = _GuardedLibrary(guard)
    _libraries.append(library)

    def registered_backward(ctx: Any, *grads: Any) -> Any:
        return backward(_Saved(ctx), *grads)

    torch.library.register_autograd(_name(op), registered_backward, setup_context=setup_context, lib=library)
    torch.library.register_vmap(_name(op), _loop_over_batch(op), lib=library)
    return function


def refuse_second_derivative(name: str) -> None:
    """Make the gradient operator ``msacore::<name>`` raise when it is itself differentiated.

    Without this torch would return wrong second derivatives with no more than a warning.
    """

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"msacore::{name.removesuffix('_backward')}: second derivatives are not implemented; "
            "call backward without create_graph=True"
        )

    _register(getattr(torch.ops.msacore, name).default, None, refuse)


def differentiable(op: Any, setup_context: Formula, backward: Formula) -> Formula:
    """Register an operator's autograd formula; return what the public function calls.

    The formula is that of ``torch.library.register_autograd``. Eager calls take a shorter way to it, because the
    registered one costs more host time than computing small inputs takes. Compilers, tracers, function transforms,
    autocast and direct calls of the operator use the registered one.
    """
    apply = _torch.short_apply(_register(op, setup_context, backward))

    def call(*arguments: Any, **options: Any) -> Any:
        if not _torch.is_plain_eager():
            return op(*arguments, **options)
        if not torch.is_grad_enabled():
            with _torch.below_autograd():
                return op(*arguments, **options)
        if list not in map(type, arguments):
            return apply(*arguments, None, options)
        lists = _Lists(arguments)
        return lists.nest_results(apply(*_flatten(arguments), lists, options))

    return call


def will_differentiate(*tensors: Tensor) -> bool:
    """Whether a call should keep memory-consuming results for its backward pass. A trace must not depend on this."""
    return _torch.is_tracing() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
