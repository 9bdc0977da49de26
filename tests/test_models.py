"""Models: what is saved comes back, and a folder that is not exactly a whole supported model is refused in one line."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

import sfa_core.models.load
from sfa_core.structure.inject import inject, structures_of
from sfa_core.structure.store import save_structure
from sfa_core.models.embedded import IMAGE_TOKENS, EmbeddedConfig, build_processor, new_model, train_tokenizer
from sfa_core.models.load import find_model, folder_revision, load_model, new_bundle, place, save_model
from sfa_core.models.quantization import quantized_layers

TEXTS = ["What is the value of red in 2015?", "How much are cat and sun together?", "List all values.", "elm 9, cat 31"]
TOKENIZER = train_tokenizer(TEXTS, 320)
SMALL = EmbeddedConfig(image_size=56, vision_width=32, vision_layers=2, vision_heads=2, vision_hidden=64,
                       language_width=64, language_layers=2,
                       language_heads=2, language_kv_heads=1, head_dim=32, language_hidden=64, downsample_ratio=0.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(new_bundle(SMALL, TOKENIZER, seed=3), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good model folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def refused(folder, *words, error=ValueError, **options):
    """Load and return the message, which must be one line that contains the words."""
    with pytest.raises(error) as caught:
        load_model(folder, placement="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_model_comes_back_weight_for_weight(saved):
    made, loaded = new_bundle(SMALL, TOKENIZER, seed=3), load_model(saved, placement="cpu")
    assert type(loaded.model) is InternVLForConditionalGeneration and not loaded.model.training
    ours, theirs = made.model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        loaded.model.config.prompt_suffix == ""
        and loaded.model.generation_config.eos_token_id == TOKENIZER.eos_token_id
    )
    assert loaded.processor.image_seq_length == SMALL.image_tokens == 4
    assert loaded.processor.image_processor.to_dict() == made.processor.image_processor.to_dict()
    assert loaded.tokenizer.chat_template == TOKENIZER.chat_template


def test_the_revision_is_that_of_the_weights_and_settings(saved, folder, tmp_path):
    first = load_model(saved, placement="cpu").revision
    assert len(first) == 12 and load_model(folder, placement="cpu").revision == first
    assert load_model(save_model(new_bundle(SMALL, TOKENIZER, seed=4), tmp_path / "other"),
                      placement="cpu").revision != first
    edit(folder / "config.json", prompt_suffix=" Answer:")
    assert load_model(folder, placement="cpu").revision != first


def test_a_seed_decides_the_weights_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    one, again, other = (new_model(SMALL, TOKENIZER, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    embeddings = one.model.vision_tower.embeddings
    assert embeddings.cls_token.std() > 0.01 and embeddings.position_embeddings.shape == (1, 17, 32)


def test_the_embedded_architecture_has_its_size():
    model = new_model(EmbeddedConfig(), train_tokenizer(TEXTS, 512))
    assert 1_000_000 < model.num_parameters() < 2_500_000 and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("change",
                         [dict(image_size=110), dict(image_size=98, downsample_ratio=0.5), dict(vision_heads=3),
                          dict(language_kv_heads=3)])
def test_numbers_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        new_model(EmbeddedConfig(**change), TOKENIZER)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_the_loaded_tokenizer_is_the_saved_one(saved):
    loaded = load_model(saved, placement="cpu").tokenizer
    for text in (*TEXTS, "e\u0301 é Å 총 ½ 👩‍👩‍👧 \r\n\t", " <|im_start|> <img>", "\ufeff\u200b\x00"):
        assert (
            loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
            and loaded.decode(loaded(text)["input_ids"]) == text
        )


def test_every_digit_is_a_token_and_training_is_deterministic():
    text = "1234.5 in 2015, x9y"
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("1234520159")
    assert train_tokenizer(TEXTS, 320).get_vocab() == TOKENIZER.get_vocab()
    assert all(len(TOKENIZER(token)["input_ids"]) == 1
               for token in (*IMAGE_TOKENS.values(), "<|im_start|>", "<|im_end|>", "user", "assistant"))
    with pytest.raises(ValueError, match="vocab_size 100; expected at least"):
        train_tokenizer(TEXTS, 100)


def test_a_missing_model_is_named(tmp_path):
    refused(tmp_path / "nothing", "nothing", "expected", error=FileNotFoundError)
    refused("nothing", "'nothing'", "embedded", error=FileNotFoundError)
    refused(tmp_path, "config.json is missing", error=FileNotFoundError)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file", error=FileNotFoundError)


def test_a_hub_id_without_a_network_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("OpenGVLab/InternVL3_5-1B-HF", "hf download OpenGVLab/InternVL3_5-1B-HF", "path",
                      error=FileNotFoundError)
    assert len(message) < 300
    refused("no such/na me", "no such/na me", error=FileNotFoundError)


@pytest.mark.parametrize("name, study", [("embedded", "05_embedded_model"), ("embedded_page", "06_page_model")])
def test_a_missing_model_that_ships_names_its_study(name, study, monkeypatch, tmp_path):
    monkeypatch.setitem(sfa_core.models.load.SHIPPED_MODELS, name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=study):
        find_model(name)


@pytest.mark.parametrize("text, word",
                         [("{", "no model configuration"), ("[]", "no model configuration"), ("{}", "model_type")])
def test_a_broken_configuration_is_refused(folder, text, word):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", word)


def test_an_unsupported_family_lists_the_supported_ones(folder):
    edit(folder / "config.json", model_type="internvl_chat")
    refused(folder, "'internvl_chat'", "internvl", "-HF")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", error=FileNotFoundError)
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, share):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    refused(folder, "model.safetensors", "damaged or cut off")


def test_weights_of_another_model_are_refused(folder, tmp_path):
    wider = save_model(new_bundle(EmbeddedConfig(**{**vars(SMALL), "vision_hidden": 96}), TOKENIZER),
                       tmp_path / "wider")
    shutil.copy2(wider / "model.safetensors", folder)
    refused(folder, "copy", "vision_tower")
    deeper = save_model(new_bundle(EmbeddedConfig(**{**vars(SMALL), "vision_layers": 3}), TOKENIZER),
                        tmp_path / "deeper")
    shutil.copy2(deeper / "model.safetensors", folder)
    refused(folder, "do not fit its config.json", "unexpected keys", "layer.2")


@pytest.mark.parametrize("name", ["vision_tower.embeddings.cls_token", "language_model.model.norm.weight"])
def test_a_missing_weight_is_not_made_up(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "do not fit its config.json", "1 missing keys", name.rpartition("model.")[2])


def test_a_tokenizer_of_another_model_is_refused(folder):
    bigger = train_tokenizer([*TEXTS, "some more words for more merges"], 400)
    bigger.save_pretrained(folder)
    refused(folder, "tokens", "embeddings")
    edit(folder / "config.json", image_token_id=7)
    refused(folder, "<IMG_CONTEXT>", "7")


def test_a_folder_without_a_processor_is_refused(folder):
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "processor", "copy")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "processor", "copy")


def test_folders_as_others_write_them_are_read(saved, folder):
    ours = load_model(saved, placement="cpu").processor
    edit(folder / "preprocessor_config.json", image_processor_type="GotOcr2ImageProcessorFast",
         processor_class="InternVLProcessor", default_to_square=True)
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", add_bos_token=False)
    theirs = load_model(folder, placement="cpu").processor
    assert theirs.image_processor.to_dict()["size"] == ours.image_processor.to_dict()["size"]
    assert theirs.tokenizer("12 a")["input_ids"] == TOKENIZER("12 a")["input_ids"]
    (folder / "preprocessor_config.json").unlink()
    edit(folder / "processor_config.json", image_processor=json.loads(ours.image_processor.to_json_string()))
    theirs = load_model(folder, placement="cpu").processor
    assert theirs.image_processor.to_dict() == ours.image_processor.to_dict() and theirs.image_seq_length == 4


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForImageTextToText": "modeling_own.Own",
           "AutoProcessor": "modeling_own.Own"}
    edit(folder / "config.json", auto_map=own)
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "modeling_own.Own"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_own.Own", None]})
    assert type(load_model(folder, placement="cpu").model) is InternVLForConditionalGeneration and not ran.exists()


@pytest.mark.parametrize("kind", ["AutoImageProcessor", "AutoTokenizer", "AutoProcessor"])
def test_code_of_a_class_that_is_not_known_is_not_even_asked_about(folder, tmp_path, monkeypatch, kind):
    """Transformers would ask on the terminal whether the folder's code may run; here every answer would be yes."""
    ran, asked = tmp_path / "ran", []
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    edit(folder / "preprocessor_config.json", image_processor_type="Own", auto_map={"AutoImageProcessor": "own.Own"})
    if kind == "AutoTokenizer":
        edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    if kind == "AutoProcessor":
        edit(folder / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Own"})
    refused(folder, "processor of", "copy")
    assert not ran.exists() and not asked


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("key",
                         ["_attn_implementation", "attn_implementation", "_attn_implementation_internal",
                          "_experts_implementation"])
def test_a_configuration_does_not_choose_the_code_of_the_attention(folder, key, part, bits):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)[key] = "owner/name"
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, placement="cpu", language_bits=bits).model
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}


@pytest.mark.parametrize("change",
                         [dict(dtype="no_such_dtype"), dict(vision_config=7),
                          dict(vision_config={"num_hidden_layers": "two"})])
def test_a_configuration_of_wrong_types_is_refused_in_one_line(folder, change):
    edit(folder / "config.json", **change)
    refused(folder, "config.json")


@pytest.fixture
def sharded(folder):
    """The same model in several weight files with an index."""
    load_model(folder, placement="cpu").model.save_pretrained(folder.parent / "shards", max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    for path in (folder.parent / "shards").glob("model*"):
        shutil.move(path, folder)
    return folder


def test_weights_in_several_files_are_read_and_exactly_these_make_the_revision(saved, sharded):
    whole, parts = load_model(saved, placement="cpu"), load_model(sharded, placement="cpu")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2 and all(
        torch.equal(parts.model.state_dict()[n], w) for n, w in whole.model.state_dict().items()
    )
    shutil.copy2(files[0], sharded / "consolidated.safetensors")
    (sharded / "training_args.bin").write_bytes(b"settings of whoever trained it")
    (sharded / "folder.json").mkdir()
    os.mkfifo(sharded / "pipe.txt")
    assert load_model(sharded,
                      placement="cpu").revision == parts.revision, "what is not loaded has no part in the revision"
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert folder_revision(sharded) != parts.revision, file.name
        file.write_bytes(content)
    assert folder_revision(sharded) == parts.revision
    files[0].unlink()
    refused(sharded, files[0].name, "missing", error=FileNotFoundError)


@pytest.mark.parametrize("name", [
    "pytorch_model.bin", "../{0}", "./{0}", "inner/{0}", "/{0}", "{0}.bin", "..", "", "..\\{0}", "{0}\0.safetensors", 7,
    None, ["{0}"],
])
def test_an_index_names_weight_files_of_its_folder_only(sharded, monkeypatch, name):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    weight, shard = sorted(index["weight_map"].items())[0]
    for elsewhere in (sharded.parent, sharded / "inner"):
        elsewhere.mkdir(exist_ok=True)
        shutil.copy2(sharded / shard, elsewhere)
    shutil.copy2(sharded / shard, sharded / f"{shard}.bin")
    torch.save(load_file(sharded / shard), sharded / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    index["weight_map"][weight] = name.format(shard) if isinstance(name, str) else name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "model.safetensors.index.json", weight, "plain name")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[" * 100_000])
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "model.safetensors.index.json")


def test_weights_that_lie_elsewhere_by_another_way_are_refused(folder):
    shutil.copy2(folder / "model.safetensors", folder / "other.safetensors")
    for name in ("other.safetensors", "../other.safetensors", "adapter_model.bin"):
        edit(folder / "config.json", transformers_weights=name)
        refused(folder, "transformers_weights")
    edit(folder / "config.json", transformers_weights=None)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/some/other/model"}))
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize("content",
                         ["[]", "7", "{", '"text"', "null", '{"watermarking_config": {"bias": "x"}}',
                          '{"num_beams": "x"}',
                                     '{"max_new_tokens": -1}', '{"compile_config": 3}', '{"cache_implementation": 3}'])
def test_generation_settings_of_wrong_types_are_left_out_or_named(folder, content):
    (folder / "generation_config.json").write_text(content)
    try:
        assert load_model(folder, placement="cpu").model.generation_config is not None
    except ValueError as error:
        assert "copy" in str(error) and "\n" not in str(error)


NOT_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", ["vision_tower.embeddings.cls_token", "layers.1.self_attn.q_proj.weight"])
def test_a_weight_that_is_no_number_is_refused(folder, name, value, bits):
    weights = load_file(folder / "model.safetensors")
    found = next(key for key in weights if key.endswith(name))
    weights[found].view(-1)[5] = NOT_NUMBERS[value]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "NaN or infinity", name, language_bits=bits)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_whole_numbers_are_refused(folder, kind):
    weights = load_file(folder / "model.safetensors")
    found = next(key for key in weights if key.endswith("layers.0.mlp.up_proj.weight"))
    weights[found] = weights[found].to(kind)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "up_proj.weight", "floating-point")


def test_a_precision_that_cannot_hold_the_weights_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    next(value for key, value in weights.items() if key.endswith("layers.0.mlp.up_proj.weight"))[0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder, placement="cpu", precision="bfloat16").model.dtype == torch.bfloat16
    refused(folder, "float16", "up_proj.weight", "NaN or infinity", precision="float16")


def test_a_model_that_is_no_numbers_does_not_replace_a_good_one(folder):
    bundle, before = new_bundle(SMALL, TOKENIZER, seed=5), folder_revision(folder)
    next(bundle.model.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_model(bundle, folder)
    assert folder_revision(folder) == before


@pytest.mark.parametrize("options, word", [
    (dict(precision="fp8"), "bfloat16"), (dict(language_bits=3), "expected None, 4 or 8"),
    (dict(placement="gpu"), "'gpu'"),
    (dict(placement="cpu,cpu,cpu"), "3 devices"), (dict(placement="cuda:99"), "CUDA device"),
])
def test_unknown_options_are_refused(saved, options, word):
    with pytest.raises(ValueError, match=word) as caught:
        load_model(saved, **{"placement": "cpu"} | options)
    assert "\n" not in str(caught.value)


def test_precision_and_a_pair_of_devices(saved):
    bundle = load_model(saved, precision="bfloat16", placement="cpu,cpu")
    assert {weight.dtype for weight in bundle.model.parameters()} == {torch.bfloat16}
    assert place(bundle, "cpu") is bundle and bundle.devices == (torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_model_is_quantised(saved, bits):
    bundle = load_model(saved, language_bits=bits, placement="cpu")
    family, model = bundle.family, bundle.model
    assert len(quantized_layers(family.language_of(model))) == 2 * 7  # layers x (q, k, v, o, gate, up, down)
    assert not any(quantized_layers(part)
                   for part in (family.tower_of(model), family.projector_of(model), model.lm_head))
    ids = torch.tensor([[1, 40, 41, 42]])
    plain = load_model(saved, placement="cpu").model(ids).logits
    assert torch.isfinite(model(ids).logits).all() and not torch.equal(model(ids).logits, plain)


def test_saving_replaces_a_model_but_nothing_else(saved, folder, tmp_path, monkeypatch):
    (folder / "README.md").write_text("card")
    bundle = new_bundle(SMALL, TOKENIZER, seed=5)
    save_model(bundle, folder)
    assert (folder / "README.md").read_text() == "card" and load_model(folder, placement="cpu").revision != load_model(
        saved, placement="cpu"
    ).revision
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds no model"):
        save_model(bundle, tmp_path / "work")
    revision = load_model(folder, placement="cpu").revision

    def fail(*_):
        raise OSError("disk full")

    failed = []

    def fail_when_done(source, target):  # the first time only, so that the model that was there can be put back
        if str(target) == str(folder) and not failed:
            failed.append(source)
            fail()
        return replace(source, target)

    replace = os.replace
    for owner, name, failure in ((type(bundle.tokenizer), "save_pretrained", fail), (os, "replace", fail_when_done)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr("sfa_core.core.files.exchange", lambda *_: False)  # a file system that cannot exchange names
            patch.setattr(owner, name, failure)
            save_model(new_bundle(SMALL, TOKENIZER, seed=6), folder)
    assert load_model(folder, placement="cpu").revision == revision and not list(tmp_path.glob(".copy-*"))


def test_a_processor_can_cut_an_image_into_tiles():
    processor = build_processor(TOKENIZER, SMALL, max_tiles=4)
    assert processor.image_processor.crop_to_patches and processor.image_processor.max_patches == 4


def test_structural_weights_are_attached_in_float32(saved, tmp_path):
    trained = load_model(saved, placement="cpu")
    inject(trained, seed=5)
    save_structure(trained, tmp_path / "structure")
    with pytest.raises(ValueError, match="save_structure"):
        save_model(trained, tmp_path / "model")
    again, plain = load_model(saved, placement="cpu",
                              structure=tmp_path / "structure"), load_model(saved, placement="cpu")
    assert again.revision.startswith(f"{plain.revision}+") and not again.model.training
    pixels = torch.rand(1, 3, 56, 56)
    ours, theirs, bare = (bundle.model.get_image_features(pixel_values=pixels).pooler_output
                          for bundle in (again, trained, plain))
    assert torch.equal(ours, theirs) and not torch.equal(ours, bare)
    low = load_model(saved, placement="cpu", precision="bfloat16", structure=tmp_path / "structure")
    biases = structures_of(low)
    assert low.model.dtype == torch.bfloat16 and {weight.dtype for bias in biases for weight in bias.parameters()} == {
        torch.float32
    }
    refused(saved, "nowhere", error=FileNotFoundError, structure=tmp_path / "nowhere")
