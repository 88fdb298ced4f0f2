"""Model folders from anywhere: weights only from safetensors files inside the folder, no kernel of
the hub, nothing of a size that takes all time or memory, and no network without being asked.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, modeling_utils

from avl_analysis.errors import InputError
from avl_analysis.models.inventory import inspect_model
from avl_analysis.models.loading import load_model
from avl_analysis.models.safety import no_network
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _split(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Put an index in the place of the weight file; all weights are listed under `name`."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def test_an_index_of_safetensors_files_inside_the_folder_is_read(folder: Path) -> None:
    save_file(_split(folder, "a.safetensors"), folder / "a.safetensors", {"format": "pt"})
    with torch.no_grad():
        batch = tiny.inputs(tiny.llava(kv_heads=2))
        wanted = tiny.llava(kv_heads=2)(**batch).logits
        assert torch.equal(load_model(folder).model(**batch).logits, wanted)


@pytest.mark.parametrize("name", ["weights.bin", "w.pt", "pytorch_model.bin"])
def test_an_index_that_leads_to_another_format_is_refused_before_the_file_is_opened(
    folder: Path, name: str
) -> None:
    torch.save(_split(folder, name), folder / name)
    with pytest.raises(InputError, match="not a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "link.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside.safetensors"
    name = str(outside) if name == "ABSOLUTE" else name
    save_file(_split(folder, name), outside, {"format": "pt"})
    (folder / "link.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="outside its folder"):
        load_model(folder)


def test_a_folder_of_the_hubs_cache_holds_links_to_its_own_blobs_and_is_read(
    saved: Path, tmp_path: Path
) -> None:
    snapshot = Path(shutil.copytree(saved, tmp_path / "models--a--b" / "snapshots" / "c0ffee"))
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    save_file(_split(snapshot, "w.safetensors"), blobs / "123", {"format": "pt"})
    (snapshot / "w.safetensors").symlink_to(Path("..") / ".." / "blobs" / "123")
    assert load_model(snapshot).model.config.model_type == "llava"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "lists no weights"),
        ("{}", "lists no weights"),
        ('{"weight_map": 3}', "lists no weights"),
        ("{", "cannot read model.safetensors.index.json"),
        ('{"weight_map": {"a": "none.safetensors"}}', "lack the file 'none.safetensors'"),
        ("[" * 100_000, "cannot read model.safetensors.index.json"),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, content: str, message: str) -> None:
    _split(folder, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        ("text_config", {"num_hidden_layers": 10**9}, "at most 10000"),
        ("vision_config", {"num_hidden_layers": 10**9}, "at most 10000"),
        ("text_config", {"hidden_size": 10**12}, "at most"),
        ("text_config", {"vocab_size": 10**10}, "at most"),
        ("vision_config", {"image_size": 10**6}, "places"),
        ("text_config", {"num_hidden_layers": "two"}, "cannot read the config|never run"),
        ("text_config", {"num_attention_heads": 0}, "."),
        ("text_config", {"num_attention_heads": 3}, "."),
        ("text_config", {"hidden_act": "gizmo"}, "."),
        ("text_config", {"rope_parameters": {"rope_type": "gizmo"}}, "."),
        ("", {"text_config": None, "vision_config": 5}, "."),
        ("", {"text_config": [1]}, "."),
    ],
)
def test_a_config_of_impossible_sizes_or_types_is_an_input_error_at_once(
    folder: Path, place: str, values: dict, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[place] if place else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))
    for read in (load_model, lambda path: inspect_model(str(path))):
        with pytest.raises(InputError, match=message) as error:
            read(folder)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["null", "3", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object_is_an_input_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    for read in (load_model, lambda path: inspect_model(str(path))):
        with pytest.raises(InputError):
            read(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, "x"]},
        {"pad_token_id": 1.5},
        {"bos_token_id": {}},
    ],
)
def test_end_tokens_that_are_no_numbers_are_refused(folder: Path, values: dict) -> None:
    _change(folder / "generation_config.json", **values)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2, "num_beams": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
        {"do_sample": True, "temperature": 5.0},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_an_answer_is_greedy_whatever_the_folder_says_about_generation(
    saved: Path, folder: Path, values: dict
) -> None:
    wanted = load_model(saved).answer(tiny.picture(), "what is this?", max_new_tokens=6)
    _change(folder / "generation_config.json", **values)
    assert load_model(folder).answer(tiny.picture(), "what is this?", max_new_tokens=6) == wanted


@pytest.mark.parametrize("place", ["top", "parts", "internal", "text_config", "vision_config"])
def test_a_config_never_makes_transformers_ask_for_a_kernel_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """transformers' own way to such a kernel is watched, and taken when it reads the config
    alone.
    """
    asked: list[object] = []
    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda name, **_: asked.append(name)
    )
    name = "kernels-community/flash-attn2"
    both = {"_attn_implementation": name, "attn_implementation": name}
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, dict[str, object]] = {
        "top": both,
        "parts": {"attn_implementation": {"": name, "text_config": name, "vision_config": name}},
        "internal": {"_attn_implementation_internal": name},
    }
    changes |= {part: {part: {**config[part], **both}} for part in ("text_config", "vision_config")}
    _change(folder / "config.json", **changes[place])
    inspect_model(str(folder))
    load_model(folder)
    assert asked == []
    if place in ("top", "parts"):
        with torch.device("meta"):
            AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        assert name in asked


@pytest.mark.parametrize("name", ["org/name", "kernels-community/flash-attn2", "a:b", ""])
def test_an_attention_backend_never_names_a_kernel_of_the_hub(saved: Path, name: str) -> None:
    with pytest.raises(InputError, match="kernels of the hub are never run"):
        load_model(saved, attn_implementation=name)


def test_flash_attention_without_its_package_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="flash-attn, which is not installed"):
        load_model(saved, attn_implementation="flash_attention_2")


def test_the_network_is_as_it_was_after_a_model_was_loaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with no_network():
        assert constants.HF_HUB_OFFLINE is True
    load_model(saved)
    assert constants.HF_HUB_OFFLINE is False


def test_an_adapter_beside_a_model_is_not_loaded_with_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InputError, match="holds a PEFT adapter"):
        load_model(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_additional_image_tokens": 10**9},
        {"num_additional_image_tokens": 1e300},
        {"image_processor": {"size": {"height": 10**9, "width": 10}}},
        {"image_processor": {"max_tiles": 10**12}},
    ],
)
def test_a_processor_that_makes_prompts_or_pictures_of_any_size_is_refused(
    folder: Path, values: dict
) -> None:
    _change(folder / "processor_config.json", **values)
    for read in (load_model, lambda path: inspect_model(str(path))):
        with pytest.raises(InputError, match="is possible"):
            read(folder)
