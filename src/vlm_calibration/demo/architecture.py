"""The untrained demo model: LLaVA with a SigLIP tower and a small Llama, its processor, tokenizer and chat template.

All parts are stock transformers classes, so the demo model loads, adapts and generates like any model on the Hub.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vlm_calibration.demo.questions import EXISTENCE_FORMS, POSITION_FORMS, question_about
from vlm_calibration.demo.scenes import CLASSES, CORNERS, SCENE_SIZE
from vlm_calibration.files import read_json, write_json
from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.prompts import ElicitationPrompt

PATCH = 12
IMAGE_TOKENS = (SCENE_SIZE // PATCH) ** 2
VOCABULARY = 768
PAD, END, IMAGE, USER, ASSISTANT = "<pad>", "<|end|>", "<image>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the demo's sentences. It encodes any text; each class name and whole percentage is one token.

    Raises:
        RuntimeError: a class name or a percentage is not one token (the vocabulary is too small).
    """
    prompt = ElicitationPrompt()
    questions = [(form, name) for name in CLASSES for form in EXISTENCE_FORMS]
    questions += [(form, corner) for corner in CORNERS for form in POSITION_FORMS]
    answers = ("Yes", "No", *CLASSES)
    sentences = [prompt.render(question_about(*question)) for question in questions]
    sentences += [render_response(answer, percent / 100) for percent in range(101) for answer in answers]
    tokenizer = Tokenizer(models.BPE())
    # With a leading space, "dog" at the start of an answer is the same token as " dog" in a question.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, END, IMAGE, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
    )
    for word in (*CLASSES, "Yes", "No", *map(str, range(101))):
        if len(fast(word, add_special_tokens=False)["input_ids"]) != 1:
            raise RuntimeError(f"the demo tokenizer splits {word!r}: raise VOCABULARY above {VOCABULARY}")
    return fast


def build_processor() -> LlavaProcessor:
    side = {"height": SCENE_SIZE, "width": SCENE_SIZE}
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size=side),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


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


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained network, float32, about 1.7 million parameters."""
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SCENE_SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            # Slow rotations let a word attend to its patches by content, at any distance.
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    # Unit-length word embeddings, so that image features, which are trained to resemble them, start on the same scale.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.text_config.hidden_size**-0.5)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, max_new_tokens=16
    )
    return model
