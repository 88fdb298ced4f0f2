"""Malformed command lines, pictures, recordings, questions, policies and model folders, drawn from
a seed.

`calls` yields as many as are asked for, the kinds in turn. Each is a command line and a note of
what is wrong with it; the files it names are written into a folder of its own. Nothing here runs
the commands.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SHORT = ["--max-new-tokens", "1"]


@dataclass(frozen=True)
class Call:
    """A command line. `harmless`: whether it may also succeed, as odd input may be legitimate."""

    arguments: list[str]
    note: str
    harmless: bool = True


@dataclass(frozen=True)
class Given:
    """Sound files that are copied and damaged, and where damaged ones go."""

    model: Path
    picture: Path
    recording: Path
    comparison: Path
    ablation: Path
    policy: Path
    work: Path

    def copy(self, path: Path, name: str) -> Path:
        return Path(shutil.copy(path, self.work / name))


Kind = Callable[[np.random.Generator, Given, int], Call]


def calls(given: Given, count: int, seed: int = 0) -> Iterator[Call]:
    """`count` calls, all kinds in turn; the same ones for the same seed."""
    kinds: tuple[Kind, ...] = (
        _options,
        _paths,
        _picture,
        _questions,
        _policy_text,
        _policy_file,
        _recording,
        _facts,
        _bytes,
        _model,
        _weights,
        _other_files,
    )
    for number in range(count):
        yield kinds[number % len(kinds)](np.random.default_rng((seed, number)), given, number)


ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    0,
    -1,
    1.5,
    1e300,
    10**9,
    10**30,
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    "\ud800",
    "\x00",
    "é" * 300,
)
"""Values of the wrong type, size or kind."""

TEXTS = (
    "",
    " ",
    "x" * 5000,
    "../..",
    "~nosuchuser/x",
    "/dev/null",
    "/proc/1/mem",
    "\x1b[31mred",
    "[/bold]",
    "a\nb",
    "é\u2028ß",
    "-1",
    "nan",
    "1e999",
    "9" * 400,
    "http://x/y.png",
    "org/name",
    "./none",
)


def _any(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _noise(rng: np.random.Generator, most: int = 40) -> str:
    letters = string.printable + "é漢🙂\u202e\x00"
    return "".join(_any(rng, letters) for _ in range(int(rng.integers(most))))


def _record(given: Given, *arguments: object) -> list[str]:
    named = ["record", "--model", given.model, "--out", given.work / "o.nc", "--force", *SHORT]
    return [*map(str, named), *map(str, arguments)]


def _options(rng: np.random.Generator, given: Given, number: int) -> Call:
    command = _any(rng, ("record", "compare", "calibrate", "ablate", "frontier", "models", "stats"))
    options = {
        "record": (
            "--layers",
            "--heads",
            "--queries",
            "--statistics",
            "--batch-size",
            "--scenes",
            "--task",
            "--seed",
            "--dtype",
            "--device",
            "--attention",
            "--workers",
        ),
        "compare": ("--task", "--metric", "--scenes", "--batch-size", "--dtype", "--out"),
        "calibrate": ("--target", "--task", "--prefill-layer", "--scenes", "--out"),
        "ablate": ("--kind", "--draws", "--seed", "--task", "--scenes", "--out"),
        "frontier": ("--budgets", "--task", "--scenes", "--workers", "--seed", "--show"),
        "models": ("--write", "--colour"),
        "stats": ("--list", "--colour"),
    }[command]
    value = _any(rng, (*TEXTS, _noise(rng), "1,x", "5-1", "0-999999999", "0.5:0.5", "meta", "hpu"))
    # A number would be a sound value of some options, and start a long computation.
    words = [command, _any(rng, options), value, "--model", "./none"]
    if command in ("stats", "models"):
        words = words[:3]
    return Call(words, "an option")


def _paths(rng: np.random.Generator, given: Given, number: int) -> Call:
    text = _any(rng, (*TEXTS, _noise(rng), str(given.work), "a/" * 2000, "a" * 300))
    where = int(rng.integers(8))
    words = [
        _record(given, text, "what?"),
        _record(given, "--data", text),
        ["record", str(given.picture), "what?", "--model", text, *SHORT],
        ["record", str(given.picture), "what?", "--model", str(given.model), "--out", text, *SHORT],
        ["stats", text],
        ["compare", text, "--model", "./none"],
        ["compare", "-p", f"{text}.json", "--model", "./none"],
        ["report", text, "--out", str(given.work / "r")],
    ][where]
    return Call(words, "a path")


def _picture(rng: np.random.Generator, given: Given, number: int) -> Call:
    content = bytearray(given.picture.read_bytes())
    how = int(rng.integers(4))
    if how == 0:
        content = content[: int(rng.integers(len(content)))]
    elif how == 1:
        for place in rng.integers(0, len(content), 1 + int(rng.integers(20))):
            content[place] ^= 1 << int(rng.integers(8))
    elif how == 2:
        content = bytearray(rng.bytes(int(rng.integers(2000))))
    else:  # a size that does not fit the data
        content[16:24] = int(rng.integers(2**31)).to_bytes(4, "big") * 2
    path = given.work / "p.png"
    path.write_bytes(bytes(content))
    return Call(_record(given, path, "what?"), "a picture")


def _line(rng: np.random.Generator, given: Given) -> str:
    entry: dict[str, Any] = {"image": str(given.picture), "prompt": "what?", "answer": "red"}
    keys = ("image", "images", "prompt", "answer", "answers", "id", "task", "regions", "meta", "x")
    for _ in range(1 + int(rng.integers(2))):
        key = _any(rng, keys)
        if rng.random() < 0.2:
            entry.pop(key, None)
        elif key == "regions" and rng.random() < 0.7:
            entry[key] = [[_any(rng, ODD) for _ in range(int(rng.integers(6)))]]
        else:
            entry[key] = _any(rng, ODD)
    text = json.dumps(entry)
    how = rng.random()
    if how < 0.1:
        text = text[: int(rng.integers(len(text)))]
    elif how < 0.15:
        text = "[" * 50_000
    elif how < 0.2:
        text = text.replace('"red"', "9" * 5000)
    elif how < 0.25:
        text = text.replace('"red"', "1e400")
    return text


def _questions(rng: np.random.Generator, given: Given, number: int) -> Call:
    lines = [_line(rng, given) for _ in range(1 + int(rng.integers(2)))]
    path = given.work / "q.jsonl"
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = bytes(rng.bytes(200))
    path.write_bytes(content)
    shutil.rmtree(given.work / "o.nc.parts", ignore_errors=True)
    return Call(_record(given, "--data", path), "questions")


def _policy_text(rng: np.random.Generator, given: Given, number: int) -> Call:
    names = ("a-vl", "random", "h2o", "snapkv", "streaming", "fastv", "full", "x", "")
    settings = ("core", "seed", "budget", "text", "window", "sinks", "secondary", "gizmo", "")
    text = _any(rng, names)
    if rng.random() < 0.4:
        text += ":" + str(_any(rng, TEXTS))
    for _ in range(int(rng.integers(3))):
        text += f",{_any(rng, settings)}={_any(rng, (*TEXTS, 'none', 'true', '[1]', _noise(rng)))}"
    return Call(["compare", "-p", text, "--model", "./none"], "a policy by name", harmless=False)


def _policy_file(rng: np.random.Generator, given: Given, number: int) -> Call:
    content = json.loads(given.policy.read_text())
    key = _any(rng, ("format", "version", "policy", "fields", "core", "text", "refresh_every"))
    target = content if key in content else content["fields"]
    target[key] = _any(rng, ODD)
    text = json.dumps(content)
    if rng.random() < 0.2:
        text = _any(rng, ("", "{", "[]", "null", "[" * 50_000, "9" * 5000, text[:-10]))
    path = given.work / "p.json"
    path.write_text(text)
    return Call(["compare", "-p", str(path), "--model", "./none"], "a policy file", harmless=False)


def _read(rng: np.random.Generator, given: Given, path: Path) -> list[str]:
    if rng.random() < 0.7:
        return ["stats", str(path)]
    return ["ablate", "--recording", str(path), "--model", "./none"]


def _recording(rng: np.random.Generator, given: Given, number: int) -> Call:
    path = given.copy(given.recording, "d.nc")
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = _any(rng, names)
        how = int(rng.integers(5))
        item = file[name]
        if how == 0:
            del file[name]
        elif how == 1:
            file.attrs[_any(rng, ("format", "version", "query_heads", "layers", "model"))] = (
                str(_any(rng, ODD)).encode("ascii", "ignore").decode().replace("\x00", "")
            )
        elif how == 2 and isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf" and item.size:
            item[...] = _any(rng, (0, 1, 100))
        elif how == 3:
            item.attrs["fill"] = "x"
        else:
            parent, last = item.parent, name.rpartition("/")[2]
            parent.move(last, f"{last}_moved")
    return Call(_read(rng, given, path), "a changed recording")


def _facts(rng: np.random.Generator, given: Given, number: int) -> Call:
    path = given.copy(given.recording, "f.nc")
    with h5py.File(path, "r+") as file:
        facts = json.loads(file["tokens/facts"].asstr()[0])
        key = _any(rng, ("words", "answer", "prompt", "boxes", "scene", "picture", "answers", "id"))
        facts[key] = _any(rng, ODD)
        file["tokens/facts"][0] = json.dumps(facts)
        file.attrs.pop("facts_sha256", None)
    return Call(_read(rng, given, path), "changed facts")


def _bytes(rng: np.random.Generator, given: Given, number: int) -> Call:
    source, command = _any(
        rng,
        (
            (given.recording, ["stats"]),
            (given.comparison, ["report", str(given.recording), "--comparison"]),
            (given.ablation, ["report", str(given.recording), "--ablation"]),
        ),
    )
    content = bytearray(source.read_bytes())
    if rng.random() < 0.3:
        content = content[: int(rng.integers(len(content)))]
    for place in rng.integers(0, max(1, len(content)), 1 + int(rng.integers(30))):
        if content:
            content[place] = int(rng.integers(256))
    path = given.work / f"b{source.suffix}"
    path.write_bytes(bytes(content))
    words = [*command, str(path)]
    if command[0] == "report":  # a file in the way ends it before anything is drawn
        words += ["--out", str(given.picture / "r")]
    return Call(words, "changed bytes")


def _model(rng: np.random.Generator, given: Given, number: int) -> Call:
    folder = given.work / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(given.model, folder)
    names = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix == ".json" and path.name != "tokenizer.json"
    ]
    path = _any(rng, names)
    content = json.loads(path.read_text())
    part = content
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    if inner and rng.random() < 0.6:
        part = content[_any(rng, inner)]
    key = _any(rng, list(part) or ["x"])
    if rng.random() < 0.2:
        part.pop(key, None)
    else:
        part[key] = _any(rng, ODD)
    path.write_text(json.dumps(content))
    if rng.random() < 0.15:
        path.write_text(_any(rng, ("", "{", "[]", "null", "[" * 50_000)))
    if rng.random() < 0.5:
        return Call(["models", str(folder)], f"{path.name} of a model: {key}")
    named = ["record", given.picture, "what?", "--model", folder, *SHORT, "--force"]
    words = [*map(str, named), "--out", str(given.work / "o.nc")]
    return Call(words, f"{path.name} of a model: {key}")


def _weights(rng: np.random.Generator, given: Given, number: int) -> Call:
    folder = given.work / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(given.model, folder)
    path = folder / _any(
        rng, ("model.safetensors", "tokenizer.json", "chat_template.jinja", "processor_config.json")
    )
    content = bytearray(path.read_bytes()) if path.exists() else bytearray(b"x")
    how = int(rng.integers(3))
    if how == 0 and path.exists():
        path.unlink()
    elif how == 1:
        path.write_bytes(bytes(content[: int(rng.integers(len(content)))]))
    else:
        first = min(len(content), 4000)  # the header of the weights, the beginning of the others
        for place in rng.integers(0, first, 1 + int(rng.integers(8))):
            content[place] = int(rng.integers(256))
        path.write_bytes(bytes(content))
    named = ["record", given.picture, "what?", "--model", folder, *SHORT, "--force"]
    return Call([*map(str, named), "--out", str(given.work / "o.nc")], f"bytes of {path.name}")


def _other_files(rng: np.random.Generator, given: Given, number: int) -> Call:
    """A sound file of one kind where another is expected."""
    path = _any(
        rng,
        (
            given.picture,
            given.recording,
            given.comparison,
            given.ablation,
            given.policy,
            given.model / "config.json",
            given.model,
        ),
    )
    out = ["--out", str(given.picture / "r")]
    words = _any(
        rng,
        (
            ["stats", str(path)],
            ["compare", str(path), "--model", "./none"],
            ["compare", "-p", str(path), "--model", "./none"],
            ["record", "--data", str(path), "--model", "./none"],
            ["ablate", "--recording", str(path), "--model", "./none"],
            ["frontier", "--show", str(path)],
            ["report", str(path), *out],
            ["report", str(given.recording), "--comparison", str(path), *out],
            ["report", str(given.recording), "--ablation", str(path), *out],
        ),
    )
    return Call(words, "another kind of file")
