"""The model card of an adapter or of a merged model: what was trained, and how to use it without this package.

`card_text` is a pure function of a `Card`; `card_files.py` reads and writes both.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

from vlm_calibration.models.base import THRESHOLDS
from vlm_calibration.reporting.evaluation import TASK, Evaluation, eval_results, results_section
from vlm_calibration.reporting.markdown import code, fenced, number, table
from vlm_calibration.reporting.tables import COLUMNS, column

TEXT = "README.md"
DIGEST = "readme_sha256"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""Lines around the results and the guarantee in `README.md`; what stands between them is replaced in an edited card."""
EXAMPLE = "Is there a dog in the image?"
"""The question in the examples of cards."""


@dataclass(frozen=True)
class Card:
    """The facts about an adapter; only the base model must be known.

    Attributes:
        base: name on the Hub or folder of the base model.
        base_on_hub: whether it is a name on the Hub, which the metadata then give.
        revision: commit or branch of the base model.
        location: where the weights are: a folder, or a name on the Hub.
        merged: whether the weights are those of the whole model, with the adapter merged in.
        trust_remote_code: whether the base model needs it.
        dtype: of the base model in training, as in `BaseModel`.
        quantization: of the base model in training, as in `BaseModel`.
        training: name -> description of the training: stage, adapter, data, noise.
        levels: answer type -> kind of perturbation, strength and the confidence in [0, 1] that was taught for it, on average.
        results: "before" and "after" training -> metrics of the validation queries, None if undefined.
        evaluations: results on test data.
        guarantee: what the thresholds beside the weights promise, as a sentence; empty without thresholds.
        datasets: names on the Hub of the data sets that it was trained on.
        license: metadata of the licence: `license` and, for one that the Hub has no name for, `license_name` and `license_link`.
        template: the prompt, with `{question}` in it.
        conversation: the prompt with `EXAMPLE`, as the chat template formats it.
        has_chat_template: whether the processor has a chat template; PaliGemma's processor formats the prompt itself.
        max_new_tokens: length limit of an answer.
        parts: the parts of the model that the adapter changes, as in `lora.parts`; empty if they are not known.
        max_pixels: limit of an image's pixels in training, as in `data.max_pixels`; the saved processor has it too.
    """

    base: str
    base_on_hub: bool = False
    revision: str | None = None
    location: str = "."
    merged: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: str = "none"
    training: dict[str, str] = field(default_factory=dict)
    levels: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    guarantee: str = ""
    datasets: list[str] = field(default_factory=list)
    license: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    conversation: str | None = None
    has_chat_template: bool = True
    max_new_tokens: int = 64
    parts: list[str] = field(default_factory=list)
    max_pixels: int | None = None


def has_results(card: Card) -> bool:
    """Whether there is anything for `results_of_tests`."""
    return bool(card.evaluations or card.guarantee)


def card_text(card: Card) -> str:
    """Render the card as Markdown, with the Hub's metadata in front."""
    sections = [
        _head(card),
        _usage(card),
        _serving(card) if card.has_chat_template else "",
        _prompt(card) if card.template else "",
        _answer_format(card) if card.template else "",
        results_of_tests(card) if has_results(card) else "",
        _levels(card) if card.levels else "",
        _results(card) if card.results else "",
        _training(card) if card.training else "",
    ]
    return f"---\n{card_metadata(card).to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def card_metadata(card: Card) -> ModelCardData:
    """The metadata that the Hub reads. What is not known is left out, and so is a base model that is a folder."""
    relation = "finetune" if card.merged else "adapter"
    # The weights of a merged model are not the ones that were evaluated.
    results = [] if card.merged else [result for e in card.evaluations for result in eval_results(e)]
    return ModelCardData(
        **card.license,
        base_model=card.base if card.base_on_hub else None,
        base_model_relation=relation if card.base_on_hub else None,
        base_model_revision=card.revision if card.base_on_hub else None,
        library_name="transformers" if card.merged else "peft",
        pipeline_tag=TASK,
        datasets=card.datasets or None,
        tags=[
            *("vlm-calibration", "calibration", "verbalized-confidence", "arxiv:2504.14848"),
            *([] if card.merged else ["lora"]),
        ],
        model_name=_title(card) if results else None,
        eval_results=results or None,
    )


def _title(card: Card) -> str:
    return f"{card.base.rstrip('/').rsplit('/', 1)[-1]}, calibrated"


def _head(card: Card) -> str:
    what = "with a LoRA adapter merged into it," if card.merged else "with a LoRA adapter,"
    revision = f" (revision {code(card.revision)})" if card.revision else ""
    lines = [
        f"# {_title(card)}",
        "",
        f"{code(card.base)}{revision} {what} fine-tuned so that the confidence it states is the probability that its "
        "answer about an image is right (semantic perturbation, "
        "[arXiv 2504.14848](https://arxiv.org/abs/2504.14848)).",
    ]
    if not card.base_on_hub:
        lines += [
            "",
            "The base model is a folder, not a repository on the Hub, so the metadata of this card name no base model.",
        ]
    if card.quantization != "none":
        note = f"The base model was quantised ({card.quantization}) in training"
        what = "merged into" if card.merged else "loaded below on"
        lines += [
            "",
            f"{note}; here the adapter is {what} the base in full precision, whose answers may differ slightly.",
        ]
    return "\n".join(lines)


def _usage(card: Card) -> str:
    needs = "transformers" if card.merged else "transformers and peft"
    what = "model" if card.merged else "adapter"
    return "\n\n".join(
        [
            "## How to ask it",
            f"With {needs} alone; `path` is the folder of this {what} or its name on the Hub.",
            fenced(snippet(card), "python"),
        ]
    )


def _serving(card: Card) -> str:
    """How a server loads it. vLLM leaves the layers of an adapter outside the language model out, without an error."""
    path = shlex.quote(card.location)
    if card.merged:
        how, commands = "vLLM and `transformers serve` load it as it is:", f"vllm serve {path}"
    elif card.parts == ["language"]:
        base = shlex.quote(card.base)
        how = "vLLM loads the adapter as it is, without DoRA, and of any rank up to `--max-lora-rank`:"
        commands = f"vllm serve {base} --enable-lora --lora-modules calibrated={path}"
    else:
        changed = f"changes the {' and the '.join(card.parts)}" if card.parts else "may change more"
        how = (
            f"Merge it first. vLLM serves the adapters of a language model alone: this one {changed}, and vLLM would leave out "
            "what is not the language model."
        )
        commands = f"vlm-calibration export {path} --merge --out merged\nvllm serve merged"
    return "\n\n".join(
        [
            "## How to serve it",
            how,
            fenced(commands, "bash"),
            f"Send the image, then the {'prompt below' if card.template else 'question'}, with `temperature: 0` and "
            "`repetition_penalty: 1`.",
        ]
    )


def snippet(card: Card) -> str:
    """A program that loads the model, asks it about `image.png`, and prints the answer and its stated confidence."""
    remote = ["trust_remote_code=True"] if card.trust_remote_code else []
    base = [repr(card.base), *([f"revision={card.revision!r}"] if card.revision else [])]
    arguments = ", ".join([*(["path"] if card.merged else base), *remote, 'dtype="auto"'])
    prompt = f"{card.template!r}.format(question=question)" if card.template else "question"
    lines = [
        *([] if card.merged else ["from peft import PeftModel"]),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"path = {card.location!r}",
        f"model = AutoModelForImageTextToText.from_pretrained({arguments})",
        *([] if card.merged else ["model = PeftModel.from_pretrained(model, path).eval()"]),
        f"processor = AutoProcessor.from_pretrained({', '.join(['path', *remote])})",
        "",
        f'image, question = Image.open("image.png").convert("RGB"), {EXAMPLE!r}',
        f"prompt = {prompt}",
        *_input_lines(card),
        "inputs = inputs.to(model.device, model.dtype)",
        'greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}',
        f"output = model.generate(**inputs, **greedy, max_new_tokens={card.max_new_tokens})",
        'reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        "",
        'answer, *stated = reply.rsplit("Confidence:", 1)',
        'confidence = float(stated[0].split("%")[0]) / 100 if stated else None',
        "print(answer.strip(), confidence)",
    ]
    return "\n".join(lines)


def _input_lines(card: Card) -> list[str]:
    """The lines that build `inputs` from `image` and `prompt`."""
    if not card.has_chat_template:
        return ['inputs = processor(text=processor.image_token + prompt, images=image, return_tensors="pt")']
    return [
        'content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]',
        'chat = [{"role": "user", "content": content}]',
        'form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}',
        "inputs = processor.apply_chat_template(chat, add_generation_prompt=True, **form)",
    ]


def _prompt(card: Card) -> str:
    parts = [
        "## The prompt",
        "Use exactly this prompt, with the question in place of `{question}`; the model was trained with no other.",
        fenced(card.template or ""),
    ]
    if card.conversation:
        parts += [f"The model reads {EXAMPLE!r} as", fenced(card.conversation)]
    return "\n\n".join(parts)


def _answer_format(card: Card) -> str:
    return "\n\n".join(
        [
            "## How to read the answer",
            "The model replies as in `Yes. Confidence: 80%`. The confidence is the number behind `Confidence:`, in percent; "
            "the text before it is the answer. A reply without that word states no confidence: treat it as missing, and do "
            "not replace it by a number.",
        ]
    )


def _levels(card: Card) -> str:
    by_kind: dict[str, dict[float, dict[str, float]]] = {}
    for answer_type, levels in card.levels.items():
        for kind, strength, confidence in levels:
            by_kind.setdefault(kind, {}).setdefault(strength, {})[answer_type] = confidence
    untouched = by_kind.pop("", {})
    width = max((len(strengths) for strengths in by_kind.values()), default=0) + len(untouched)
    rows = []
    for kind, strengths in by_kind.items():
        columns = {**untouched, **strengths}
        empty = [""] * (width - len(columns))
        rows.append([kind.replace("_", " "), "strength", *(f"{s:g}" for s in columns), *empty])
        rows += [
            ["", answer_type, *(_percent(c.get(answer_type)) for c in columns.values()), *empty]
            for answer_type in card.levels
        ]
    return "\n\n".join(
        [
            "## What it was taught",
            *([code(settings)] if (settings := _level_settings(card)) else []),
            "The confidence that the model should state when the key object is perturbed, on average over images: for each kind of "
            "perturbation its strengths and, by type of answer, the confidence at each. Strength 0 is the untouched image; at "
            "strength 1 nothing of the object is left.",
            table(["perturbation", "", *[""] * width], rows),
        ]
    )


def _percent(confidence: float | None) -> str:
    return "-" if confidence is None else format(confidence, ".0%")


def _level_settings(card: Card) -> str:
    return ", ".join(card.training[name] for name in ("levels", "schedule") if name in card.training)


def results_of_tests(card: Card) -> str:
    """The sections of the card's evaluations and guarantee, between the lines `BEGIN` and `END`."""
    sections = [results_section(evaluation, card.merged) for evaluation in card.evaluations]
    if sections:
        sections.insert(0, "## Results")
    if card.guarantee:
        sections += [
            "## When to answer",
            f"{card.guarantee} Send all other questions to a person. {code(THRESHOLDS)} beside the weights has the thresholds, what they were "
            "chosen on, and what the guarantee assumes.",
        ]
    return "\n\n".join([BEGIN, *sections, END])


def _results(card: Card) -> str:
    n = next(iter(card.results.values())).get("n")
    rows = [
        [f"{name} training", *(number(values.get(metric), column(metric)[1]) for metric in COLUMNS)]
        for name, values in card.results.items()
    ]
    return "\n\n".join(
        [
            "## Validation",
            f"On {'the' if n is None else f'{n:g}'} validation queries, perturbed as in training. Calibration (ECE to "
            "overconfidence) is over the answers whose confidence could be parsed, accuracy over all.",
            table(["", *(column(name)[0] for name in COLUMNS)], rows),
        ]
    )


def _training(card: Card) -> str:
    lines = [f"{name}: {value}" for name, value in card.training.items()]
    return "\n\n".join(["## Training", fenced("\n".join(lines))])
