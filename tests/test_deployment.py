"""Every operator and module exported, packaged, compiled, run without Python; docs/deployment.md says what works."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msacore
from tests import cases
from tests.opcase import leaves, outputs_of
from tests.test_ops import two_sizes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "deployment.md"
CPU = torch.device("cpu")


@dataclass
class _Slot:
    """Where a tensor stands among nested arguments."""

    number: int


def _take_tensors(value: Any, found: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        found.append(value)
        return _Slot(len(found) - 1)
    if isinstance(value, dict):
        return {key: _take_tensors(item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, found) for item in value]
    return value


def _put_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.number]
    if isinstance(value, dict):
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


class _Flat(nn.Module):
    """A call whose tensors are positional arguments, and whose other arguments are constants."""

    def __init__(self, call: Callable[..., Any], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.call, self._arguments = call, _take_tensors(arguments, [])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(self.call(**_put_tensors(self._arguments, tensors))))


@dataclass
class Subject:
    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    other_inputs: tuple[Tensor, ...]  # the same arguments in other sizes

    def __str__(self) -> str:
        return self.name


def _operators() -> Iterator[Subject]:
    for case in cases.ALL:
        inputs = []
        for sample in two_sizes(case):
            found: list[Tensor] = []
            _take_tensors(leaves(case, sample.arguments)[0], found)
            inputs.append(tuple(found))
        yield Subject(case.name, _Flat(case.op, two_sizes(case)[0].arguments), *inputs)


def _modules() -> Iterator[Subject]:
    def rows(n: int, *widths: int) -> list[Tensor]:
        return [torch.randn(n, d, requires_grad=True) for d in widths]

    def of_size(n: int) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        torch.manual_seed(n)
        states = torch.randn(n, 3, 4, requires_grad=True)
        talk = {"x": states, "offsets": torch.tensor([0, 3, n]), "available": torch.rand(n, 3) < 0.7}
        text, audio = rows(n, 6, 6)
        losses = {"temperature": 0.2, "learn_temperature": True}
        contrast = msacore.nn.HierarchicalContrastiveLoss(4, 5, projection=6, learn_temperature=True)
        tiers = {"unimodal": rows(n, 4, 4, 4), "fused": rows(n, 4)[0], "high_level": rows(n, 5, 5, 5)}
        made = {
            f"nn.AlternatingPropagation, {variant}": (msacore.nn.AlternatingPropagation(4, 2, variant), talk)
            for variant in ("linear", "gcnii", "gated")
        }
        return made | {
            "nn.HierarchicalContrastiveLoss": (contrast, tiers),
            "nn.InfoNCE": (msacore.nn.InfoNCE(symmetric=True, **losses), {"anchors": text, "candidates": audio}),
            "nn.LowRankFusion": (msacore.nn.LowRankFusion((6, 6), 5), {"features": [text, audio]}),
            "nn.MatrixFusion": (msacore.nn.MatrixFusion(6, 5, modalities=2), {"features": [text, audio]}),
            "nn.RankNContrast": (msacore.nn.RankNContrast(**losses), {"embeddings": text, "targets": torch.randn(n)}),
        }

    first, second = of_size(7), of_size(5)
    for name, (module, arguments) in first.items():
        inputs: list[list[Tensor]] = [[], []]
        for found, made in zip(inputs, (first, second), strict=True):
            _take_tensors(made[name][1], found)
        yield Subject(name, _Flat(module, arguments), *map(tuple, inputs))


SUBJECTS = [*_operators(), *_modules()]
each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def _detached(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in tensors)


def _trained(model: Callable[..., Any], parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients of one step."""
    fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    outputs = model(*fresh)
    wanted = [t for t in (*fresh, *parameters) if t.requires_grad]
    total = torch.stack([o.float().square().sum() for o in outputs]).sum()
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*(o.detach() for o in outputs), *(torch.zeros(()) if g is None else g for g in grads)]


def _assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def _exports(subject: Subject, folder: Path) -> None:
    inputs = _detached(subject.inputs)
    program = torch.export.export(subject.model, inputs)
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2")
    _assert_close(loaded.module()(*inputs), subject.model(*inputs))


def _exports_for_any_size(subject: Subject, folder: Path) -> None:
    inputs, others = _detached(subject.inputs), _detached(subject.other_inputs)
    sizes = [{i: torch.export.Dim.AUTO for i in range(t.dim())} for t in inputs]
    program = torch.export.export(subject.model, inputs, dynamic_shapes=(tuple(sizes),))
    _assert_close(program.module()(*others), subject.model(*others))


def _becomes_onnx(subject: Subject, folder: Path) -> None:
    from examples.deploy import onnx_nodes

    inputs = _detached(subject.inputs)
    onnx_nodes.export(subject.model, inputs, folder / "model.onnx")
    _assert_close(onnx_nodes.evaluate(folder / "model.onnx", inputs), subject.model(*inputs))


def _compiles(subject: Subject, folder: Path, **options: Any) -> None:
    parameters = list(subject.model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(subject.model, fullgraph=True, **options)
    # Otherwise torch takes sizes that happen to be equal, such as three clips and three modalities, for one size.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        ours = _trained(compiled, parameters, subject.inputs)
    _assert_close(ours, _trained(subject.model, parameters, subject.inputs))
    if options.get("dynamic"):
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = _trained(compiled, parameters, subject.other_inputs)
        _assert_close(ours, _trained(subject.model, parameters, subject.other_inputs))


def _compiles_for_any_size(subject: Subject, folder: Path) -> None:
    _compiles(subject, folder, dynamic=True)


def _compiles_with_less_overhead(subject: Subject, folder: Path) -> None:
    _compiles(subject, folder, mode="reduce-overhead")


WAYS: dict[str, Callable[[Subject, Path], None]] = {
    "`torch.export`": _exports,
    "… any size": _exports_for_any_size,
    "ONNX": _becomes_onnx,
    "`torch.compile`": _compiles,
    "`dynamic=True`": _compiles_for_any_size,
    "`reduce-overhead`": _compiles_with_less_overhead,
}
PACKAGED = "AOTInductor"


def _table() -> dict[str, dict[str, str]]:
    """The table of the page: for each subject, its cells by the name of the column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_page_has_a_row_for_everything_and_a_column_for_every_way() -> None:
    table = _table()
    assert list(table) == [subject.name for subject in SUBJECTS]
    assert {f"nn.{name}" for name in msacore.nn.__all__} == {s.name.split(",")[0] for s in SUBJECTS if "nn." in s.name}
    for cells in table.values():
        assert list(cells) == [*WAYS, PACKAGED] and set(cells.values()) <= {"yes", "no"}


@pytest.mark.slow  # exports and compiles everything: seconds each
@pytest.mark.filterwarnings("ignore")  # torch's own exporters emit warnings
@pytest.mark.parametrize("way", WAYS)
@each_subject
def test_a_way_works_where_the_page_says_so(subject: Subject, way: str, tmp_path: Path) -> None:
    if _table()[subject.name][way] == "yes":
        WAYS[way](subject, tmp_path)
    else:
        with pytest.raises(Exception):  # noqa: B017  # whatever the exporter raises
            WAYS[way](subject, tmp_path)


class _Everything(nn.Module):
    """All subjects that can be packaged, one after another: each package takes the C++ compiler many seconds."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        super().__init__()
        self.models = nn.ModuleList(subject.model for subject in subjects)
        self.counts = [len(subject.inputs) for subject in subjects]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        start = 0
        for model, count in zip(self.models, self.counts, strict=True):
            outputs += model(*tensors[start : start + count])
            start += count
        return tuple(outputs)


@pytest.mark.slow  # AOTInductor's C++ compiler
@pytest.mark.filterwarnings("ignore")
def test_a_package_of_everything_runs(tmp_path: Path) -> None:
    table = _table()
    subjects = [subject for subject in SUBJECTS if table[subject.name][PACKAGED] == "yes"]
    assert len(subjects) == len(SUBJECTS)
    model, inputs = _Everything(subjects), tuple(t for s in subjects for t in _detached(s.inputs))
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        _assert_close(torch._inductor.aoti_load_package(path)(*inputs), model(*inputs))


BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # compiles a C++ program against torch's headers
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_from_top_to_bottom_and_its_program_needs_no_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names: dict[str, Any] = {"__name__": "page"}
    kinds = []
    for kind, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        kinds.append(kind)
        if kind == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        else:
            done = subprocess.run(["bash", "-euc", block], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
    assert kinds.count("sh") >= 2
    (outputs,) = torch.load("outputs.pt")
    torch.testing.assert_close(outputs, names["model"](*torch.load("inputs.pt")))
    needed = subprocess.run(["ldd", "run"], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed and "python" not in needed.replace(str(Path(torch.__path__[0]).parent), "")
    for arguments, message in (((), "usage:"), (("/none.so", "a", "b", "c"), "/none.so")):
        failed = subprocess.run(["./run", *arguments], capture_output=True, text=True)
        assert failed.returncode in (1, 2) and message in failed.stderr
