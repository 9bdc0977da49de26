"""Random multimodal models of several real classes, small enough for tests in seconds, and prompts for them in one
batch."""
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sfa_core.core.families import Family
from sfa_core.core.bundle import Bundle

IMAGE, START, WORDS, TOKENS = 5, 6, 64, 4  # image token, token before an image, vocabulary, image tokens per image
TEXT = {"vocab_size": WORDS, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2,
        "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 7, "vision_start_token_id": START, "vision_end_token_id": 8}


def internvl():
    "InternVL with Qwen3: three query heads per key head, of width 12, which is not 48 / 6."
    vision = {"image_size": [56, 56], "patch_size": [14, 14], "hidden_size": 32, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "qwen3", **TEXT, "head_dim": 12}
    return InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text,
                                                           image_seq_length=TOKENS, image_token_id=IMAGE))


def llava():
    "LLaVA with LLaMA, a key head for every query head."
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 32,
              "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "projection_dim": 32}
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 6}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE,
                                                     image_seq_length=TOKENS))


def qwen2_5_vl():
    "Qwen2.5-VL: positions of three kinds, grouped keys."
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48,
              "fullatt_block_indexes": [0], "window_size": 56}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision,
                                                               text_config={**TEXT, "rope_parameters": ROPE},
                                                               **QWEN_IDS))


def qwen3_vl():
    "Qwen3-VL: image features added again in early layers, heads of width 8 that are normalised."
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48,
              "patch_size": 14, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision,
                                                         text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE},
                                                         **QWEN_IDS))


BUILDERS = {"internvl": internvl, "llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


@dataclass
class Tiny:
    "A bundle and the pixels of its images."
    bundle: Bundle
    name: str

    def pixels(self, images: list[int]) -> dict[str, Any]:
        "Draw images by their number."
        shape = {"internvl": (1, 3, 56, 56), "llava": (1, 3, 28, 28)}.get(self.name, (16, 3 * 2 * 14 * 14))
        drawn = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(100 + one)) for one in images])
        return {"pixel_values": drawn} | ({"image_grid_thw": torch.tensor([[1, 4, 4]] * len(images))}
                                          if "qwen" in self.name else {})

    def inputs(self, prompts: list[list[int | str]]) -> dict[str, Any]:
        "Turn prompts, lists of token ids and of images such as 'image 3', into one left-padded batch."
        rows = [[token for part in prompt for token in (token_ids(part))] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        images = [int(part.split()[1]) for prompt in prompts for part in prompt if isinstance(part, str)]
        kinds = {"mm_token_type_ids": (ids == IMAGE).int()} if "qwen" in self.name else {}
        return {"input_ids": ids, "attention_mask": mask, **kinds, **(self.pixels(images) if images else {})}

    def logits(self, prompts: list[list[int | str]], steps: int = 4, **options: Any) -> torch.Tensor:
        "Generate greedily and return the logits of every step, (B, steps, V)."
        settings = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
                                    output_logits=True,
                                    suppress_tokens=[IMAGE, 7, START], **options)
        with torch.no_grad():
            return torch.stack(self.bundle.model.generate(**self.inputs(prompts), generation_config=settings).logits,
                               dim=1)


def token_ids(part: int | str) -> list[int]:
    return [START, *[IMAGE] * TOKENS, 8] if isinstance(part, str) else [part]


def tiny(name: str, seed: int = 0) -> Tiny:
    """Build a model whose weights are all random, in float64 so that equality means equality; the global random
    state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[name]()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=0.0 if weight.ndim > 1 else 1.0, std=0.2)
    family = Family(name=name, model_type=name, tower="model.vision_tower", projector="model.multi_modal_projector",
                    language="model.language_model",
                    attention="", image_token="<image>", special=0, views="tiles", example="", merge=lambda config: 1)
    return Tiny(Bundle(model.double().eval(), None, family, f"tiny-{name}"), name)


# the last has no image
PROMPTS = [[9, 10, "image 0", 11, 12, 13, 14, 15], [9, "image 1", 16, "image 2", 17, 18, 19], [20, "image 3", 21, 22],
           [23, 24, 25]]
