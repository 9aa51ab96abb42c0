"""What the autograd formulas of all operators share."""

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
