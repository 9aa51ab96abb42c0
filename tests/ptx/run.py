"""Runs the operators' cases through the interpreter, and judges the results by the rules of the other tests."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests import cases, opcase
from tests.cases import kcenter
from tests.cuda_on_host.dispatch import CudaOnHost, operators_of
from tests.nvcc import SOURCES
from tests.opcase import OpCase
from tests.ptx.machine import Machine

Case = OpCase | kcenter.KernelCase
CPU = torch.device("cpu")


def families() -> dict[str, list[Case]]:
    """Cases by the folder of their operator."""
    found: dict[str, list[Case]] = {}
    for source in SOURCES:
        names = operators_of(source)
        chosen = [case for case in (*cases.ALL, *kcenter.CASES) if case.name in names]
        if chosen:
            found[source.parent.name] = chosen
    return found


def source_of(case: Case) -> Path:
    return next(source for source in SOURCES if case.name in operators_of(source))


def samples(case: Case, dtype: torch.dtype, parts: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Samples whose name contains one of the `parts`; those too large for a run on the host need their whole name."""
    if isinstance(case, kcenter.KernelCase):
        if "" in parts:
            yield "", case.arguments(CPU, dtype)
        return
    for sample in case.samples(CPU, dtype):
        if any((part in sample.id and sample.on_host) or part == sample.id for part in parts):
            yield sample.id, sample.arguments


class Wrong(Exception):
    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind, self.words = kind, words


class Run:
    """Counts what passes and what fails, and prints a line for each case.

    Args:
        machine: The interpreter, with the PTX of all requested sources.
        verbose: Print every finding, not only the first.
    """

    def __init__(self, machine: Machine, verbose: bool = False) -> None:
        self.machine, self.verbose = machine, verbose
        self.passed = self.failed = 0

    def one(self, case: Case, sample: str, dtype: str, args: dict[str, Any]) -> None:
        name = " / ".join(part for part in (case.name, sample, dtype) if part)
        self.machine.name_case(name)
        started, launches = time.time(), self.machine.launches
        try:
            kind, words = "ok", self._judge(case, args)
            self.passed += 1
        except Wrong as wrong:
            kind, words = wrong.kind, wrong.words
            self.failed += 1
        took = f"{time.time() - started:.1f} s, {self.machine.launches - launches} launches"
        print(f"{kind:<14} {name}: {words} ({took})", flush=True)

    def _judge(self, case: Case, args: dict[str, Any]) -> str:
        torch.manual_seed(0)
        self.machine.findings()  # drops what an earlier case left
        try:
            with CudaOnHost() as mode:
                ours = opcase.run(case, case.op, args) if isinstance(case, OpCase) else case.run(args)
        except Exception as error:
            self._raise_findings()
            known = re.search(r"ptx \[([\w ]+)\] ([^\n]*)", str(error))
            raise Wrong(*((known[1], known[2]) if known else ("error", f"{error!r}"[:600]))) from error
        self._raise_findings()
        if not mode.calls:
            raise Wrong("error", "no CUDA code was run")
        if isinstance(case, OpCase):
            return _accuracy(case, args, ours)
        if not all(torch.equal(x, y) for x, y in zip(ours, case.run(args), strict=True)):
            raise Wrong("wrong", "not the bits of the CPU operator")
        return "the bits of the CPU operator"

    def _raise_findings(self) -> None:
        found = self.machine.findings()
        if not found:
            return
        kind, first = found[0].split(": ", 1)
        more = "".join(f"\n    {line}" for line in found[1:]) if self.verbose else f"; {len(found) - 1} more"
        raise Wrong(kind, first + (more if len(found) > 1 else ""))


def _accuracy(case: OpCase, args: dict[str, Any], ours: tuple[list[torch.Tensor], list[torch.Tensor]]) -> str:
    """The project's rule: against float64, at most twice torch's own error at the same dtype."""
    expected = opcase.run(case, case.reference, opcase.to_dtype(args, torch.float64))
    yardstick = opcase.run(case, case.reference, args)
    labels = [f"output {i}" for i in range(len(ours[0]))]
    labels += [f"gradient of {'.'.join(map(str, path))}" for path, _ in opcase.leaves(case, args)[1]]
    quadruples = list(zip(*([*r[0], *r[1]] for r in (ours, expected, yardstick)), labels, strict=True))

    def check(**factor: float) -> None:
        for x, reference, torch_same, label in quadruples:
            opcase.assert_as_accurate_as_torch(x, reference, torch_same, label, **factor)

    try:
        check()
    except AssertionError as error:
        raise Wrong("wrong", str(error).split("\n")[0]) from error
    for factor in (0.0, 0.5, 1.0):
        try:
            check(factor=factor)
        except AssertionError:
            continue
        return f"error within {factor:g}x torch's" if factor else "error below the rule's floor"
    return "error within the limit"
