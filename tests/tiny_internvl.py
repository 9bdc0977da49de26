"""A random InternVL of the real class, small enough for tests in seconds."""
from types import SimpleNamespace

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from sfa_core.core.bundle import Bundle
from sfa_core.core.families import family_of
from sfa_core.models.embedded import EmbeddedConfig

SMALLEST = EmbeddedConfig(vision_width=32, vision_layers=2, vision_heads=2, vision_hidden=32, language_width=32,
                          language_layers=2, language_heads=2,
                          # with tokenizer and processor, to be trained
                          language_kv_heads=1, head_dim=16, language_hidden=32)


def tiny_internvl(
    layers: int = 2,
    heads: int = 2,
    width: int = 32,
    image: int = 56,  # pixels, square; patch 14
    seed: int = 0,
    **vision,
) -> InternVLForConditionalGeneration:
    """Build a model in eval mode whose weights are all random; the global random state stays as it was."""
    side = image // 14
    encoder = {"image_size": [image, image], "patch_size": [14, 14], "hidden_size": width,
               "intermediate_size": 2 * width, "num_hidden_layers": layers,
               "num_attention_heads": heads, "attention_bias": True, "layer_scale_init_value": 1.0, **vision}
    language = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 16}
    config = InternVLConfig(vision_config=encoder, text_config=language, image_seq_length=(side // 2) ** 2,
                            image_token_id=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=0.0 if weight.ndim > 1 else 1.0, std=0.1)
    return model.eval()


def pixels(images: int = 3, image: int = 56, seed: int = 1) -> torch.Tensor:
    """Draw random pixel values, (images, 3, image, image)."""
    return torch.randn(images, 3, image, image, generator=torch.Generator().manual_seed(seed))


def bundle_of(model, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), family=None) -> Bundle:
    """Return a bundle around a model that has no processor but for its normalisation."""
    scaling = SimpleNamespace(image_mean=list(mean), image_std=list(std))
    return Bundle(model, SimpleNamespace(image_processor=scaling), family or family_of(model), "tiny")
