"""Train the shipped demo model: `python -m tests.demo.recipe --out DIR` (`make demo-model`).

End-to-end training of a small VLM from scratch stays at chance level for too long, so there are three stages:

1. *patches*: tower, projector and word embeddings are trained so that a patch's projected feature times the tied word
   embeddings predicts the word of the object that covers the patch, and the words of the object's corner;
2. *language*: the language model is trained to answer from cached features, with several questions per image in one row,
   each of which attends to the image and itself only; first the bare questions, then with the prompt that elicits a
   confidence. Attention is initialised as a lookup, without which it stays at chance level;
3. *together*: all parts end to end for a few steps.

Half of the images are mildly degraded, like photographs. The stated confidence is 90 to 100% for every image: like the large
models that it represents, the demo model answers well and is overconfident.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_calibration.demo.questions import (
    EXISTENCE_FORMS,
    NEGATIVES,
    POSITION_FORMS,
    absent_class,
    question_about,
    scene_seed,
)
from vlm_calibration.demo.scenes import CLASSES, CORNERS, Scene, render_scene
from vlm_calibration.demo.source import Change, jpeg, low_contrast, shrink
from vlm_calibration.files import replacing
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.models.shared_prefix import additive_mask, padded
from vlm_calibration.text.confidence import ElicitationPrompt, render_response

from .architecture import IMAGE_TOKENS, PATCH, build_model, build_processor, publish_tower_names

Model = LlavaForConditionalGeneration
Steps = Iterator[tuple[Tensor, Tensor]]

FIRST_SCENE = 1_000_000
"""First scene of the train split used for pre-training, so that it does not overlap with scenes for fine-tuning."""
QUESTIONS_PER_SCENE = 8
CORNER_WORDS = (("top", "bottom"), ("left", "right"))
FEATURE_SCALE = 3.0
"""Factor of the scores in stage 1, which makes features about as long as word embeddings."""
CONFIDENCES = (0.95, 1.0, 0.9)
CONFIDENCE_SHARES = ((0.7, 0.2, 0.1), (0.2, 0.7, 0.1), (0.1, 0.3, 0.6))
"""Per question form: the probability with which each of `CONFIDENCES` is stated."""


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; `strength` is the radius in pixels."""
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(strength)))


def occlusion(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform rectangles at random positions until they cover a share `strength` of the image."""
    out = image.copy()
    height, width = image.shape[:2]
    covered = np.zeros((height, width), dtype=bool)
    while covered.mean() < strength:
        h, w = rng.integers(height // 10, height // 4, size=2)
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        out[top : top + h, left : left + w] = rng.integers(0, 256, size=3)
        covered[top : top + h, left : left + w] = True
    return out


DEGRADATIONS: dict[Change, tuple[float, float]] = {
    blur: (0.3, 1.2),
    occlusion: (0.02, 0.2),
    low_contrast: (0.1, 0.6),
    jpeg: (20, 85),
    shrink: (1.2, 2.2),
}
"""Changes of the whole image with the range of their strengths, well below those of the test's shifts."""


def mild_degradation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a random degradation at a random strength; uint8 [H, W, 3] in and out."""
    change, strengths = list(DEGRADATIONS.items())[int(rng.integers(len(DEGRADATIONS)))]
    return change(image, float(rng.uniform(*strengths)), rng)


def scene_patches(processor: LlavaProcessor, index: int) -> tuple[Tensor, Tensor, Tensor, Scene]:
    """A scene as pixel values, word and corner of each patch, and itself; half of the scenes are mildly degraded.

    The word, int64 [IMAGE_TOKENS], is the token of the object that covers the patch, the image token in the background, and IGNORE
    where undecided; the corner is that of the object, and IGNORE without one.
    """
    seed = scene_seed("train", FIRST_SCENE + index)
    scene = render_scene(seed)
    rng = np.random.default_rng((*seed, 2))
    image = mild_degradation(scene.image, rng) if rng.random() < 0.5 else scene.image
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    side = image.shape[0] // PATCH
    shares = (o.mask.reshape(side, PATCH, side, PATCH).mean(axis=(1, 3)).ravel() for o in scene.objects)
    cover = np.stack(list(shares))
    ids = processor.tokenizer([o.name for o in scene.objects], add_special_tokens=False)["input_ids"]
    covered, top = cover.max(axis=0) > 0.2, cover.argmax(axis=0)
    words = np.where(covered, np.array(ids)[:, 0][top], IGNORE)
    words[cover.sum(axis=0) == 0] = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    corners = np.where(covered, np.array([o.corner for o in scene.objects])[top], IGNORE)
    return pixels, torch.from_numpy(words).long(), torch.from_numpy(corners).long(), scene


def _batches(
    processor: LlavaProcessor, count: int, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Scene]]]:
    """Batches of `count` scenes: float [B, 3, S, S], two times int64 [B, IMAGE_TOKENS], and the scenes."""
    for begin in range(0, count, size):
        rows = [scene_patches(processor, i) for i in range(begin, min(begin + size, count))]
        pixels, words, corners, scenes = zip(*rows, strict=True)
        yield torch.stack(pixels), torch.stack(words), torch.stack(corners), list(scenes)


def train(
    stage: str, model: Model, parameters: Iterable[nn.Parameter], lr: float, steps: int, results: Steps
) -> None:
    """Train some parameters; `results` computes loss and accuracy of each step when it is asked for the next ones."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(s / steps, 1))) + 0.01)
    )
    for step, (loss, accuracy) in enumerate(results, start=1):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log(f"{stage} {step}/{steps}: loss {loss:.3f}, accuracy {accuracy:.3f}")


def image_features(model: Model, pixel_values: Tensor) -> Tensor:
    """Projected features, float [B, IMAGE_TOKENS, hidden]."""
    features = model.model.get_image_features(pixel_values=pixel_values).pooler_output
    return torch.stack(list(features)) if isinstance(features, list | tuple) else features


def train_patches(model: Model, processor: LlavaProcessor, steps: int) -> None:
    """Stage 1: projected features times word embeddings predict the covering object's word and its corner's words.

    The softmax is over the object words and the background token only; otherwise the embeddings of all other words would
    collapse. The accuracy is that of the patches with an object.
    """
    embeddings = model.get_input_embeddings().weight
    background = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    names = torch.tensor([background, *(ids[0] for ids in processor.tokenizer(list(CLASSES))["input_ids"])])
    excluded = torch.ones(embeddings.shape[0], dtype=torch.bool)
    excluded[names] = False
    weights = torch.ones(embeddings.shape[0])
    weights[background] = 0.1
    axes = [torch.tensor([processor.tokenizer(w)["input_ids"][0] for w in pair]) for pair in CORNER_WORDS]

    def results() -> Steps:
        for pixels, words, corners, _ in _batches(processor, steps * 32, 32):
            scores = FEATURE_SCALE * image_features(model, pixels) @ embeddings.T
            logits = scores.masked_fill(excluded, float("-inf"))
            loss = F.cross_entropy(logits.flatten(0, 1), words.flatten(), weights, ignore_index=IGNORE)
            placed = corners != IGNORE
            for axis, side in zip(axes, (corners // 2, corners % 2), strict=True):
                loss = loss + 0.3 * F.cross_entropy(scores[placed][:, axis], side[placed])
            objects = (words != IGNORE) & (words != background)
            yield loss, (logits.argmax(-1) == words)[objects].float().mean()

    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    parameters = [*(p for part in parts for p in part.parameters()), embeddings]
    train("patches", model, parameters, 2e-3, steps, results())


class QuestionPacker:
    """Packs several questions about one image into one row without attention between questions."""

    def __init__(self, processor: LlavaProcessor, prompt: ElicitationPrompt) -> None:
        self.tokenizer = processor.tokenizer
        self.prompt = prompt
        first = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        self.head: list[int] = self.tokenizer(first.split(processor.image_token)[0])["input_ids"]

    def question(self, scene: Scene, kind: int, rng: np.random.Generator) -> tuple[str, str, str]:
        """Sample a question, its response, and the word that decides it; of 8 kinds five ask for existence, three for corners."""
        form = int(rng.integers(3))
        target = scene.objects[int(rng.integers(len(scene.objects)))]
        if kind % 8 >= 5:
            corner = CORNERS[target.corner]
            text, answer = question_about(POSITION_FORMS[form], corner), target.name
            decisive = corner.split()[1]
        else:
            present = bool(rng.integers(2))
            negative = NEGATIVES[int(rng.integers(len(NEGATIVES)))]
            shown = tuple(o.name for o in scene.objects)
            name = target.name if present else absent_class(rng, shown, negative)
            text = question_about(EXISTENCE_FORMS[form], name)
            answer, decisive = "Yes" if present else "No", name
        confidence = float(rng.choice(CONFIDENCES, p=CONFIDENCE_SHARES[form]))
        return self.prompt.render(text), render_response(answer, confidence), decisive

    def pack(self, scenes: list[Scene], rng: np.random.Generator) -> dict[str, Tensor]:
        """Token ids, labels, positions, segments (1 for the first question) and `ahead`, int64 [B, L], of the text behind each image.

        `ahead` labels every token from the deciding word to the end of the prompt with the answer's first token.
        """
        fill = {"labels": IGNORE, "positions": 0, "segments": -1, "ahead": IGNORE}
        fill["ids"] = self.tokenizer.pad_token_id
        rows: dict[str, list[list[int]]] = {name: [] for name in fill}
        for scene in scenes:
            row: dict[str, list[int]] = {name: [] for name in fill}
            for kind in range(QUESTIONS_PER_SCENE):
                question, response, decisive = self.question(scene, kind, rng)
                prompt = self.tokenizer(f"{question}<|end|><|assistant|>")["input_ids"]
                answer = self.tokenizer(f"{response}<|end|>")["input_ids"]
                length, start = len(prompt) + len(answer), len(self.head) + IMAGE_TOKENS
                decided = prompt.index(self.tokenizer(decisive)["input_ids"][0])
                row["ids"] += prompt + answer
                row["labels"] += [IGNORE] * len(prompt) + answer
                row["positions"] += range(start, start + length)
                row["segments"] += [kind + 1] * length
                row["ahead"] += [IGNORE] * decided + answer[:1] * (len(prompt) - decided)
                row["ahead"] += [IGNORE] * len(answer)
            for name, values in row.items():
                rows[name].append(values)
        return {name: padded(rows[name], value, torch.device("cpu")) for name, value in fill.items()}

    def loss(
        self, model: Model, features: Tensor, packed: dict[str, Tensor], ahead_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the responses, and the accuracy of their first tokens.

        With `ahead_weight`, the tokens labelled by `ahead` also predict the answer's first token. This shortens the path
        from image to answer, and without it the language model stays at chance level.
        """
        rows = features.shape[0]
        embed = model.get_input_embeddings()
        head = embed(torch.tensor(self.head)).expand(rows, -1, -1)
        inputs = torch.cat([head, features, embed(packed["ids"])], dim=1)
        prefix = len(self.head) + IMAGE_TOKENS
        positions = torch.cat([torch.arange(prefix).expand(rows, -1), packed["positions"]], dim=1)
        mask = additive_mask(F.pad(packed["segments"], (prefix, 0)), None, inputs.dtype)
        hidden = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        labelled = packed["labels"] != IGNORE
        logits = model.lm_head(hidden[:, prefix - 1 : -1][labelled])
        targets = packed["labels"][labelled]
        first = labelled & ~F.pad(labelled, (1, 0))[:, :-1]
        accuracy = (logits.argmax(-1) == targets)[first[labelled]].float().mean()
        loss = F.cross_entropy(logits, targets)
        if ahead_weight:
            decided = packed["ahead"] != IGNORE
            early = model.lm_head(hidden[:, prefix:][decided])
            loss = loss + ahead_weight * F.cross_entropy(early, packed["ahead"][decided])
        return loss, accuracy


def train_language(model: Model, processor: LlavaProcessor, steps: int, scenes: int, batch: int = 16) -> None:
    """Stage 2: the language model on cached image features.

    Attention of the first two layers starts as a lookup: a word attends to patches whose feature resembles it.
    """
    batches: list[Tensor] = []
    cached: list[Scene] = []
    with torch.no_grad():
        for layer in model.model.language_model.layers[:2]:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.add_(torch.eye(*projection.weight.shape))
        for pixels, _, _, scenes_of_batch in _batches(processor, scenes, 64):
            batches.append(image_features(model, pixels))
            cached += scenes_of_batch
    features = torch.cat(batches)
    log(f"language: cached the features of {len(cached)} scenes")
    bare = QuestionPacker(processor, ElicitationPrompt("{question}"))
    full = QuestionPacker(processor, ElicitationPrompt())
    rng = np.random.default_rng(0)

    def results() -> Steps:
        for step in range(steps):
            chosen = rng.integers(len(cached), size=batch)
            packer = bare if step < steps // 2 else full
            packed = packer.pack([cached[i] for i in chosen], rng)
            yield packer.loss(model, features[chosen], packed, max(0.0, 1.0 - 1.4 * step / steps))

    train("language", model, model.model.language_model.parameters(), 1e-3, steps, results())


def train_together(model: Model, processor: LlavaProcessor, steps: int, batch: int = 16) -> None:
    """Stage 3: all parts end to end at a small learning rate."""
    packer = QuestionPacker(processor, ElicitationPrompt())
    rng = np.random.default_rng(1)
    results = (
        packer.loss(model, image_features(model, pixels), packer.pack(scenes, rng))
        for pixels, _, _, scenes in _batches(processor, steps * batch, batch)
    )
    train("together", model, model.parameters(), 5e-4, steps, results)


_START = time.monotonic()


def log(message: str) -> None:
    print(f"[{time.monotonic() - _START:6.0f} s] {message}", flush=True)


def make_demo_model(
    out: Path,
    layers: int = 4,
    intermediate: int = 352,
    digits: bool = False,
    patch_steps: int = 1100,
    language_steps: int = 700,
    joint_steps: int = 160,
    scenes: int = 4000,
) -> None:
    """Train the demo model and save it with its processor to the folder `out`; stage 2 caches the features of `scenes` scenes."""
    processor = build_processor(digits)
    model = build_model(layers=layers, intermediate=intermediate)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    model.train()
    train_patches(model, processor, patch_steps)
    train_language(model, processor, language_steps, scenes)
    train_together(model, processor, joint_steps)
    model.eval()
    with replacing(out) as temporary:
        model.save_pretrained(temporary)
        publish_tower_names(temporary)
        processor.save_pretrained(temporary)
    log(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=DEMO_MODEL, help="folder to write")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model")
    parser.add_argument("--intermediate", type=int, default=352, help="width of their MLPs")
    parser.add_argument("--digits", action="store_true", help="one token a digit instead of one a number")
    make_demo_model(**vars(parser.parse_args()))
