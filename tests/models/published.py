"""Architectures of published models from their configurations on the Hub, with their published sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as tf


@dataclass(frozen=True)
class Published:
    """A published model: its name on the Hub, number of parameters and configuration."""

    repository: str
    parameters: float
    config: Callable[[], Any]


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int | None = None
) -> dict[str, Any]:
    """Sizes of a transformer."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    attention = {} if key_value_heads is None else {"num_key_value_heads": key_value_heads}
    return dict(zip(keys, (hidden, intermediate, layers, heads), strict=True)) | attention


SO400M: dict[str, Any] = {**sizes(1152, 4304, 27, 16), "patch_size": 14}
"""The SigLIP tower of most models."""

QWEN2_7B: dict[str, Any] = {**sizes(3584, 18944, 28, 28, 4), "tie_word_embeddings": False}


def _smolvlm(text: dict[str, Any], scale_factor: int, **vision: Any) -> tf.SmolVLMConfig:
    return tf.SmolVLMConfig(
        text_config=tf.LlamaConfig(vocab_size=49280, tie_word_embeddings=False, **text),
        vision_config=vision,
        scale_factor=scale_factor,
        image_token_id=49190,
        tie_word_embeddings=False,
    )


def _smolvlm_small(**text: Any) -> tf.SmolVLMConfig:
    return _smolvlm(text, scale_factor=4, image_size=512, patch_size=16, **sizes(768, 3072, 12, 12))


def _qwen2_5_vl(**text: Any) -> tf.Qwen2_5_VLConfig:
    rotary = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return tf.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rotary},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _qwen3_vl(hidden: int, intermediate: int, tied: bool, **vision: Any) -> tf.Qwen3VLConfig:
    rotary = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]}
    text = {**sizes(hidden, intermediate, 36, 32, 8), "head_dim": 128, "vocab_size": 151936}
    shared = {
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": hidden,
    }
    return tf.Qwen3VLConfig(
        text_config={
            **text,
            "tie_word_embeddings": tied,
            "rope_parameters": {**rotary, "mrope_interleaved": True},
        },
        vision_config={**vision, **shared},
        tie_word_embeddings=tied,
    )


def qwen3_vl_4b() -> tf.Qwen3VLConfig:
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return _qwen3_vl(2560, 9728, tied=True, **vision, deepstack_visual_indexes=[5, 11, 17])


def qwen3_vl_8b() -> tf.Qwen3VLConfig:
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
    return _qwen3_vl(4096, 12288, tied=False, **vision, deepstack_visual_indexes=[8, 16, 24])


def _internvl3(**text: Any) -> tf.InternVLConfig:
    vision = {**sizes(1024, 4096, 24, 16), "image_size": [448, 448], "patch_size": [14, 14]}
    return tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(vocab_size=151674, **text),
        image_token_id=151667,
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def llava_1_5_7b() -> tf.LlavaConfig:
    vision = tf.CLIPVisionConfig(**sizes(1024, 4096, 24, 16), image_size=336, patch_size=14)
    text = tf.LlamaConfig(**sizes(4096, 11008, 32, 32, 32), vocab_size=32064)
    return tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)


def llava_onevision_7b() -> tf.LlavaOnevisionConfig:
    vision = {**SO400M, "num_hidden_layers": 26}  # the last layer is not used
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision, image_size=384, vision_use_head=False),
        text_config=tf.Qwen2Config(vocab_size=152000, **QWEN2_7B),
        tie_word_embeddings=False,
    )


def gemma3_4b() -> tf.Gemma3Config:
    text = tf.Gemma3TextConfig(
        **sizes(2560, 10240, 34, 8, 4), head_dim=256, vocab_size=262208, sliding_window=1024
    )
    vision = tf.SiglipVisionConfig(**SO400M, image_size=896, vision_use_head=False)
    return tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


def paligemma2_3b() -> tf.PaliGemmaConfig:
    text = tf.Gemma2Config(
        **sizes(2304, 9216, 26, 8, 4), head_dim=256, vocab_size=257216, sliding_window=4096
    )
    vision = tf.SiglipVisionConfig(**SO400M, image_size=448, projection_dim=2304, vision_use_head=False)
    return tf.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=2304, image_token_index=257152
    )


MODELS: dict[str, Published] = {
    "smolvlm2_256m": Published(
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        256.5e6,
        lambda: _smolvlm_small(**sizes(576, 1536, 30, 9, 3)),
    ),
    "smolvlm2_500m": Published(
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        507.5e6,
        lambda: _smolvlm_small(**sizes(960, 2560, 32, 15, 5)),
    ),
    "smolvlm2_2_2b": Published(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        2.25e9,
        lambda: _smolvlm(sizes(2048, 8192, 24, 32, 32), scale_factor=3, image_size=384, **SO400M),
    ),
    "qwen2_5_vl_3b": Published(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        3.75e9,
        lambda: _qwen2_5_vl(**sizes(2048, 11008, 36, 16, 2), vocab_size=151936, tie_word_embeddings=True),
    ),
    "qwen2_5_vl_7b": Published(
        "Qwen/Qwen2.5-VL-7B-Instruct", 8.29e9, lambda: _qwen2_5_vl(vocab_size=152064, **QWEN2_7B)
    ),
    "qwen3_vl_4b": Published("Qwen/Qwen3-VL-4B-Instruct", 4.44e9, qwen3_vl_4b),
    "qwen3_vl_8b": Published("Qwen/Qwen3-VL-8B-Instruct", 8.77e9, qwen3_vl_8b),
    "internvl3_2b": Published(
        "OpenGVLab/InternVL3-2B-hf",
        2.09e9,
        lambda: _internvl3(**sizes(1536, 8960, 28, 12, 2), tie_word_embeddings=False),
    ),
    "internvl3_8b": Published("OpenGVLab/InternVL3-8B-hf", 7.94e9, lambda: _internvl3(**QWEN2_7B)),
    "llava_1_5_7b": Published("llava-hf/llava-1.5-7b-hf", 7.06e9, llava_1_5_7b),
    "llava_onevision_7b": Published("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03e9, llava_onevision_7b),
    "gemma3_4b": Published("google/gemma-3-4b-it", 4.30e9, gemma3_4b),
    "paligemma2_3b": Published("google/paligemma2-3b-mix-448", 3.03e9, paligemma2_3b),
}
"""File name in `configs/model` -> model."""
