"""What the autograd formulas of all operators share."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch


def refuse_second_derivative(name: str) -> None:
    """Make the gradient operator ``msacore::<name>`` raise when it is itself differentiated.

    Without this torch would return wrong second derivatives with no more than a warning.
    """

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"msacore::{name.removesuffix('_backward')}: second derivatives are not implemented; "
            "call backward without create_graph=True"
        )

    torch.library.register_autograd(f"msacore::{name}", refuse)


def is_plain_eager() -> bool:
    """No compiler, autocast region or function transform wants to see the registered operator."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` less its support of function transforms, for callers that know there are none."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def eager_autograd(
    op: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """Wrap an operator so that eager calls take a short way to the same autograd formula as ``register_autograd``.

    The registered formula costs more host time than small inputs need to compute. Compilers, function transforms,
    autocast and direct calls of the operator keep using the registered one.
    """

    def nest(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
        items = iter(flat)
        return [next(items) if size is None else [next(items) for _ in range(size)] for size in sizes]

    def flatten(nested: Sequence[Any]) -> list[Any]:
        return [t for item in nested for t in (item if isinstance(item, (list, tuple)) else [item])]

    class Eager(torch.autograd.Function):
        # The older form of forward: torch inspects the signature of the newer one on every call. What is no tensor
        # comes last, so that `ctx.needs_input_grad` counts as it does in the registered formula.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *flat, sizes, options = inputs
            arguments = nest(flat, sizes) if sizes else flat
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments, **options)
            setup_context(ctx, arguments, options, output) if options else setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # create_graph=True: the registered formula refuses the second derivative
                return *flatten(backward(ctx, *grads)), None, None
            with torch._C._AutoDispatchBelowAutograd():
                return *flatten(backward(ctx, *grads)), None, None

    apply = apply_of(Eager)

    def call(*arguments: Any, **options: Any) -> Any:
        if not is_plain_eager():
            return op(*arguments, **options)
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments, **options)
        if list not in map(type, arguments):
            return apply(*arguments, None, options)
        sizes = [len(a) if isinstance(a, list) else None for a in arguments]
        return apply(*flatten(arguments), sizes, options)

    return call
