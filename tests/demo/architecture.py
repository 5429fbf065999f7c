"""The demo model without its weights: LLaVA with a SigLIP tower and a small Llama, as the files in `demo/model` describe it.

All parts are stock transformers classes, so the demo model loads, adapts and generates like any model on the Hub. The tokenizer is a
byte-level BPE of the demo's sentences, in which each class name and whole percentage is one token.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vlm_calibration.demo.scenes import SCENE_SIZE
from vlm_calibration.files import read_json, write_json
from vlm_calibration.models.base import DEMO_MODEL

CHAT_TEMPLATE = (DEMO_MODEL / "chat_template.jinja").read_text(encoding="utf-8")
IMAGE = "<image>"
PATCH = 12
IMAGE_TOKENS = (SCENE_SIZE // PATCH) ** 2


def build_processor(digits: bool = False) -> LlavaProcessor:
    """The demo model's processor; with `digits`, a number is one token a digit."""
    processor = LlavaProcessor.from_pretrained(DEMO_MODEL)
    if digits:
        backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        merges = backend["model"]["merges"]
        backend["model"]["merges"] = [m for m in merges if not re.search(r"\d\d", "".join(m))]
        processor.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **processor.tokenizer.init_kwargs
        )
    return processor


def build_model(seed: int = 0, layers: int = 4, intermediate: int = 352) -> LlavaForConditionalGeneration:
    """The untrained network, float32, about 1.7 million parameters; `layers` of the language model, each with an MLP `intermediate` wide."""
    torch.manual_seed(seed)
    config = LlavaConfig.from_pretrained(DEMO_MODEL)
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = layers, intermediate
    model = LlavaForConditionalGeneration(config)
    # Unit-length word embeddings, so that image features, which are trained to resemble them, start on the same scale.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.text_config.hidden_size**-0.5)
    model.generation_config = GenerationConfig.from_pretrained(DEMO_MODEL)
    return model


def publish_tower_names(folder: Path) -> None:
    """Rename the vision tower's tensors in a folder that transformers has written to the names of released models.

    These have `vision_tower.vision_model.`, as vLLM reads it; transformers 5 leaves `vision_model` out when it saves a model with a
    CLIP or SigLIP tower that it did not load.
    """

    def published(name: str) -> str:
        return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)

    for path in folder.glob("*.safetensors"):
        weights = {published(name): weight for name, weight in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = read_json(index)
        content["weight_map"] = {published(name): file for name, file in content["weight_map"].items()}
        write_json(index, content)
