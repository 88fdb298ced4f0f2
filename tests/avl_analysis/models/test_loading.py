"""Loading models and preparing their inputs, on tiny random models that went through
save_pretrained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import avl
from avl_analysis.errors import InputError
from avl_analysis.models import processors
from avl_analysis.models.loading import VLM, load_model
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load_model(folder)


def _text(vlm: VLM, inputs: dict, row: int = 0) -> str:
    valid = inputs["attention_mask"][row].bool()
    return vlm.processor.tokenizer.decode(inputs["input_ids"][row][valid])


def test_a_saved_folder_gives_the_logits_of_the_model_that_was_saved(vlm: VLM) -> None:
    batch = tiny.inputs(tiny.llava(kv_heads=2), [9, 5], [1, 2], between=3)
    with torch.no_grad():
        assert torch.equal(vlm.model(**batch).logits, tiny.llava(kv_heads=2)(**batch).logits)
    assert not vlm.model.training
    assert "LlavaForConditionalGeneration" in vlm.description
    assert vlm.revision is not None
    assert vlm.revision.startswith("sha256:")


def test_two_models_of_different_weights_have_different_revisions(vlm: VLM, tmp_path: Path) -> None:
    other = load_model(tiny.save_folder(tmp_path, tiny.llava(kv_heads=2, seed=1)))
    assert other.revision != vlm.revision


def test_the_chat_template_is_applied_and_the_picture_comes_first(vlm: VLM) -> None:
    inputs = vlm.prepare(tiny.picture(), "what is the colour?")
    assert _text(vlm, inputs).replace("<image>", "") == "USER:  \nwhat is the colour? ASSISTANT:"
    assert int((inputs["input_ids"] == tiny.IMAGE).sum()) == vlm.model.config.image_seq_length
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)


def test_system_prompt_and_history_stand_before_the_question_and_the_picture_with_the_first(
    vlm: VLM,
) -> None:
    inputs = vlm.prepare(
        tiny.picture(), "and now?", system="be brief", history=[("what is it?", "a cat")]
    )
    text = _text(vlm, inputs)
    order = [
        text.index(part) for part in ("be brief", "<image>", "what is it?", "a cat", "and now?")
    ]
    assert order == sorted(order)


def test_placeholders_in_the_prompt_say_where_each_picture_stands(vlm: VLM) -> None:
    inputs = vlm.prepare(
        [tiny.picture(), tiny.picture(seed=1)], "<image> is red but <image> is blue"
    )
    text = _text(vlm, inputs)
    assert text.index("red but") < text.rindex("<image>") < text.index("blue")
    assert inputs["pixel_values"].shape[0] == 2


def test_without_a_chat_template_the_plain_form_is_used(tmp_path: Path) -> None:
    plain = load_model(tiny.save_folder(tmp_path, chat_template=False))
    inputs = plain.prepare(tiny.picture(), "describe")
    assert _text(plain, inputs).replace("<image>", "").strip(" ") == "\ndescribe"


def test_a_batch_of_unequal_prompts_is_padded_on_the_left_and_each_row_answers_as_alone(
    vlm: VLM,
) -> None:
    questions = ["what?", "describe the image", "where is the red one?"]
    pictures = [tiny.picture(seed=0), [tiny.picture(seed=1), tiny.picture(seed=2)], []]
    inputs = vlm.prepare(pictures, questions)
    mask = inputs["attention_mask"]
    assert bool((mask.diff(dim=1) >= 0).all())
    assert int(mask[:, -1].sum()) == 3
    together = vlm.answer(pictures, questions, max_new_tokens=6)
    alone = [
        vlm.answer(row, question, max_new_tokens=6)
        for row, question in zip(pictures, questions, strict=True)
    ]
    assert together == alone


def test_an_empty_list_of_pictures_asks_without_one(vlm: VLM) -> None:
    inputs = vlm.prepare([], "what?")
    assert "pixel_values" not in inputs
    assert not bool((inputs["input_ids"] == tiny.IMAGE).any())


@pytest.mark.parametrize(
    ("images", "prompt", "kwargs", "message"),
    [
        (None, "what?", {}, "prompt without an image"),
        ([None], ["what?"], {}, "prompt 0 is without an image"),
        (tiny.picture(), "  ", {}, "prompt is empty"),
        (tiny.picture(), ["a", "b"], {}, "2 prompts need a list of 2 pictures"),
        ([tiny.picture()], ["a", "b"], {}, "got 1"),
        ([], [], {}, "empty list of prompts"),
        (tiny.picture(), "<image> or <image>?", {}, r"names 2 place\(s\).*but 1 were given"),
        ([], "what is <image>?", {}, "but 0 were given"),
        ([tiny.picture()], ["what?"], {"history": [("a", "b")]}, "one prompt"),
        (tiny.picture(), "word " * 400, {}, "takes at most 1024"),
        ("nothing.png", "what?", {}, "no such file"),
    ],
)
def test_input_that_does_not_fit_is_refused_with_its_reason(
    vlm: VLM, images: object, prompt: object, kwargs: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vlm.prepare(images, prompt, **kwargs)  # type: ignore[arg-type]


def test_a_template_that_drops_the_system_prompt_is_noticed(vlm: VLM, tmp_path: Path) -> None:
    deaf = load_model(tiny.save_folder(tmp_path))
    deaf.processor.chat_template = deaf.processor.chat_template.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    )
    with pytest.raises(InputError, match="drops the system prompt"):
        deaf.prepare(tiny.picture(), "what?", system="be brief")


def test_a_template_that_drops_the_picture_is_noticed(tmp_path: Path) -> None:
    blind = load_model(tiny.save_folder(tmp_path))
    blind.processor.chat_template = blind.processor.chat_template.replace("<image>", "")
    with pytest.raises(
        InputError,
        match=r"LlavaProcessor refused 1 picture|row 0 has 1 picture\(s\) but no image tokens",
    ):
        blind.prepare(tiny.picture(), "what?")


def test_a_template_that_refuses_a_role_is_reported_in_its_own_words(tmp_path: Path) -> None:
    strict = load_model(tiny.save_folder(tmp_path))
    strict.processor.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match="System role not supported"):
        strict.prepare(tiny.picture(), "what?")


def test_answers_are_greedy_by_default_and_repeatable(vlm: VLM) -> None:
    first, again = (vlm.answer(tiny.picture(), "what?", max_new_tokens=8) for _ in range(2))
    assert first == again
    assert first


def test_an_answer_under_a_policy_is_what_generate_gives_inside_the_session(vlm: VLM) -> None:
    policy = avl.AdaptivePolicy(secondary=0.25, core=0.15, text=None)
    inputs = vlm.prepare(tiny.picture(), "what?")
    with avl.adaptive(vlm.model, policy):
        out = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    words = vlm.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert vlm.answer(tiny.picture(), "what?", policy, max_new_tokens=8) == words.strip()
    assert vlm.answer(tiny.picture(), "what?", max_new_tokens=8) != words.strip()


def test_an_answer_is_greedy_whatever_the_generation_config_says(tmp_path: Path) -> None:
    folder = tiny.save_folder(tmp_path)
    plain = load_model(folder).answer(tiny.picture(), "what?", max_new_tokens=8)
    settings = {"num_beams": 4, "do_sample": True, "temperature": 5.0, "pad_token_id": 0}
    suppressed = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**suppressed, **settings}))
    assert load_model(folder).answer(tiny.picture(), "what?", max_new_tokens=8) == plain


def test_dtype_and_attention_backend_are_taken_as_asked(folder: Path) -> None:
    half = load_model(folder, dtype="bfloat16", attn_implementation="eager")
    assert half.model.dtype == torch.bfloat16
    assert half.model.config.text_config._attn_implementation == "eager"
    assert half.prepare(tiny.picture(), "what?")["pixel_values"].dtype == torch.bfloat16


def test_pictures_are_prepared_by_pillow_even_where_torchvision_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def load(path: str, **options: object) -> object:
        asked.update(options)
        return tiny.processor().image_processor

    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processors, "AutoImageProcessor", SimpleNamespace(from_pretrained=load))
    processor = load_model(folder).processor
    assert asked["backend"] == "pil"
    assert processor.tokenizer.init_kwargs.get("backend") != "pil"
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_a_picture_without_image_tokens_is_noticed_whatever_the_processor_says(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(type(vlm.processor)):  # type: ignore[misc]
        def __call__(self, images: object = None, text: object = None, **kwargs: object) -> object:
            return super().__call__(images=None, text=["what?"], **kwargs)

    monkeypatch.setattr(vlm.processor, "__class__", Careless)
    with pytest.raises(InputError, match=r"row 0 has 1 picture\(s\) but no image tokens"):
        vlm.prepare(tiny.picture(), "what?")


def _without_config(path: Path) -> None:
    (path / "config.json").unlink()


def _broken_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def _foreign_type(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "telepath", "auto_map": {"AutoConfig": "a.B"}})
    )


def _without_processor(path: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def _without_image_processor(path: Path) -> None:
    (path / "processor_config.json").unlink()


def _junk_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"junk" * 100)


def _pickled_weights(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _edit_weights(path: Path, edit: Callable[[dict, str], None]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights, next(name for name in weights if "layers.1.self_attn.q_proj.weight" in name))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _weights_of_another_layer(path: Path) -> None:
    def add(weights: dict, name: str) -> None:
        weights[name.replace("layers.1", "layers.2")] = weights[name].clone()

    _edit_weights(path, add)


def _adapter_instead(path: Path) -> None:
    (path / "config.json").unlink()
    settings = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (path / "adapter_config.json").write_text(json.dumps(settings))


def _broken_generation_config(path: Path) -> None:
    (path / "generation_config.json").write_text('{"eos_token_id": ')


def _unknown_quantization(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "origami", "bits": 3}
    (path / "config.json").write_text(json.dumps(config))


def _missing_weight(path: Path) -> None:
    _edit_weights(path, lambda weights, name: weights.pop(name))


def _cut_weight(path: Path) -> None:
    _edit_weights(path, lambda weights, name: weights.update({name: weights[name][:3].clone()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "holds no config.json"),
        (_broken_config, "cannot read the config"),
        (_foreign_type, "never run"),
        (_without_processor, "without a usable processor"),
        (_without_image_processor, "without a usable processor"),
        (_junk_weights, "damaged"),
        (_pickled_weights, "no usable safetensors weights"),
        (_missing_weight, "lacks 1 of the model's weights"),
        (_cut_weight, "do not fit"),
        (_weights_of_another_layer, r"more layers than its config.json.*layers\.2\."),
        (_adapter_instead, r"load_model\('org/base'\); vlm.model.load_adapter\("),
        (_broken_generation_config, "cannot read generation_config.json"),
        (_unknown_quantization, "does not know .quant_method 'origami'"),
    ],
)
def test_a_damaged_model_folder_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tiny.save_folder(tmp_path))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_a_text_only_model_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"text-only model or not a language model \(type 'llama'\)"
    ):
        load_model(tiny.save_text_only(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scene", "did you mean 'scenes'"),
        ("gizmo", "unknown model 'gizmo'"),
        ("./nowhere", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("someone/some-model", "neither a folder here nor in the local cache.*--download"),
        ("", "unknown model|no such model"),
        (__file__, "is a file: pass the folder"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_with_what_is_possible(
    name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_an_attention_backend_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="attention 'nonsense'"):
        load_model(folder, attn_implementation="nonsense")


def test_a_dtype_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match="unknown dtype 'float7': possible are float32, bfloat16, float16"
    ):
        load_model(folder, dtype="float7")


def test_a_device_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no device 'teapot'"):
        load_model(folder, device="teapot")
