"""The command lines of both systems: subcommands, settings from a TOML file, devices, and errors as one sentence."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        help: What it does, in a line.
        add_arguments: Adds its options to a parser.
        run: Does it, with the parsed options; returns the exit status.
        demo: What ``--demo`` changes unless the command line or the settings file say otherwise, given the options.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    demo: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None


def command_line(
    module: str, description: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> int:
    """Run one of several commands; without a name, the first of them.

    Args:
        module: As in ``python -m MODULE``.
        description: What the system is.
        commands: By name, the default first.
        argv: Arguments; those of the process when omitted.

    Returns:
        The exit status: 0, 2 for an error the user can fix (one sentence on stderr), 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    default = next(iter(commands))
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else default
    label = module.rpartition(".")[2]
    if name not in commands:
        print(f"{label}: there is no command {name!r}; the commands are {', '.join(commands)}", file=sys.stderr)
        return 2
    listing = "\n".join(f"  {key:10}{value.help}" for key, value in commands.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}" + (f" {name}" if named else ""),
        description=f"{description}\n\n{name}: {commands[name].help}.",
        epilog=f"commands (without one: {default}; each has its own --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands[name].add_arguments(parser)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings by option name; flags override them")
    try:
        return commands[name].run(parse(parser, arguments, commands[name].demo))
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"{label}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{label}: interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    demo: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parse flags, which take precedence over the settings of ``--config``, and those over what ``--demo`` changes.

    Raises:
        ValueError: The settings file is not TOML, or names an unknown option or an impossible value.
        FileNotFoundError: There is no such file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    file = early.parse_known_args(argv)[0].config
    tokens = _tokens(parser, file, argv) if file else []
    args = parser.parse_args([*tokens, *argv])
    if demo is not None and args.demo:
        parser.set_defaults(**demo(args))
        # Applied once more: a switch that the file turns off is set as a default too.
        tokens = _tokens(parser, file, argv) if file else []
        args = parser.parse_args([*tokens, *argv])
    return args


def _tokens(parser: argparse.ArgumentParser, file: Path, argv: Sequence[str]) -> list[str]:
    """The settings of a TOML file as flags; tables only group them."""
    if not file.is_file():
        raise FileNotFoundError(f"--config {file}: there is no such file")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: not a TOML file ({error})") from None
    options = {
        name: action
        for action in parser._actions
        if action.dest not in ("help", "config")
        for name in (action.dest.replace("_", "-"), *(flag.lstrip("-") for flag in action.option_strings))
    }
    tokens: list[str] = []
    for key, value in _flat(file, content).items():
        name = key.replace("_", "-")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists the options"
            raise ValueError(f"--config {file}: unknown option {key!r}{hint}")
        tokens += _flags(parser, file, key, options[name], options[name].option_strings[-1], value, argv)
    return tokens


def _flat(file: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        for inner, setting in value.items() if isinstance(value, dict) else [(key, value)]:
            if inner in flat:
                raise ValueError(f"--config {file}: {inner!r} is given twice")
            flat[inner] = setting
    return flat


def _flags(
    parser: argparse.ArgumentParser,
    file: Path,
    key: str,
    action: argparse.Action,
    flag: str,
    value: Any,
    argv: Sequence[str],
) -> list[str]:
    switch, several = action.nargs == 0, action.nargs not in (None, 0)
    repeated = isinstance(action, argparse._AppendAction)
    values = value if isinstance(value, list) else [value]
    kinds = bool if switch else (str, int, float)
    if any(not isinstance(v, kinds) or (isinstance(v, bool) and not switch) for v in values):
        wanted = "true or false" if switch else "text or a number" + (", or a list of them" if several else "")
        raise ValueError(f"--config {file}: {key} = {value!r}: expected {wanted}")
    if isinstance(value, list) and not (several or repeated):
        raise ValueError(f"--config {file}: {key} = {value!r}: expected one value, not a list")
    if isinstance(action.nargs, int) and action.nargs > 0 and len(values) != action.nargs:
        raise ValueError(f"--config {file}: {key} = {value!r}: expected {action.nargs} values")
    if switch:
        parser.set_defaults(**{action.dest: False})
        return [flag] if value else []
    for text in map(str, values):
        try:
            converted = action.type(text) if callable(action.type) else text
        except (ValueError, TypeError):
            raise ValueError(
                f"--config {file}: {key} = {text!r}: expected {getattr(action.type, '__name__', 'another value')}"
            ) from None
        if action.choices is not None and converted not in action.choices:
            raise ValueError(f"--config {file}: {key} = {text!r}: choose from {', '.join(map(str, action.choices))}")
    if repeated:
        given = any(a == flag or a.startswith(f"{flag}=") for a in argv)
        return [] if given else [f"{flag}={v}" for v in values]
    return [flag, *map(str, values)] if several else [f"{flag}={values[0]}"]


def add_device_argument(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add ``--device``; :func:`check_device` reads it."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")


def check_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: torch does not know it, msacore has no kernels for it, or the machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: torch knows no such device; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: msacore computes on cpu and cuda only")
    if device.type == "cpu":
        if device.index not in (None, 0):
            raise ValueError(f"--device {name}: there is one cpu device; give cpu")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s), numbered from 0")
    return device


def add_tensorboard_argument(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add ``--tensorboard``; :func:`tensorboard_writer` reads it."""
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also write curves for TensorBoard (package tensorboard)"
    )


def tensorboard_writer(folder: Path | None) -> Callable[[str], Any] | None:
    """A function that opens torch's ``SummaryWriter`` for a named run below ``folder``; None without a folder.

    Raises:
        ValueError: The package tensorboard is not installed.
    """
    if folder is None:
        return None
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard: the package tensorboard is not installed; pip install tensorboard") from None
    return lambda name: writer(log_dir=str(folder / name))
