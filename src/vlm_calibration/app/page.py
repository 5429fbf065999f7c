"""The web page: an image, a question and a perturbation of the key object, and the answers of both models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from vlm_calibration.app.subject import (
    DETECTED,
    DRAWN,
    MAX_UPLOAD,
    WHOLE,
    Editor,
    KeyObjectFinder,
    Subject,
    demo_subject,
    key_object,
    painted,
    uploaded_subject,
    with_longer_side,
)
from vlm_calibration.data.noise import Sample
from vlm_calibration.inference.asking import BASE, CALIBRATED, ENDPOINT, Answer, CalibratedModel
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.levels import LinearLevels, Perturbation
from vlm_calibration.records import DataError

SCENES = 8
EDITOR_SIDE = 480  # pixels of the longer side of the picture to paint on
TITLES = {BASE: "Base model", CALIBRATED: "Calibrated model", ENDPOINT: "Served model"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
LATEST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
# Events that redraw the same part wait in one queue, so that the last event has the last word.
ANSWERS, CURVE = ({"concurrency_id": name, "concurrency_limit": 1} for name in ("answers", "curve"))


@dataclass(eq=False)
class PageHandlers:
    """Handlers of the page's events; they hold no data of visitors. Without a finder, visitors paint. The report may appear later."""

    model: CalibratedModel
    finder: KeyObjectFinder | None
    report: Path

    def begin(self, subject: Subject) -> list[Any]:
        """New values of subject, picture to paint on, question, key object and strength."""
        options = [*subject.objects, *([DETECTED] if self.finder else []), DRAWN, WHOLE]
        chosen = subject.asked_about(subject.question) or (options[0] if subject.objects else WHOLE)
        picture = with_longer_side(subject.image, EDITOR_SIDE)
        editor = {"background": picture, "layers": [], "composite": picture}
        question = subject.question or gr.skip()
        return [subject, editor, question, gr.Dropdown(choices=options, value=chosen), 0]

    def begin_scene(self, event: gr.SelectData) -> list[Any]:
        """As `begin` for a scene of the demo."""
        return self.begin(demo_subject(int(event.index) % SCENES))

    def begin_upload(self, path: str) -> list[Any]:
        """As `begin` for an uploaded image, which is then deleted; or an error message."""
        try:
            return self.begin(uploaded_subject(path))
        except DataError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error
        finally:
            Path(path).unlink(missing_ok=True)

    def name_object(self, subject: Subject, question: str) -> Any:
        """The key object that a question is about, if that is known."""
        return subject.asked_about(question) or gr.skip()

    def choose_painted(self, subject: Subject, editor: Editor) -> Any:
        """What is painted becomes the key object. Gradio also reports a new image, on which nothing is."""
        return gr.skip() if painted(editor, subject.image.shape) is None else DRAWN

    def _samples(
        self, subject: Subject, choice: str, editor: Editor, question: str, kind: str, strengths: list[float]
    ) -> list[Sample]:
        mask = key_object(subject, choice, editor, question, self.finder) if any(strengths) else None
        sample = partial(self.model.sample, subject.image, question, mask=mask)
        return [sample(perturbation=Perturbation(kind, strength)) for strength in strengths]

    def answer(
        self, subject: Subject, choice: str, editor: Editor, question: str, kind: str, percentage: float
    ) -> tuple[np.ndarray | None, list[list[str]], str]:
        """The image as the models see it, the rows of their answers, and a message."""
        seen = None
        try:
            # The perturbation does not depend on the question.
            asked = question if question.strip() else "?"
            [sample] = self._samples(subject, choice, editor, asked, kind, [percentage / 100])
            seen = self.model.seen(sample)
            # The browser would show a small image at its own size.
            factor = max(1, EDITOR_SIDE // max(seen.shape[:2]))
            seen = seen.repeat(factor, axis=0).repeat(factor, axis=1)
            if unknown := "Ask a question." if asked == "?" else self.model.unknown_part(question):
                raise DataError(unknown)
            answers = self.model.answers([sample])
        except DataError as error:
            return seen, [], plain(str(error))
        first = {system: of_system[0] for system, of_system in answers.items()}
        notes = [plain(a.rule.guarantee) for a in first.values() if a.rule is not None]
        if len(first) == 1 and self.model.is_demo:
            notes.append("This is the base model alone: `make train-sft` trains an adapter.")
        return seen, answer_rows(first), "\n\n".join(notes)

    def curve(self, subject: Subject, choice: str, editor: Editor, question: str, kind: str) -> Any:
        """Each system's confidence at all strengths of a kind; None without answers."""
        if self.model.unknown_part(question):
            return None
        strengths = list(LinearLevels().strengths())
        try:
            curves = self.model.answers(self._samples(subject, choice, editor, question, kind, strengths))
        except DataError:
            return None  # `answer` says why, or the image is untouched and nothing is painted yet
        points = [
            (100 * strength, 100 * value, f"{TITLES[system]}, {measure}")
            for system, answers in curves.items()
            for strength, answer in zip(strengths, answers, strict=True)
            for measure, value in (("stated", answer.confidence), ("expected", answer.expected))
            if value is not None
        ]
        return pd.DataFrame(points, columns=["strength", "confidence", "line"])

    def show_report(self) -> str:
        """Show the current report in a frame that is isolated from this page."""
        if not self.report.is_file():
            writers = "make demo ends with one, and vlm-calibration report writes one for any run"
            return escape(f"No report yet at {self.report}: {writers}.")
        # A link to "#made" alone would lead to the address of this page. Texts in the report cannot hold a plain quotation mark.
        text = self.report.read_text(encoding="utf-8").replace('href="#', 'href="about:srcdoc#')
        frame = 'title="Report" sandbox="allow-scripts" style="width: 100%; height: 85vh; border: 0"'
        return f'<iframe {frame} srcdoc="{escape(text, quote=True)}"></iframe>'


def plain(text: str) -> str:
    """A text as a sentence in Markdown that shows it as it is: with a capital, a full stop, and special characters escaped."""
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", escape(text, quote=False))


def answer_rows(answers: Mapping[str, Answer]) -> list[list[str]]:
    """System -> its answer, as rows of the table, which shows texts as they are."""
    rows = []
    for system, answer in answers.items():
        shown = ("none" if v is None else f"{v:.0%}" for v in (answer.confidence, answer.expected))
        decision = "" if answer.decision is None else f"{answer.decision}: {answer.reason}"
        rows.append([TITLES[system], answer.answer, *shown, decision])
    return rows


def build_page(handlers: PageHandlers) -> gr.Blocks:
    """Build the page; `serve` launches it."""
    name = handlers.model.name.replace(str(DEMO_MODEL), "the demo's model").replace(f"{Path.cwd()}/", "")
    with gr.Blocks(
        title="vlm-calibration", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as page:
        invitation = "Perturb the object that a question is about, and see which model's confidence falls."
        gr.Markdown(f"# How sure is it?\n{invitation} Model: {plain(name)}")
        with gr.Tab("Ask"):
            _ask_tab(page, handlers)
        with gr.Tab("Report") as tab:
            report = gr.HTML()
        tab.select(handlers.show_report, None, report, **QUIET)
    return page


def _ask_tab(page: gr.Blocks, handlers: PageHandlers) -> None:
    scenes = [demo_subject(i) for i in range(SCENES)]
    # A visitor's data are here alone, separate for every visit.
    subject = gr.State(scenes[0], time_to_live=3600)
    with gr.Row():
        with gr.Column(min_width=320):
            pictures = [(with_longer_side(s.image, EDITOR_SIDE), ", ".join(s.objects)) for s in scenes]
            fixed: dict[str, Any] = {"allow_preview": False, "buttons": [], "interactive": False}
            sizes: dict[str, Any] = {"columns": SCENES // 2, "height": 220}
            gallery = gr.Gallery(pictures, label="Scenes of the demo", elem_id="scenes", **sizes, **fixed)
            invitation = f"or upload an image (up to {MAX_UPLOAD >> 20} MB)"
            upload = gr.UploadButton(invitation, file_types=["image"], size="sm")
            brush = gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed")
            without: dict[str, Any] = {"sources": (), "transforms": (), "layers": False, "buttons": []}
            title = "Image: paint over the key object"
            picture = gr.ImageEditor(label=title, brush=brush, format="png", elem_id="picture", **without)
            with gr.Row():
                kinds = [("JPEG" if k == "jpeg" else k.replace("_", " ").capitalize(), k) for k in KIND_NAMES]
                kind = gr.Dropdown(kinds, value=KIND_NAMES[0], label="Perturbation")
                # An event just before a new image arrives still names an object of the old one; `key_object` checks the value.
                choice = gr.Dropdown(label="Key object", allow_custom_value=True, elem_id="object")
            strength = gr.Slider(
                0, 100, 0, step=5, label="Strength on the key object (%)", elem_id="strength"
            )
            question = gr.Textbox(label="Question", max_length=500, max_lines=3)
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Column(min_width=320):
            seen = gr.Image(
                label="What the models see", interactive=False, format="png", buttons=[], elem_id="seen"
            )
            message = gr.Markdown()
            # Stated: the confidence in the answer; expected: the mean of all that might have been stated.
            names = ["model", "answer", "stated", "expected", "decision"]
            answers = gr.Dataframe(
                headers=names, datatype="str", label="Answers", interactive=False, wrap=True
            )
            axes: dict[str, Any] = {"x": "strength", "y": "confidence", "color": "line", "y_lim": [0, 100]}
            title = "Confidence at every strength (%)"
            curve = gr.LinePlot(label=title, height=280, elem_id="curve", **axes)

    inputs = [subject, choice, picture, question, kind]
    outputs = [seen, answers, message]
    begun = [subject, picture, question, choice, strength]

    def update(event: Any) -> None:
        """Redraw image, answers and curve after an event."""
        answered = event.then(handlers.answer, [*inputs, strength], outputs, **PRIVATE, **ANSWERS)
        answered.then(handlers.curve, inputs, curve, **PRIVATE, **CURVE)

    update(page.load(lambda: handlers.begin(demo_subject(0)), None, begun, **QUIET))
    update(gallery.select(handlers.begin_scene, None, begun, **QUIET))
    update(upload.upload(handlers.begin_upload, upload, begun, **QUIET))
    update(gr.on([ask.click, question.submit, choice.input, kind.input], lambda: None, None, None, **QUIET))
    picture.input(handlers.choose_painted, [subject, picture], choice, **LATEST)
    question.input(handlers.name_object, [subject, question], choice, **LATEST)
    strength.input(handlers.answer, [*inputs, strength], outputs, **LATEST, **ANSWERS)
