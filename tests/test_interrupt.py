"""Ctrl-C during a loop of many steps on the CPU."""

import signal
import subprocess
import sys
import time

import pytest

# A program that announces itself, computes for ever, and says what ended it.
_PROGRAM = """
import torch, msacore
x = torch.ones(6, 3, 4, requires_grad=True)
offsets = torch.tensor([0, 4, 6])
intra, inter = msacore.graph.window_edges(offsets, 3), msacore.graph.modality_edges(6, 3)
steps = 2**40
print("started", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""

_CALLS = {
    "propagate": "msacore.propagate(x, offsets, steps=steps)",
    "graph_propagate": "msacore.graph_propagate(x[:, 0], torch.arange(7), torch.arange(6), steps=steps)",
    "alternating_graph_propagate": "msacore.alternating_graph_propagate(x.flatten(0, 1), intra, inter, steps=steps)",
    "without gradients": "torch.no_grad().__enter__(); msacore.propagate(x, offsets, steps=steps)",
    "a handler that returns first": (
        "import signal; first = signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True)); "
        "msacore.propagate(x, offsets, steps=steps)"
    ),
}

# Gradients of one step, whose backward operator is told that there are many.
_FORWARDS = {
    "propagate": ("propagation._propagate_backward", "msacore.propagate(x, offsets, steps=1)"),
    "graph_propagate": (
        "graph_propagation._graph_propagate_backward",
        "msacore.graph_propagate(x[:, 0], torch.arange(7), torch.arange(6))",
    ),
    "alternating_graph_propagate": (
        "graph_propagation._alternating_graph_propagate_backward",
        "msacore.alternating_graph_propagate(x.flatten(0, 1), intra, inter, steps=1)",
    ),
}
_CALLS |= {
    f"gradient of {name}": f"from msacore.ops import graph_propagation, propagation; once = {operator}; "
    f"{operator} = lambda *arguments, **options: once(*arguments, **options | dict(steps=steps)); "
    f"{forward}.sum().backward()"
    for name, (operator, forward) in _FORWARDS.items()
}


_IN_THE_FIRST_TIER = ("propagate", "graph_propagate", "a handler that returns first")  # a call takes seconds


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=name, marks=() if name in _IN_THE_FIRST_TIER else pytest.mark.slow)
        for name, call in _CALLS.items()
    ],
)
def test_many_steps_hear_ctrl_c(call: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(call=call)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "started\n"
        time.sleep(0.5)
        if "SIGUSR1" in call:
            program.send_signal(signal.SIGUSR1)
            assert program.stdout.readline() == "heard\n"
        program.send_signal(signal.SIGINT)
        out, error = program.communicate(timeout=60)
    finally:
        program.kill()
    assert out == "interrupted\n", error
    assert program.returncode == 0, error
