"""Tiny vision-language models of nine families with random weights, without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

from ..demo.architecture import publish_tower_names

WIDE = 4096
"""A sliding window longer than every row of the tests."""
PINPOINTS = [[16, 16], [16, 32], [32, 16]]
"""LLaVA-OneVision's image sizes as (height, width)."""


@dataclass(frozen=True)
class Spec:
    """Width, vocabulary and token ids of a language model with four heads; `begin` is None without a begin of sequences."""

    width: int = 32
    vocabulary: int = 200
    image: int = 150
    video: int = 151
    begin_of_image: int = 152
    end_of_image: int = 153
    pad: int = 0
    begin: int | None = 1
    end: int = 2

    @property
    def head(self) -> int:
        return self.width // 4

    def text(self, **changes: Any) -> dict[str, Any]:
        """Settings of the language model."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "pad_token_id": self.pad,
            "bos_token_id": self.begin,
            "eos_token_id": self.end,
            "initializer_range": 0.15,
            **changes,
        }

    def gemma(self, **changes: Any) -> dict[str, Any]:
        """Settings of a language model of Gemma."""
        heads = {"head_dim": self.head, "query_pre_attn_scalar": self.head}
        return self.text(**heads, sliding_window=WIDE, **changes)

    def mrope(self, **changes: Any) -> dict[str, Any]:
        """Rotary positions in time, height and width."""
        sections = [self.head // 4, self.head // 8, self.head // 8]
        return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **changes}

    @property
    def qwen_tokens(self) -> dict[str, int]:
        return {
            "image_token_id": self.image,
            "video_token_id": self.video,
            "vision_start_token_id": self.begin_of_image,
            "vision_end_token_id": self.end_of_image,
        }


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _siglip(**changes: Any) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**VISION, vision_use_head=False, **changes)


def _llava(spec: Spec, text: Any) -> tf.LlavaConfig:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=spec.image,
        image_seq_length=16,
    )


def _smolvlm(spec: Spec) -> tf.SmolVLMConfig:
    return tf.SmolVLMConfig(
        vision_config=dict(VISION),
        text_config=tf.LlamaConfig(**spec.text()),
        image_token_id=spec.image,
        scale_factor=2,
    )


def _qwen2_5_vl(spec: Spec) -> tf.Qwen2_5_VLConfig:
    vision = {**QWEN_VISION, "out_hidden_size": spec.width, "window_size": 16, "fullatt_block_indexes": [1]}
    text = spec.text(rope_parameters=spec.mrope())
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **spec.qwen_tokens)


def _qwen3_vl(spec: Spec) -> tf.Qwen3VLConfig:
    vision = {**QWEN_VISION, "out_hidden_size": spec.width, "num_position_embeddings": 64}
    text = spec.text(head_dim=spec.head, rope_parameters=spec.mrope(mrope_interleaved=True))
    return tf.Qwen3VLConfig(
        text_config=text,
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        **spec.qwen_tokens,
    )


def _internvl(spec: Spec) -> tf.InternVLConfig:
    return tf.InternVLConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=tf.Qwen2Config(**spec.text()),
        image_token_id=spec.image,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _llava_onevision(spec: Spec) -> tf.LlavaOnevisionConfig:
    return tf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=tf.Qwen2Config(**spec.text()),
        image_token_index=spec.image,
        video_token_index=spec.video,
        image_grid_pinpoints=PINPOINTS,
    )


def _gemma3(spec: Spec) -> tf.Gemma3Config:
    layers = ["sliding_attention", "full_attention"]
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**spec.gemma(layer_types=layers)),
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        image_token_index=spec.image,
        boi_token_index=spec.begin_of_image,
        eoi_token_index=spec.end_of_image,
    )


def _paligemma2(spec: Spec) -> tf.PaliGemmaConfig:
    text = spec.gemma(attn_logit_softcapping=5.0, final_logit_softcapping=10.0)
    return tf.PaliGemmaConfig(
        text_config=tf.Gemma2Config(**text),
        vision_config=_siglip(projection_dim=spec.width),
        projection_dim=spec.width,
        hidden_size=spec.width,
        image_token_index=spec.image,
        vocab_size=spec.vocabulary,
    )


FAMILIES: dict[str, Callable[[Spec], Any]] = {
    "llava_clip": lambda spec: _llava(spec, tf.LlamaConfig(**spec.text())),
    "llava_mistral": lambda spec: _llava(spec, tf.MistralConfig(**spec.text(sliding_window=WIDE))),
    "smolvlm": _smolvlm,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "paligemma2": _paligemma2,
}

FOUR = ("llava_clip", "qwen2_5_vl", "llava_onevision", "gemma3")
"""Families that differ: images of one size, a grid of patches, tiles, and attention within a window."""


def build(
    family: str,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    spec: Spec = Spec(),
) -> Any:
    """Build a model of one of `FAMILIES` in eval mode; `window` is that of sliding attention, by default `WIDE`."""
    config = FAMILIES[family](spec)
    if window is not None:
        assert config.text_config.sliding_window == WIDE
        config.text_config.sliding_window = window
    torch.manual_seed(0)
    kind = tf.AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        # Zero-initialised weights would hide errors in their inputs.
        for name, parameter in model.named_parameters():
            if "image_newline" in name or (parameter.ndim > 1 and parameter.abs().max() == 0):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


LLAVA = ("language_model.model.", "multi_modal_projector.", "vision_tower.vision_model.")
PUBLISHED = {
    "llava_clip": LLAVA,
    "gemma3": LLAVA,
    "llava_onevision": ("image_newline", *LLAVA),
    "smolvlm": ("model.text_model.", "model.vision_model.", "model.connector.modality_projection."),
    "qwen2_5_vl": ("model.layers.", "model.embed_tokens.", "visual.blocks."),
}
"""Beginnings of tensor names in the released checkpoints of a family."""


def save_published(family: str, model: Any, folder: Path, max_shard_size: str = "50GB") -> None:
    """Write a model under the tensor names of the family's released checkpoints."""
    names = PUBLISHED[family]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if "vision_tower.vision_model." in names:
        publish_tower_names(folder)
    written = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert all(any(name.startswith(begin) for name in written) for begin in names), written


def randomize_adapters(model: Any, seed: int = 3) -> Any:
    """Set random weights in every LoRA layer, including B."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    return model
