"""Run as a program: msacore on a torch that lacks private names. Arguments: the names to hide, or "all"."""

import sys
import types
from typing import Any

import torch
from torch.autograd import forward_ad

PRIVATE = {
    "_AutoDispatchBelowAutograd",
    "_are_functorch_transforms_active",
    "_current_level",
    "_functorch",
    "_is_any_autocast_enabled",
    "_is_tracing",
    "_set_fwd_grad_enabled",
}


class _Lacking(types.ModuleType):
    """A module of torch that hides names from msacore alone: torch itself still needs them."""

    def __init__(self, module: types.ModuleType, hidden: set[str]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_Lacking__module=module, _Lacking__hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        if name in self.__hidden and sys._getframe(1).f_globals.get("__name__", "").startswith("msacore"):
            raise AttributeError(f"{name} is hidden")
        return getattr(self.__module, name)


def main(names: list[str]) -> None:
    hidden = PRIVATE if names == ["all"] else set(names)
    torch._C = _Lacking(torch._C, hidden)  # type: ignore[assignment]
    torch.autograd.forward_ad = _Lacking(forward_ad, hidden)  # type: ignore[assignment]

    from msacore.ops import _torch

    needed = {"_AutoDispatchBelowAutograd", "_are_functorch_transforms_active", "_is_any_autocast_enabled"}
    assert hidden.isdisjoint(needed) == _torch.HAS_SHORT_WAY
    from tests import test_ops, test_transforms

    for case in test_ops.cases.ALL:
        arguments = case.samples(test_ops.CPU, torch.float32)[0].arguments
        outputs, grads = test_ops.run(case, case.op, arguments)
        test_ops._assert_accurate(case, arguments, outputs, grads)
        test_ops.test_double_backward_is_refused(case, test_ops.CPU)
        test_ops.test_autocast_policy(case, test_ops.CPU)
        test_ops.test_operators_run_in_inference_mode(case, test_ops.CPU)
        call = test_transforms._call(case, arguments)
        values = call.values
        for gradients in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
                try:
                    call.function(*[forward_ad.make_dual(v, v) for v in values])
                except RuntimeError as error:
                    assert f"{case.name}: forward-mode" in str(error)
                else:
                    raise AssertionError(f"{case.name} accepted a tangent")
    print("all operators gave their results")


if __name__ == "__main__":
    main(sys.argv[1:])
