"""msacore's operators as nodes of an ONNX graph.

ONNX does not define these operators. A model can still be exported to an ONNX file that names them, one node per call
in the domain `msacore`, for a runtime that has kernels for these nodes. `evaluate` is such a runtime: ONNX's reference
evaluator, whose nodes call the operators of msacore. It is slow, and meant for checking an exported file.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from onnx.defs import OpSchema
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import msacore  # noqa: F401  # registers the operators

DOMAIN = "msacore"
FLOATS = ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]
TENSORS = [*FLOATS, "tensor(int64)", "tensor(bool)"]
ATTRIBUTES = {"int": OpSchema.AttrType.INT, "bool": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}


def operators() -> list[Any]:
    """The operators that a model's forward pass can call."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{DOMAIN}::")}
    short = {name.removeprefix(f"{DOMAIN}::").split(".")[0] for name in names}
    forward = sorted(name for name in short if f"{name}_backward" in short)
    return [getattr(torch.ops.msacore, name).default for name in forward]


def _kind(argument: Any) -> str:
    return str(argument.real_type)


@cache
def _schema(op: Any) -> OpSchema:
    """Tensors become inputs, lists of tensors become sequences, and numbers become attributes."""
    inputs, attributes = [], []
    option = OpSchema.FormalParameterOption
    for argument in op._schema.arguments:
        kind = _kind(argument).replace("number", "float")
        if kind in ATTRIBUTES:
            attributes.append(OpSchema.Attribute(argument.name, ATTRIBUTES[kind], required=True))
        elif kind in ("float[]", "List[float]"):
            attributes.append(OpSchema.Attribute(argument.name, OpSchema.AttrType.FLOATS, required=True))
        elif "List[Tensor]" in kind:
            inputs.append(OpSchema.FormalParameter(argument.name, f"S_{argument.name}"))
        else:
            wanted = option.Optional if "Optional" in kind else option.Single
            inputs.append(OpSchema.FormalParameter(argument.name, f"T_{argument.name}", param_option=wanted))
    outputs = [OpSchema.FormalParameter(f"out{i}", f"R_{i}") for i in range(len(op._schema.returns))]
    sequences = [f"seq({t})" for t in TENSORS]
    constraints = [(p.type_str, sequences if p.type_str.startswith("S_") else TENSORS, "") for p in (*inputs, *outputs)]
    name = op._schema.name.split("::")[1]
    return OpSchema(
        name, DOMAIN, 1, inputs=inputs, outputs=outputs, type_constraints=constraints, attributes=attributes
    )


def _translation(op: Any) -> Callable[..., Any]:
    schema = _schema(op)
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), schema.name, schema)

    def translate(*tensors: Any, **attributes: Any) -> Any:
        inputs = [onnxscript.opset18.SequenceConstruct(*t) if isinstance(t, (list, tuple)) else t for t in tensors]
        return node(*inputs, **{k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()})

    return translate


def export(model: torch.nn.Module, arguments: Sequence[Any], path: str | Path, **options: Any) -> None:
    """Write a model as ONNX, with msacore's operators as nodes of their own domain.

    Args:
        model: Calls msacore's operators, functions or modules.
        arguments: An example of the model's arguments.
        path: The file to write.
        options: Further options of `torch.onnx.export`, such as `dynamic_shapes`.
    """
    table = {op: _translation(op) for op in operators()}
    torch.onnx.export(
        model, tuple(arguments), path, dynamo=True, custom_translation_table=table, verbose=False, **options
    )


def _kernel(op: Any) -> type[OpRun]:
    """A node of the reference evaluator that calls the operator."""
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]

    def tensor(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor(v) for v in value]
        return None if value is None else torch.from_numpy(np.array(value))

    class Kernel(OpRun):
        op_domain = DOMAIN

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            tensors = [tensor(x) for x in (*inputs, *[None] * (len(names) - len(inputs)))]
            result = op(*tensors, **attributes)
            return tuple(t.numpy() for t in (result if isinstance(result, tuple) else (result,)))

    Kernel.__name__ = op._schema.name.split("::")[1]
    return Kernel


def evaluate(path: str | Path, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run an exported file in ONNX's reference evaluator; the nodes of msacore call its operators."""
    runtime = ReferenceEvaluator(onnx.load(path), new_ops=[_kernel(op) for op in operators()])
    named = {name: x.detach().numpy() for name, x in zip(runtime.input_names, inputs, strict=True)}
    return [torch.from_numpy(np.array(out)) for out in runtime.run(None, named)]
