"""The state from which a selection continues: its picks, what they depend on, and a checksum over both."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

FORMAT = 2
_KEYS = {"format", "identity", "budget", "indices", "scores", "checksum"}
_TO_ORIGINAL_BUDGET = ("prefilter", "typiclust")
_DIGESTS = ("embeddings", "labeled", "uncertainty", "candidates", "groups")


def pack(identity: dict[str, Any], budget: int, indices: Tensor, scores: Tensor) -> dict[str, Any]:
    """A state of these picks, ``[k]`` int64, and scores, ``[k]`` float64."""
    state = {"format": FORMAT, "identity": dict(identity), "budget": budget, "indices": indices, "scores": scores}
    return state | {"checksum": _checksum(state)}


def _checksum(state: dict[str, Any]) -> str:
    head = json.dumps([state["format"], state["identity"], state["budget"]], sort_keys=True)
    whole = hashlib.sha256(head.encode())
    for key in ("indices", "scores"):
        whole.update(state[key].contiguous().numpy().tobytes())
    return whole.hexdigest()


def _numbers(state: dict[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"select: expected `state['{key}']` to be a tensor, got {type(value).__name__}")
    if value.dtype != dtype or value.dim() != 1:
        raise ValueError(
            f"select: expected `state['{key}']` to be {dtype} with 1 dimension, got {value.dtype}, {list(value.shape)}"
        )
    return value.detach().cpu()


def unpack(given: Any, identity: dict[str, Any], budget: int, total: int) -> tuple[Tensor, Tensor]:
    """Picks and scores of a state that belongs to the selection ``identity`` of ``total`` rows.

    Raises:
        ValueError: The state is refused; the message says what is wrong with it.
    """
    if isinstance(given, dict) and type(given.get("format")) is int and given["format"] == 1 and "memory" in given:
        raise ValueError(
            "select: `state` was written by msacore 0.1, whose states are no longer read; select again from the start"
        )
    if not isinstance(given, dict) or set(given) != _KEYS or given["format"] != FORMAT:
        raise ValueError("select: expected `state` to be the `.state` of an earlier Selection")
    state = dict(given)
    if not isinstance(state["identity"], dict):
        raise ValueError(f"select: expected `state['identity']` to be a dict, got {type(state['identity']).__name__}")
    if type(state["budget"]) is not int:
        raise ValueError(f"select: expected `state['budget']` to be an integer, got {state['budget']!r}")
    state["indices"] = _numbers(state, "indices", torch.int64)
    state["scores"] = _numbers(state, "scores", torch.float64)
    try:
        fits = state["checksum"] == _checksum(state)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("select: `state` is damaged or was changed by hand: its checksum does not fit")
    _check_identity(state["identity"], identity)
    if identity["strategy"] in _TO_ORIGINAL_BUDGET and state["budget"] != budget:
        raise ValueError(
            f"select: `{identity['strategy']}` depends on the budget and resumes only to its original one, "
            f"{state['budget']}, got {budget}"
        )
    _check_picks(state["indices"], state["scores"], budget, total)
    return state["indices"], state["scores"]


def _check_identity(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    for key, value in mine.items():
        if theirs.get(key) != value:
            shown = "" if key in _DIGESTS else f": {theirs.get(key)!r} there, {value!r} here"
            raise ValueError(f"select: `state` belongs to a selection with another `{key}`{shown}")


def _check_picks(indices: Tensor, scores: Tensor, budget: int, total: int) -> None:
    if len(indices) != len(scores):
        raise ValueError(f"select: `state` holds {len(indices)} picks with {len(scores)} scores")
    if len(indices) > budget:
        raise ValueError(f"select: `state` already holds {len(indices)} picks, more than the budget {budget}")
    if bool(((indices < 0) | (indices >= total)).any()):
        raise ValueError(f"select: `state` holds picks outside of [0, N = {total})")
    if len(indices.unique()) < len(indices):
        raise ValueError("select: `state` holds a pick twice")
    if bool(scores.isnan().any()):
        raise ValueError("select: `state` holds a NaN score")
