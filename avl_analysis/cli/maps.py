"""`avl maps` and `avl patches`: what relevance maps point at, and what patches say."""

from __future__ import annotations

from pathlib import Path

import typer

from avl_analysis.cli.options import (
    Attention,
    Device,
    Download,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    NetCDFFile,
    PerTask,
    Questions,
    Tasks,
    check_netcdf,
    load,
    progress,
    read_or_draw,
)

MAPS_EXAMPLES = """
Examples: [bold]avl maps --scenes 4 --out pointing.nc[/],
[bold]avl maps questions.jsonl --model ./my-llava[/]
"""
PATCHES_EXAMPLES = """
Examples: [bold]avl patches --scenes 4 --out patches.nc[/],
[bold]avl patches pictures.jsonl --model ./my-llava[/]
"""


def maps(
    data: Questions = None,
    model: Model = "scenes",
    out: NetCDFFile = Path("pointing.nc"),
    scenes: PerTask = 4,
    task: Tasks = None,
    max_new_tokens: MaxNewTokens = 32,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Which relevance map points at what a word is about: raw, value-weighted, relative, ...?"""
    check_netcdf(out, force)
    samples = read_or_draw(data, scenes, task, "recording")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.intervals import mean_interval
    from avl_analysis.relevance import METHODS
    from avl_analysis.relevance.pointing import point, save_pointing

    with progress("following words", unit="questions") as advance:
        result = point(vlm, samples, max_new_tokens=max_new_tokens, progress=advance)
    save_pointing(result, out)
    for method, title in METHODS.items():
        found = mean_interval(result["pointing_all"].sel(map=method).values)
        typer.echo(f"{title:30} {found.words('%')}")
    typer.echo(
        f"strongest patch on what a word is about, mean over layers; at random"
        f" {100 * float(result['area'].mean()):.0f} %; {result.sizes['sample']} of {len(samples)}"
        f" questions; everything in {out}"
    )


def patches(
    data: Questions = None,
    model: Model = "scenes",
    out: NetCDFFile = Path("patches.nc"),
    scenes: PerTask = 4,
    task: Tasks = None,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Which share of an object's patches say its name, layer by layer (logit lens)?"""
    check_netcdf(out, force)
    samples = read_or_draw(data, scenes, task, "recording")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.heads.patch_words import save_patch_names, say_names

    with progress("reading patches", unit="questions") as advance:
        result = say_names(vlm, samples, progress=advance)
    save_patch_names(result, out)
    typer.echo(result["own"].mean("picture").to_pandas().round(3).to_string())
    typer.echo(
        "share of an object's patches that say its name, by layers passed;"
        f" {result.sizes['picture']} pictures; everything in {out}"
    )
