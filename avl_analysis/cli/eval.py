"""`avl eval`: benchmarks of lmms-eval under several policies, scores beside costs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from avl_analysis.cli.options import Tasks
from avl_analysis.errors import InputError
from avl_analysis.files import check_folder_writable, write_text

EXAMPLES = """
Examples: [bold]avl eval ./my-llava --wrapper llava_hf --benchmark mme -p a-vl -p random:0.5[/],
[bold]avl eval scenes --wrapper llava_hf --scenes 20 --task what -p a-vl[/] (drawn scenes);
a benchmark of lmms-eval is fetched from its hub, so it needs --download
"""


def evaluate(
    model: Annotated[str, typer.Argument(help="scenes, a model folder, or a hub id.")],
    wrapper: Annotated[
        str, typer.Option(help="lmms-eval's model: llava_hf, qwen2_5_vl, qwen3_vl, ...")
    ] = "huggingface",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Policies as avl compare names them; repeat."),
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Tasks of lmms-eval, e.g. mme; repeat for several.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own, for lmms-eval.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=0, help="Drawn scenes of each task instead.")] = 0,
    task: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer about a drawn scene, in tokens.")
    ] = 64,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cuda",
    arguments: Annotated[
        str, typer.Option(help="Further --model_args for lmms-eval, e.g. dtype=float32.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for results and table.csv.")] = Path("eval"),
    download: Annotated[
        bool, typer.Option("--download", help="Allow fetching models and benchmarks.")
    ] = False,
) -> None:
    """Run benchmarks of lmms-eval with and without policies; needs the extra lmms."""
    from avl_analysis.lmms import results
    from avl_analysis.lmms.plugin import STOCK, WRAPPERS

    if wrapper not in WRAPPERS:
        raise InputError(f"unknown wrapper {wrapper!r}: choose among {', '.join(WRAPPERS)}")
    if find_spec("lmms_eval") is None:
        raise InputError(
            "lmms-eval is not installed: pip install 'avl-analysis[lmms]', in an environment of"
            " its own if it asks for other versions"
        )
    # The stock cache is always measured and comes first: other scores are divided by its scores.
    names = [*dict.fromkeys([STOCK, *(policy or [])])]
    folders: dict[str, str] = {}
    for name in names:
        if (other := folders.setdefault(_file_name(name), name)) != name:
            raise InputError(
                f"policies {other} and {name} would share the folder {out / _file_name(name)}:"
                " rename one"
            )
    check_folder_writable(out)
    tasks, include = _tasks(benchmark, include, scenes, task, max_new_tokens, out)
    files = {}
    for name in names:
        folder = out / _file_name(name)
        files[name] = _run(
            model,
            wrapper,
            _policy_argument(name, folder),
            tasks,
            include,
            limit,
            device,
            arguments,
            folder,
            download,
        )
    frame = results.table(files, reference=STOCK)
    write_text(out / "table.csv", frame.to_csv(index_label="policy"))
    typer.echo(frame.round(4).to_string())
    typer.echo(f"results and table.csv in {out}")


def _tasks(
    benchmark: list[str] | None,
    include: Path | None,
    scenes: int,
    task: list[str] | None,
    max_new_tokens: int,
    out: Path,
) -> tuple[list[str], Path | None]:
    """Names of lmms-eval tasks and the folder they lie in; drawn scenes are written as a task."""
    if bool(benchmark) == bool(scenes):
        raise InputError("pass either --benchmark NAME or --scenes N (drawn questions)")
    if not scenes:
        return list(benchmark or ()), include
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.lmms.local_task import write_task

    folder = out / "task"
    samples = scene_samples(scenes, task)
    write_task(folder, "avl_scenes", samples, max_new_tokens=max_new_tokens)
    return ["avl_scenes"], folder


def _policy_argument(name: str, folder: Path) -> str:
    """The policy as a model argument; settings go through a file, as commas part arguments."""
    from avl_analysis.evaluation.policy_files import named_policy, save_policy
    from avl_analysis.lmms.plugin import STOCK

    if name == STOCK:
        return STOCK
    chosen = named_policy(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "policy.json"
    save_policy(chosen, path)
    return str(path.resolve())


def _run(
    model: str,
    wrapper: str,
    policy: str,
    tasks: list[str],
    include: Path | None,
    limit: int | None,
    device: str,
    arguments: str,
    folder: Path,
    download: bool,
) -> Path:
    """Run lmms-eval in a process of its own; returns the result file it wrote."""
    from avl_analysis.lmms.plugin import PREFIX
    from avl_analysis.lmms.results import newest_result, read_result
    from avl_analysis.scenes import MODEL_DIR

    pretrained = str(MODEL_DIR) if model == "scenes" else model
    given = f"pretrained={pretrained},policy={policy},device={device},device_map={device}"
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", PREFIX + wrapper]
    command += ["--model_args", given + (f",{arguments}" if arguments else "")]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--output_path", str(folder)]
    command += ["--include_path", str(include.resolve())] if include is not None else []
    command += ["--limit", str(limit)] if limit is not None else []
    # Without --download the libraries may only use what this machine holds.
    offline = {} if download else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    # The folder may hold the result of an earlier run, which must not be taken for this one's.
    before = newest_result(folder)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **offline}
        )
    after = newest_result(folder)
    # lmms-eval may exit with 0 after an error, so only a new result that counts its costs is one.
    if done.returncode or after is None or after == before:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        # The last line that names an error, else the last line; all of them are in the log.
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1:] or "?")
        raise InputError(f"lmms-eval failed with policy {policy}; see {log}: {reason}")
    read_result(after)
    return after


def _file_name(policy: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in policy)
