"""The collators with other families of models: Qwen2.5-VL, SmolVLM and Gemma 3, built offline at toy size.

Their processors differ in what the demo's does not: images of unlike size in one batch with unlike numbers of tokens, pixel
values without a batch dimension, tiles, a template that writes the begin-of-sequence token, an end of turn that is not the
end of sequence, and additional inputs. Each batch also goes through a tiny model of the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vlm_calibration.data.collate import IGNORE, ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.resolution import check_resolution
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.parts import part_of
from vlm_calibration.records import LoadedImage, Query
from vlm_calibration.text.confidence import render_answer, render_response
from vlm_calibration.text.prompts import ElicitationPrompt

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
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
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    """A processor, its model, and the two special tokens that matter here."""

    processor: Any
    model: Any
    image_token: str
    end: str


def _tokenizer(special: Sequence[str], named: dict[str, str], adds_begin: bool = False) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [render_response(a, p / 100) for p in range(101) for a in ("Yes", "No", "dog")],
        trainers.BpeTrainer(
            vocab_size=330 + len(special),
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if adds_begin:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{fast.bos_token} $A", special_tokens=[(fast.bos_token, fast.bos_token_id)]
        )
    return fast


def _qwen() -> Family:
    special = [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    ]
    tokenizer = _tokenizer(special, {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    processor = tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(patch_size=4, size=size),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(patch_size=4),
        chat_template=QWEN_TEMPLATE,
    )
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tf.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Family(processor, tf.Qwen2_5_VLForConditionalGeneration(config), "<|image_pad|>", "<|im_end|>")


def _smolvlm() -> Family:
    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = [
        *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>"),
        *("<fake_token_around_image>", "<image>", "<global-img>", *tiles),
    ]
    named = {"bos_token": "<|im_start|>", "pad_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
    tokenizer = _tokenizer(special, named)
    processor = tf.Idefics3Processor(
        image_processor=tf.Idefics3ImageProcessor(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    text = tf.LlamaConfig(**TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = tf.Idefics3Config(
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return Family(processor, tf.Idefics3ForConditionalGeneration(config), "<image>", "<end_of_utterance>")


def _gemma() -> Family:
    special = [
        *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ]
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = _tokenizer(special, named, adds_begin=True)
    ids = tokenizer.convert_tokens_to_ids
    for name, token in (
        ("boi", "<start_of_image>"),
        ("eoi", "<end_of_image>"),
        ("image", "<image_soft_token>"),
    ):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", ids(token))
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )
    layers = ["sliding_attention", "full_attention"]
    text = tf.Gemma3TextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=layers,
        pad_token_id=0,
    )
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )
    return Family(processor, tf.Gemma3ForConditionalGeneration(config), "<image_soft_token>", "<end_of_turn>")


FAMILIES: dict[str, Callable[[], Family]] = {"qwen2.5-vl": _qwen, "smolvlm": _smolvlm, "gemma3": _gemma}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    torch.manual_seed(0)
    made = FAMILIES[request.param]()
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim > 1 and parameter.abs().max() == 0:
                parameter.normal_(std=0.2)
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def chat(family: Family) -> ChatFormat:
    return ChatFormat(family.processor, ElicitationPrompt("{question} How sure are you?"))


@pytest.fixture(scope="module")
def unlike(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Samples with images of unlike size and shape."""
    rng = np.random.default_rng(1)
    sizes = [(20, 20), (33, 16), (48, 20), (14, 70)]
    return [
        s._replace(image=rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for s, size in zip(samples, sizes, strict=True)
    ]


def test_the_resolution_is_known(family: Family) -> None:
    check_resolution(family.processor)


def test_labels_are_the_response_and_its_end(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    batch = SFTCollator(chat, 1000)(unlike)
    decode = family.processor.tokenizer.decode
    for row, sample in enumerate(unlike):
        labels, stated = batch.labels[row], batch.stated[row]
        response = render_response(sample.query.answer, sample.confidence) + family.end
        assert decode(labels[labels != IGNORE]).lstrip() == response
        assert decode(labels[(labels != IGNORE) & ~stated]).strip() == render_answer(sample.query.answer)
        assert decode(labels[stated]).lstrip() == response[response.rindex("Confidence") :]
        assert torch.equal(labels[labels != IGNORE], batch.inputs["input_ids"][row][labels != IGNORE])
        padding = batch.inputs["attention_mask"][row] == 0
        assert not padding[: int((~padding).sum())].any(), "padded on the right"


def test_image_tokens_are_as_many_as_the_image_needs(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    image = family.processor.tokenizer.convert_tokens_to_ids(family.image_token)
    together = (SFTCollator(chat, 1000)(unlike).inputs["input_ids"] == image).sum(dim=1)
    alone = [int((SFTCollator(chat, 1000)([s]).inputs["input_ids"] == image).sum()) for s in unlike]
    assert together.tolist() == alone
    assert min(alone) > 0
    if family.image_token != "<image_soft_token>":
        assert len(set(alone)) > 1


def test_the_begin_token_comes_at_most_once(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    tokenizer = family.processor.tokenizer
    if tokenizer.bos_token is None:
        assert family.end == "<|im_end|>", "Qwen has none"
        return
    for inputs in (SFTCollator(chat, 1000)(unlike).inputs, PromptCollator(chat)(unlike).inputs):
        begins = (inputs["input_ids"] == tokenizer.bos_token_id) & inputs["attention_mask"].bool()
        assert begins.sum(dim=1).tolist() == [1] * len(unlike)


def test_a_sample_is_the_same_whatever_else_is_in_the_batch(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    together = SFTCollator(chat, 1000)(unlike)
    for row, sample in enumerate(unlike):
        alone = SFTCollator(chat, 1000)([sample])
        length = alone.labels.shape[1]
        for a, b in ((together.labels, alone.labels), (together.stated, alone.stated)):
            assert torch.equal(a[row, :length], b[0])
        assert torch.equal(together.inputs["input_ids"][row, :length], alone.inputs["input_ids"][0])


def test_training_and_generation_have_the_same_prompt(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    training, prompts = SFTCollator(chat, 1000)(unlike), PromptCollator(chat)(unlike)
    for row in range(len(unlike)):
        prompt = prompts.inputs["input_ids"][row][prompts.inputs["attention_mask"][row].bool()]
        assert torch.equal(training.inputs["input_ids"][row, : len(prompt)], prompt)
        assert (training.labels[row, : len(prompt)] == IGNORE).all()
        assert training.labels[row, len(prompt)] != IGNORE
    assert (prompts.inputs["attention_mask"][:, -1] == 1).all(), "padded on the left"


def test_the_model_takes_the_batch(family: Family, chat: ChatFormat, unlike: Sequence[Sample]) -> None:
    batch = SFTCollator(chat, 1000)(unlike)
    with torch.no_grad():
        found = labelled_logits(family.model, batch.inputs, batch.labels)
        full = family.model(**batch.inputs, use_cache=False).logits
    predicted = batch.labels[:, 1:] != IGNORE
    assert torch.allclose(found.logits, full[:, :-1][predicted], atol=1e-5)
    assert torch.equal(found.targets, batch.labels[:, 1:][predicted])
    assert torch.equal(found.rows, predicted.nonzero()[:, 0])


def test_the_model_answers_in_batches_as_it_does_alone(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    collate, tokenizer = PromptCollator(chat), family.processor.tokenizer
    together = generate_texts(family.model, collate(unlike).inputs, tokenizer, 5)
    assert together == [generate_texts(family.model, collate([s]).inputs, tokenizer, 5)[0] for s in unlike]


def test_the_model_has_its_parts(family: Family) -> None:
    parts = part_of(family.model)
    assert set(parts.values()) == (
        {"language", "tower"} if family.end == "<end_of_turn>" else {"language", "tower", "projector"}
    )
    assert not [name for name in parts if "lm_head" in name]


def test_noise_survives_the_processor(family: Family) -> None:
    photo = np.full((300, 400, 3), 128, dtype=np.uint8)
    loaded = LoadedImage(photo, (np.ones((300, 400), dtype=bool),), ())
    query = Query("q", "x", "Dog?", "Yes", "yes_no")
    image_processor = family.processor.image_processor
    std = {}
    for resolution in ("model", "native"):
        policy = NoisePolicy(resolution=resolution, distractor_probability=0.0)  # type: ignore[arg-type]
        image = perturb_query(query, loaded, policy, image_processor, 0, 150).image
        pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"]
        # In tiles the last one is a shrunken view of all; leave it out.
        std[resolution] = float((pixels[:, :-1] if pixels.ndim == 5 else pixels).std())
    flat = image_processor(images=[photo], return_tensors="pt", do_normalize=False)["pixel_values"].std()
    assert std["model"] > 3 * std["native"] > 3 * float(flat)
