"""States of a selection: damaged or hand-made ones and those of another selection are refused; others go on exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msacore import select
from msacore.selection import state as module
from tests.test_selection import draw, every_strategy
from tests.test_selection_files import N, folder, run  # noqa: F401  # a fixture

DAMAGE: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "junk": (b"no state", "cannot be read"),
    "a tensor": (torch.ones(3), "holds no state"),
    "another dict": ({"a": 1}, "`.state` of an earlier Selection"),
    "of 0.1": (
        {"format": 1, "identity": {}, "budget": 3, "indices": torch.arange(3), "scores": torch.ones(3), "memory": {}},
        "written by msacore 0.1",
    ),
}


@pytest.mark.parametrize("label", list(DAMAGE))
def test_state_files_that_are_none_are_refused(
    label: str,
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, words = DAMAGE[label]
    if isinstance(content, bytes):
        (folder / "picks.json.state").write_bytes(content)
    else:
        torch.save(content, folder / "picks.json.state")
    assert run(folder) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "picks.json.state" in told
    assert not (folder / "picks.json").exists()


def test_entries_of_a_state_are_checked_one_by_one() -> None:
    x = draw(N, 4)
    given: dict[str, Any] = {"strategy": "kcenter", "labeled": [5], "candidates": np.arange(40)}
    good = select(x, 6, **given).state

    def signed(**change: Any) -> dict[str, Any]:
        made = {k: v for k, v in (good | change).items() if k != "checksum"}
        return made | {"checksum": module._checksum(made)}

    indices, scores = good["indices"], good["scores"]

    def moved(value: int) -> torch.Tensor:
        out = indices.clone()
        out[2] = value
        return out

    assert select(x, 6, state=signed(), **given).indices.equal(indices)
    for bad, words in (
        (good | {"indices": indices.flip(0)}, "checksum"),
        (good | {"scores": scores * 2}, "checksum"),
        (good | {"budget": 7}, "checksum"),
        (good | {"checksum": "0" * 64}, "checksum"),
        (good | {"checksum": None}, "checksum"),
        (good | {"indices": indices.int()}, "torch.int64"),
        (good | {"indices": indices.tolist()}, "a tensor"),
        (good | {"scores": scores.float()}, "torch.float64"),
        (good | {"scores": scores[None]}, "1 dimension"),
        (good | {"identity": 3}, "a dict"),
        (good | {"budget": "6"}, "an integer"),
        (good | {"format": 3}, "earlier Selection"),
        (signed(indices=moved(-1)), r"outside of \[0"),
        (signed(indices=moved(N)), r"outside of \[0"),
        (signed(indices=moved(int(indices[0]))), "twice"),
        (signed(indices=moved(5)), "labelled"),
        (signed(indices=moved(50)), "not candidates"),
        (signed(scores=scores[:3]), "6 picks with 3 scores"),
        (signed(scores=scores * torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=f"select: .*{words}"):
            select(x, 8, state=bad, **given)
    groups = {"groups": np.arange(N) % 2, "max_per_group": 3, "strategy": "kcenter"}
    good = select(x, 6, **groups).state
    indices = torch.tensor([0, 2, 4, 6])
    with pytest.raises(ValueError, match="max_per_group"):
        select(x, 6, state=signed(indices=indices, scores=good["scores"][:4]), **groups)


@every_strategy
def test_picks_scores_and_radius_resume_equal(strategy: str) -> None:
    x, u = draw(120, 5), torch.rand(120, generator=torch.Generator().manual_seed(1))
    options = {"delta": 1.7} if strategy == "probcover" else None
    given: dict[str, Any] = {"strategy": strategy, "uncertainty": u, "options": options}
    whole = select(x, 40, **given)
    if strategy in ("prefilter", "typiclust"):
        states = [whole.state]
    else:
        states = [select(x, budget, **given).state for budget in (0, 1, 2, 17, 39, 40)]
    for state in states:
        again = select(x, 40, state=state, **given)
        assert again.indices.equal(whole.indices)
        assert again.scores.equal(whole.scores)
        assert again.radius == whole.radius
