"""Real processors of the supported families with tokenizers trained in the test, and tiny models for them.

Templates and special tokens are those of the published checkpoints for a question about one image; image sizes are a few
pixels, unless settings of the images are given (`tests/performance/gpu_steps.py`). They cover cases that the demo's processor
lacks: images of different sizes and numbers of tokens in one batch, pixel values without a batch dimension, tiles, a template
that writes the begin-of-sequence token, one that leaves a turn open, one whose generation prompt differs from its answers, and
no template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.text.confidence import ElicitationPrompt, render_response

from . import families
from .families import PINPOINTS, Spec

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and system %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH = 64
"""Width of the language models, a multiple of 64 for nf4."""


@dataclass(frozen=True)
class Family:
    """A processor and its properties.

    Attributes:
        name: key of `families.FAMILIES`.
        processor: the processor.
        spec: sizes and token ids of its model.
        image_token: the placeholder of an image patch.
        end: text at the end of a turn.
        varies: whether the number of image tokens depends on the image.
        projects: whether there are linear layers between tower and language model.
    """

    name: str
    processor: Any
    spec: Spec
    image_token: str
    end: str
    varies: bool = True
    projects: bool = True

    def model(self, **settings: Any) -> Any:
        """Build a random model for the processor, as `families.build`."""
        return families.build(self.name, spec=self.spec, **settings)

    def save(self, folder: Path, **settings: Any) -> str:
        """Write model and processor like a checkpoint on the Hub; settings as for `model`."""
        self.model(**settings).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return str(folder)


def _tokenizer(
    special: Sequence[str], words: str = "byte-level", own: dict[str, str] | None = None, **named: str
) -> Any:
    """Train a tokenizer that splits numbers into digits.

    Args:
        special: all special tokens; `named` are those of a standard name, such as "pad_token", `own` those of a name of the family.
        words: "byte-level" as in Qwen; "llama" marks each word and the begin of a text, "gemma" each space; both begin texts with a token.
    """
    texts = [render_response(a, p / 100) for p in range(101) for a in ("Yes", "No", "dog")]
    digits = pre_tokenizers.Digits(individual_digits=True)
    if words == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
    else:
        scheme = {"llama": "first", "gemma": "never"}[words]
        special = ["<unk>", *special]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        split = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        alphabet = ["\n", "▁", *map(chr, range(33, 127))]
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, digits])
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 80,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if words != "byte-level":
        begin = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A $B:1",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, extra_special_tokens=own or {})


def _spec(tokenizer: Any, image: str, **named: str) -> Spec:
    ids = tokenizer.convert_tokens_to_ids
    return Spec(
        width=WIDTH,
        vocabulary=len(tokenizer),
        image=ids(image),
        pad=tokenizer.pad_token_id,
        begin=tokenizer.bos_token_id,
        **{"end": tokenizer.eos_token_id, **{name: ids(token) for name, token in named.items()}},
    )


def _qwen(
    name: str,
    processor: Any,
    images: Any,
    videos: Any,
    system: bool = True,
    patch: int = 4,
    pixels: tuple[int, int] = (16 * 16, 48 * 48),
) -> Family:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    qwen_processor = processor(
        image_processor=images(patch_size=patch, size=size),
        tokenizer=tokenizer,
        video_processor=videos(patch_size=patch),
        chat_template=QWEN_TEMPLATE.replace("and system", "" if system else "and false"),
    )
    spec = _spec(
        tokenizer,
        "<|image_pad|>",
        video="<|video_pad|>",
        begin_of_image="<|vision_start|>",
        end_of_image="<|vision_end|>",
    )
    return Family(name, qwen_processor, spec, "<|image_pad|>", "<|im_end|>")


def _qwen2_5_vl(**images: Any) -> Family:
    processor, videos = tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor
    return _qwen("qwen2_5_vl", processor, tf.Qwen2VLImageProcessor, videos, **images)


def _qwen3_vl(**images: Any) -> Family:
    processor, videos = tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor
    return _qwen("qwen3_vl", processor, tf.Qwen2VLImageProcessor, videos, system=False, **images)


SMOLVLM_SIZES = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}


def _smolvlm(sizes: dict[str, Any] = SMOLVLM_SIZES, tokens: int = 4) -> Family:
    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>"]
    special += ["<fake_token_around_image>", "<image>", "<global-img>", *tiles]
    named = {"bos_token": "<|im_start|>", "pad_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
    tokenizer = _tokenizer(special, **named)
    processor = tf.SmolVLMProcessor(
        image_processor=tf.SmolVLMImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=tf.SmolVLMVideoProcessor(**sizes),
        image_seq_len=tokens,
        chat_template=SMOLVLM_TEMPLATE,
    )
    return Family("smolvlm", processor, _spec(tokenizer, "<image>"), "<image>", "<end_of_utterance>")


def _internvl(side: int = 16, tiles: int = 6, tokens: int = 4) -> Family:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    own = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(special, own=own, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    size = {"height": side, "width": side}
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=size, max_patches=tiles),
        tokenizer=tokenizer,
        video_processor=tf.InternVLVideoProcessor(size=size),
        image_seq_length=tokens,
        chat_template=INTERNVL_TEMPLATE,
    )
    return Family("internvl", processor, _spec(tokenizer, "<IMG_CONTEXT>"), "<IMG_CONTEXT>", "<|im_end|>")


def _llava(side: int = 16, patch: int = 4) -> Family:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = _tokenizer(["<s>", "</s>", "<image>", "<pad>"], words="llama", **named)
    size = {"height": side, "width": side}
    processor = tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return Family("llava_clip", processor, _spec(tokenizer, "<image>"), "<image>", "</s>", varies=False)


def _llava_onevision(side: int = 16, grids: Sequence[Sequence[int]] = PINPOINTS, tokens: int = 16) -> Family:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = _tokenizer(special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    size = {"height": side, "width": side}
    processor = tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=tokens,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    spec = _spec(tokenizer, "<image>", video="<video>")
    return Family("llava_onevision", processor, spec, "<image>", "<|im_end|>")


GEMMA_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}


def _gemma3(side: int = 16, tokens: int = 4) -> Family:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    own = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = _tokenizer([*special, *own.values()], words="gemma", own=own, **GEMMA_TOKENS)
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        image_seq_length=tokens,
        chat_template=GEMMA_TEMPLATE,
    )
    spec = _spec(
        tokenizer,
        "<image_soft_token>",
        begin_of_image="<start_of_image>",
        end_of_image="<end_of_image>",
        end="<end_of_turn>",
    )
    return Family(
        "gemma3", processor, spec, "<image_soft_token>", "<end_of_turn>", varies=False, projects=False
    )


def _paligemma2(side: int = 16, tokens: int = 16) -> Family:
    special, own = ["<pad>", "<eos>", "<bos>", "<image>"], {"image_token": "<image>"}
    tokenizer = _tokenizer(special, words="gemma", own=own, **GEMMA_TOKENS)
    image_processor = tf.SiglipImageProcessor(size={"height": side, "width": side})
    image_processor.image_seq_length = tokens
    processor = tf.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    return Family("paligemma2", processor, _spec(tokenizer, "<image>"), "<image>", "<eos>", varies=False)


FAMILIES: dict[str, Callable[..., Family]] = {
    "smolvlm": _smolvlm,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "llava_clip": _llava,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "paligemma2": _paligemma2,
}


QWEN2_5: dict[str, Any] = {"patch": 14, "pixels": (3136, 12845056)}
QWEN3: dict[str, Any] = {"patch": 16, "pixels": (65536, 16777216)}
INTERNVL3: dict[str, Any] = {"side": 448, "tiles": 12, "tokens": 256}
SMOLVLM2: dict[str, Any] = {
    "sizes": {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
    "tokens": 81,
}
SMOLVLM2_SMALL: dict[str, Any] = {
    "sizes": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    "tokens": 64,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "smolvlm2_256m": ("smolvlm", SMOLVLM2_SMALL),
    "smolvlm2_500m": ("smolvlm", SMOLVLM2_SMALL),
    "smolvlm2_2_2b": ("smolvlm", SMOLVLM2),
    "qwen2_5_vl_3b": ("qwen2_5_vl", QWEN2_5),
    "qwen2_5_vl_7b": ("qwen2_5_vl", QWEN2_5),
    "qwen3_vl_4b": ("qwen3_vl", QWEN3),
    "qwen3_vl_8b": ("qwen3_vl", QWEN3),
    "internvl3_2b": ("internvl", INTERNVL3),
    "internvl3_8b": ("internvl", INTERNVL3),
    "llava_1_5_7b": ("llava_clip", {"side": 336, "patch": 14}),
    "llava_onevision_7b": (
        "llava_onevision",
        {"side": 384, "grids": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)], "tokens": 729},
    ),
    "gemma3_4b": ("gemma3", {"side": 896, "tokens": 256}),
    "paligemma2_3b": ("paligemma2", {"side": 448, "tokens": 1024}),
}
"""File name in `configs/model` -> family, and the settings of its images in the published processor."""


def published_family(name: str) -> Family:
    """The family of a preset in `configs/model`, with the published image sizes and a small tokenizer."""
    family, settings = PUBLISHED[name]
    return FAMILIES[family](**settings)


@cache
def cached_family(name: str) -> Family:
    """A family by name, built once."""
    return FAMILIES[name]()


SIZES = ((20, 20), (33, 16), (48, 20), (14, 70))
"""(height, width) of the images in a batch."""


def prompts_of(name: str, n: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Inputs of prompts of different lengths about random images: of all of them, padded on the right, and of each alone."""
    rng, chat = np.random.default_rng(7), ChatFormat(cached_family(name).processor, ElicitationPrompt())
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES[:n]]
    texts = [chat.render(f"Is it {'very ' * i}late?") for i in range(n)]
    alone = [chat.inputs([text], [image], "right") for text, image in zip(texts, images, strict=True)]
    return chat.inputs(texts, images, "right"), alone


def with_response(inputs: dict[str, Tensor], response: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of one prompt with tokens of text behind it."""
    ids = torch.tensor([response])
    behind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        name: torch.cat([values, behind.get(name, torch.zeros_like(ids)).to(values.dtype)], 1)
        if values.shape == inputs["input_ids"].shape
        else values
        for name, values in inputs.items()
    }
