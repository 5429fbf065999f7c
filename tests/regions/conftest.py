"""Tiny detectors and segmenters of the real architectures with random weights, built once, and the demo's scenes as files with queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from vlm_calibration.demo.source import DemoSource

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_LENGTH = 16
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS: dict[str, Any] = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DECODER: dict[str, Any] = {**SMALL, "mlp_dim": 32, "iou_head_depth": 2, "iou_head_hidden_dim": 16}


def _bert_tokenizer() -> Any:
    """A BERT tokenizer with the letters of the alphabet, into which it splits unknown words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    words += [*LETTERS, *(f"##{c}" for c in LETTERS), "dog", "cat", "red", "cup"]
    return tf.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def grounding_dino(folder: Path) -> str:
    tokenizer = _bert_tokenizer()
    stages = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "out_indices": [2, 3, 4]}
    text = {**SMALL, "vocab_size": len(tokenizer), "intermediate_size": 32, "max_position_embeddings": 128}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_feature_levels": 4}
    sizes = {"num_queries": 12, "d_model": 32, "max_text_len": 64, "use_timm_backbone": False}
    parts = {"backbone_config": tf.SwinConfig(image_size=64, embed_dim=8, **stages)}
    parts |= {"text_config": tf.BertConfig(**text)}
    config = tf.GroundingDinoConfig(**parts, **sizes, **layers, **heads)
    model = tf.GroundingDinoForObjectDetection(config)
    processor = tf.GroundingDinoProcessor(
        tf.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}), tokenizer
    )
    return _saved(model, processor, folder)


def owlv2(folder: Path) -> str:
    tokens = {"<|startoftext|>": 1, "<|endoftext|>": 2, "!": 0}
    for letter in LETTERS:
        tokens[letter] = len(tokens)
        tokens[f"{letter}</w>"] = len(tokens)
    tokenizer = tf.CLIPTokenizer(vocab=tokens, merges=[], pad_token="!", model_max_length=CLIP_LENGTH)
    text = {**SMALL, "vocab_size": len(tokens), "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1}
    text |= {"max_position_embeddings": CLIP_LENGTH, "eos_token_id": 2}
    vision = {**SMALL, "intermediate_size": 32, "image_size": 64, "patch_size": 16}
    config = tf.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    model = tf.Owlv2ForObjectDetection(config)
    processor = tf.Owlv2Processor(tf.Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    return _saved(model, processor, folder)


def sam(folder: Path) -> str:
    vision = {**SMALL, "output_channels": 16, "image_size": 64, "patch_size": 16, "mlp_dim": 32}
    vision |= {"window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8}
    vision, prompts = tf.SamVisionConfig(**vision), tf.SamPromptEncoderConfig(**PROMPTS)
    decoder = tf.SamMaskDecoderConfig(**DECODER)
    config = tf.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    images = tf.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return _saved(tf.SamModel(config), tf.SamProcessor(images), folder)


def sam2(folder: Path) -> str:
    stages = {"blocks": [1, 1, 2, 1], "embed_dim": [8, 16, 32, 64], "num_attention_heads": [1, 1, 2, 2]}
    layers = {f"{name}_per_stage": sizes for name, sizes in {**stages, "window_size": [4, 2, 4, 2]}.items()}
    layers |= {"global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]}
    backbone = tf.Sam2HieraDetConfig(hidden_size=8, num_attention_heads=1, image_size=[64, 64], **layers)
    features: dict[str, Any] = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "num_feature_levels": 3}
    features |= {"backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16}
    vision = tf.Sam2VisionConfig(backbone_config=backbone, **features)
    prompts, decoder = tf.Sam2PromptEncoderConfig(**PROMPTS), tf.Sam2MaskDecoderConfig(**DECODER)
    config = tf.Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    images = tf.Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    return _saved(tf.Sam2Model(config), tf.Sam2Processor(images), folder)


DETECTORS = {"grounding_dino": grounding_dino, "owlv2": owlv2}
SEGMENTERS = {"sam": sam, "sam2": sam2}


def build(name: str, folder: Path) -> str:
    """Build a model by name with fixed random weights; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return {**DETECTORS, **SEGMENTERS}[name](folder)


def _saved(model: Any, processor: Any, folder: Path) -> str:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # At their usual scale random weights give the same output for any input.
            if parameter.ndim > 1 and "embed" not in name and "head" not in name:
                parameter.mul_(3.0)
            elif name.startswith("bbox_embed") and name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.5)
        if hasattr(model, "class_head"):
            # Scores around one half and boxes of a few patches.
            model.class_head.logit_scale.bias.fill_(0.5)
            model.box_head.dense2.weight.mul_(0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of a tiny model by name."""
    return lru_cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a number of the demo's scenes as PNG files, and their queries without objects and regions as JSON lines."""

    def write(scenes: int, extra: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("scenes")
        source = DemoSource("test", scenes=scenes)
        lines = []
        for query in source.queries():
            name = f"{query.image}.png"
            Image.fromarray(source.load(query).image).save(folder / name)
            lines.append({**asdict(query), "image": name, "objects": [], "regions": []})
        path = folder / "queries.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (*lines, *(extra or []))), encoding="utf-8")
        return path

    return write
