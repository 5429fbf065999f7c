"""The web page: an image, a question and a perturbation of the key object on the left, the answers of both models on the right.

A visitor's data are kept in `gr.State` only, which is separate for every visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vlm_calibration.app import view
from vlm_calibration.app.subject import (
    DRAWN,
    MAX_UPLOAD,
    WHOLE,
    KeyObjectFinder,
    Subject,
    asked_about,
    choices,
    demo_subject,
    key_object,
    uploaded_subject,
)
from vlm_calibration.app.widgets import (
    SIDE,
    kind_choice,
    marker,
    object_choice,
    question_choice,
    scene_strip,
    upload_errors,
)
from vlm_calibration.data.noise import Sample
from vlm_calibration.demo.questions import FORMS, known_question, question_about
from vlm_calibration.inference.asking import BASE, Asker
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.levels import LinearLevels, Perturbation
from vlm_calibration.records import DataError

SCENES = 8
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
LATEST = {**QUIET, "trigger_mode": "always_last"}
# Events that redraw the same part wait in one queue, so that the last event has the last word.
PICTURE, ANSWERS, CURVE = (
    {"concurrency_id": name, "concurrency_limit": 1} for name in ("picture", "answers", "curve")
)
_LEGEND = '<p class="legend">Stated: the confidence in the answer. Expected: the mean of all confidences that might have been stated.</p>'


class PageHandlers:
    """Handlers of the page's events. They hold the models and no data of visitors.

    Args:
        model: the model that answers.
        finder: finds key objects in uploaded images; None: visitors paint them.
        report: page to show in the second tab; None: none.
    """

    def __init__(
        self, model: Asker, finder: KeyObjectFinder | None = None, report: Path | None = None
    ) -> None:
        self.model = model
        self.finder = finder
        self.report = report

    def begin(self, subject: Subject) -> list[Any]:
        """New values of subject, picture to paint on, question, key object, strength and the closed solution."""
        options = choices(subject, self.finder)
        default = options[0] if subject.objects else WHOLE
        chosen = asked_about(subject, subject.question) or default
        picture = gr.HTML(value="", image=view.data_url(subject.image, SIDE))
        question = subject.question or gr.skip()
        solution = gr.Accordion(open=False, visible=bool(subject.corners))
        return [subject, picture, question, gr.Dropdown(choices=options, value=chosen), 0, solution]

    def begin_scene(self, event: gr.EventData) -> list[Any]:
        """As `begin` for a scene of the demo; also clears the error message."""
        return [*self.begin(demo_subject(int(event.index) % SCENES)), ""]

    def begin_upload(self, path: str) -> list[Any]:
        """As `begin` for an uploaded image, which is then deleted; or show an error message."""
        try:
            return [*self.begin(uploaded_subject(path)), ""]
        except DataError as error:
            return [*[gr.skip()] * 6, view.notice(str(error), "problem")]
        finally:
            Path(path).unlink(missing_ok=True)

    def name_object(self, subject: Subject, question: str) -> Any:
        """Select the key object that a question is about, if that is known."""
        return asked_about(subject, question) or gr.skip()

    def compose(self, subject: Subject, question: str, form: str | None, word: str | None) -> list[Any]:
        """Question and key object of a chosen form and word; what does not fit the other gets the first that does.

        Gradio also reports a choice when the focus leaves a dropdown; then nothing has changed, and a typed question stays.
        """
        if (form, word) == (None, None) or known_question(question) == (form, word):
            return [gr.skip(), gr.skip()]
        form = form or next(form for form, words in FORMS.items() if word in words)
        composed = question_about(form, word if word in FORMS[form] else FORMS[form][0])
        return [composed, self.name_object(subject, composed)]

    def recognise(self, question: str) -> list[Any]:
        """Select form and word of a question; neither if the demo model does not know the question."""
        known = known_question(question)
        if known is None:
            return [None, None]
        return [known.form, gr.Dropdown(choices=list(FORMS[known.form]), value=known.word)]

    def solve(self, subject: Subject, question: str) -> str:
        """Show the right answer."""
        return view.solution(question, subject.corners)

    def _samples(
        self,
        subject: Subject,
        choice: str,
        marks: str,
        question: str,
        kind: str,
        strengths: Sequence[float],
    ) -> list[Sample]:
        untouched = not any(strengths)
        mask = None if untouched else key_object(subject, choice, marks, question, self.finder)
        return [
            self.model.sample(subject.image, question, mask=mask, perturbation=Perturbation(kind, strength))
            for strength in strengths
        ]

    def see(self, subject: Subject, choice: str, marks: str, question: str, kind: str, percent: float) -> str:
        """Show the image as the models see it."""
        try:
            # The perturbation does not depend on the question.
            [sample] = self._samples(subject, choice, marks, question or "?", kind, [percent / 100])
        except DataError as error:
            return view.notice(str(error))
        what = f"{percent:.0f}% {view.kind_in_words(kind)} on {choice}" if percent else "the image untouched"
        return view.picture(self.model.seen(sample), f"What the models see: {what}")

    def answer(
        self, subject: Subject, choice: str, marks: str, question: str, kind: str, percent: float
    ) -> str:
        """Show each system's answer, or what the demo model does not know in the question."""
        if unknown := self.model.unknown_part(question):
            return view.notice(view.sentence(unknown), "problem")
        try:
            samples = self._samples(subject, choice, marks, question, kind, [percent / 100])
            by_system = self.model.answers(samples, self.model.systems)
        except DataError as error:
            return view.notice(str(error), "problem")
        panels = "".join(view.answer_panel(system, answers[0]) for system, answers in by_system.items())
        hint = (
            ""
            if tuple(by_system) != (BASE,)
            else view.notice("This is the base model alone: `make train-sft` trains an adapter.")
        )
        return f'<div class="answers" data-kind="{escape(kind)}" data-strength="{percent:.0f}">{panels}</div>{_LEGEND}{hint}'

    def curve(
        self, subject: Subject, choice: str, marks: str, question: str, kind: str, percent: float
    ) -> tuple[Any, str]:
        """Each system's answers at all strengths of a kind, as data for `mark` and as a figure."""
        if self.model.unknown_part(question):
            return None, view.notice("There is no answer to draw.")
        strengths = LinearLevels().strengths()
        try:
            samples = self._samples(subject, choice, marks, question, kind, strengths)
            curves = self.model.answers(samples, self.model.systems)
        except DataError as error:
            return None, view.notice(str(error))
        return (curves, strengths, kind), view.response_curve(curves, strengths, kind, percent / 100)

    def mark(self, curve: Any, percent: float) -> Any:
        """Redraw the curve with another strength marked."""
        if curve is None:
            return gr.skip()
        curves, strengths, kind = curve
        return view.response_curve(curves, strengths, kind, percent / 100)

    def show_report(self) -> str:
        """Show the current report in a frame that is isolated from this page."""
        if self.report is None or not self.report.is_file():
            where = "" if self.report is None else f" There is none at {self.report}."
            return view.notice(
                f"No report yet: `make demo` ends with one, and `vlm-calibration report` writes one for any run.{where}"
            )
        # A link to "#made" alone would lead to the address of this page. Texts in the report cannot hold a plain quotation mark.
        text = self.report.read_text(encoding="utf-8").replace('href="#', 'href="about:srcdoc#')
        content = escape(text, quote=True)
        return f'<iframe class="report" title="Report" sandbox="allow-scripts" srcdoc="{content}"></iframe>'


def build_page(handlers: PageHandlers) -> gr.Blocks:
    """Build the page; `serve` launches it."""
    with gr.Blocks(
        title="vlm-calibration", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as page:
        gr.HTML(
            "<h1>How sure is it?</h1><p>Perturb the object that a question is about, and see which model's confidence "
            f"falls.</p><p>Model: <code>{escape(_short_name(handlers.model.name))}</code></p>"
        )
        with gr.Tab("Ask", elem_id="ask-tab"):
            _ask_tab(page, handlers)
        with gr.Tab("Report", elem_id="report-tab") as tab:
            report = gr.HTML()
        tab.select(handlers.show_report, None, report, **QUIET)
    return page


def _short_name(name: str) -> str:
    """A model's name with paths relative to the current folder."""
    return name.replace(str(DEMO_MODEL), "the demo's model").replace(f"{Path.cwd()}/", "")


def _ask_tab(page: gr.Blocks, handlers: PageHandlers) -> None:
    first = demo_subject(0)
    subject = gr.State(first, time_to_live=3600)
    curves = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(min_width=320):
            scenes = scene_strip([demo_subject(i) for i in range(SCENES)])
            upload = gr.UploadButton(
                f"or upload an image (up to {MAX_UPLOAD >> 20} MB)",
                file_types=["image"],
                size="sm",
                elem_id="upload",
            )
            problem = upload_errors(MAX_UPLOAD)
            with gr.Row(elem_id="pictures"):
                picture = marker()
                seen = gr.HTML(elem_id="seen")
            with gr.Row(elem_id="perturbation"):
                kind = kind_choice(KIND_NAMES)
                strength = gr.Slider(
                    0,
                    100,
                    0,
                    step=5,
                    label="Strength on the key object (%)",
                    elem_id="strength",
                    min_width=220,
                    scale=3,
                )
            choice = object_choice()
            if handlers.model.is_demo:
                with gr.Accordion("What the demo model knows", open=False, elem_id="known"):
                    gr.HTML(view.known_to_demo())
                with gr.Row():
                    form, word = question_choice()
            question = gr.Textbox(label="Question", max_length=500, max_lines=3, elem_id="question")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Column(min_width=320):
            answers = gr.HTML(elem_id="answers")
            with gr.Accordion("The right answer", open=False, elem_id="solution") as solution:
                solved = gr.HTML()
            gr.HTML("<h2>Confidence at every strength</h2>")
            curve = gr.HTML(elem_id="curve")

    inputs = [subject, choice, picture, question, kind, strength]
    begun = [subject, picture, question, choice, strength, solution]

    def update(event: Any) -> None:
        """Update image, answers and curve after an event."""
        event.then(handlers.see, inputs, seen, **QUIET, **PICTURE).then(
            handlers.answer, inputs, answers, api_visibility="private", **ANSWERS
        ).then(handlers.curve, inputs, [curves, curve], api_visibility="private", **CURVE).then(
            # The strength may have changed since.
            handlers.mark,
            [curves, strength],
            curve,
            **QUIET,
            **CURVE,
        )

    update(page.load(lambda: handlers.begin(demo_subject(0)), None, begun, **QUIET))
    update(scenes.select(handlers.begin_scene, None, [*begun, problem], **QUIET))
    update(upload.upload(handlers.begin_upload, upload, [*begun, problem], **QUIET))
    update(gr.on([ask.click, question.submit, choice.input, kind.input], lambda: "", None, problem, **QUIET))
    update(picture.input(lambda: DRAWN, None, choice, **LATEST))
    if handlers.model.is_demo:
        question.change(handlers.recognise, question, [form, word], **LATEST)
        composed = gr.on(
            [form.input, word.input],
            handlers.compose,
            [subject, question, form, word],
            [question, choice],
            **LATEST,
        )
        update(composed.then(lambda: "", None, problem, **QUIET))
    # In the browser, since the server's reply could close what the visitor has opened since.
    question.change(None, None, solution, js="() => ({ __type__: 'update', open: false })", **QUIET)
    solution.expand(handlers.solve, [subject, question], solved, **QUIET)
    question.input(handlers.name_object, [subject, question], choice, **LATEST)
    strength.input(handlers.see, inputs, seen, **LATEST, **PICTURE)
    strength.input(handlers.answer, inputs, answers, **LATEST, **ANSWERS)
    strength.input(handlers.mark, [curves, strength], curve, **LATEST, **CURVE)
