"""The web page: an image, a question and noise on the key object on the left; what both models say of it on the right.

Nothing of a visitor is kept between events but in `gr.State`, of which every visit has its own.
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
    choices,
    demo_subject,
    key_object,
    named_in,
    uploaded_subject,
)
from vlm_calibration.app.widgets import SIDE, complaints, marker, object_choice, scene_strip
from vlm_calibration.data.noise import Sample
from vlm_calibration.inference.model import DEMO_MODEL, CalibratedModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError

SCENES = 8
QUIET = {"api_visibility": "private", "show_progress": "hidden"}
LATEST = {**QUIET, "trigger_mode": "always_last"}
_LEGEND = '<p class="legend">Stated: the confidence in the answer. Expected: the mean of all that it might have stated.</p>'


class PageHandlers:
    """What the page's events come to. It holds the models and nothing of any visitor.

    Args:
        model: what is asked. finder: finds key objects in uploaded images; None: there is none.
        report: a page to show in the second tab.
    """

    def __init__(
        self, model: CalibratedModel, finder: KeyObjectFinder | None = None, report: Path | None = None
    ) -> None:
        self.model = model
        self.finder = finder
        self.report = report

    def begin(self, subject: Subject) -> list[Any]:
        """Subject, picture to paint on, question, key object and noise for a new subject."""
        known = choices(subject, self.finder)
        chosen = named_in(subject.question, list(subject.objects)) or (known[0] if subject.objects else WHOLE)
        picture = gr.HTML(value="", image=view.data_url(subject.image, SIDE))
        question = subject.question or gr.skip()
        return [subject, picture, question, gr.Dropdown(choices=known, value=chosen), 0]

    def begin_scene(self, event: gr.EventData) -> list[Any]:
        """As `begin`, and what there was to complain of is settled."""
        return [*self.begin(demo_subject(int(event.index) % SCENES)), ""]

    def begin_upload(self, path: str) -> list[Any]:
        try:
            return [*self.begin(uploaded_subject(path)), ""]
        except DataError as error:
            return [*[gr.skip()] * 5, view.notice(str(error), "problem")]
        finally:
            Path(path).unlink(missing_ok=True)

    def name_object(self, subject: Subject, question: str) -> Any:
        """The key object that a question names, if it names one."""
        return named_in(question, list(subject.objects)) or gr.skip()

    def _samples(
        self, subject: Subject, choice: str, marks: str, question: str, noise: Sequence[float]
    ) -> list[Sample]:
        clean = not any(noise)
        mask = None if clean else key_object(subject, choice, marks, question, self.finder)
        steps = [round(share * self.model.noise.schedule.steps) for share in noise]
        return [self.model.sample(subject.image, question, mask=mask, step=step) for step in steps]

    def see(self, subject: Subject, choice: str, marks: str, question: str, noise: float) -> str:
        """What the models see."""
        try:
            # The noise is the same whatever is asked.
            [sample] = self._samples(subject, choice, marks, question or "?", [noise / 100])
        except DataError as error:
            return view.notice(str(error))
        caption = (
            f"What the models see: {noise:.0f}% noise on {choice}"
            if noise
            else "What the models see: no noise"
        )
        return view.picture(self.model.seen(sample), caption)

    def answer(self, subject: Subject, choice: str, marks: str, question: str, noise: float) -> str:
        """What each system says."""
        try:
            samples = self._samples(subject, choice, marks, question, [noise / 100])
            said = self.model.answers(samples, self.model.systems)
        except DataError as error:
            return view.notice(str(error), "problem")
        panels = "".join(view.answer_panel(system, answers[0]) for system, answers in said.items())
        hint = (
            ""
            if len(said) > 1
            else view.notice("This is the base model alone: `make train-sft` trains an adapter.")
        )
        return f'<div class="answers" data-noise="{noise:.0f}">{panels}</div>{_LEGEND}{hint}'

    def curve(
        self, subject: Subject, choice: str, marks: str, question: str, noise: float
    ) -> tuple[Any, str]:
        """What each system says at all levels of noise, for later and as a figure."""
        amounts = [step / 1000 for step in LinearLevels().steps]
        try:
            samples = self._samples(subject, choice, marks, question, amounts)
            curves = self.model.answers(samples, self.model.systems)
        except DataError as error:
            return None, view.notice(str(error))
        return (curves, amounts), view.response_curve(curves, amounts, noise / 100)

    def mark(self, drawn: Any, noise: float) -> Any:
        """The curve with another amount of noise marked."""
        if drawn is None:
            return gr.skip()
        curves, amounts = drawn
        return view.response_curve(curves, amounts, noise / 100)

    def show_report(self) -> str:
        """The report as it is now, in a frame that can reach nothing of this page."""
        if self.report is None or not self.report.is_file():
            where = "" if self.report is None else f" There is none at {self.report}."
            return view.notice(
                f"No report yet: `make demo` ends with one, and `vlm-calibration report` writes one of any run.{where}"
            )
        content = escape(self.report.read_text(encoding="utf-8"), quote=True)
        return f'<iframe class="report" title="Report" sandbox="allow-scripts" srcdoc="{content}"></iframe>'


def build_page(desk: PageHandlers) -> gr.Blocks:
    """The page of a desk, not yet served."""
    with gr.Blocks(
        title="vlm-calibration", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as page:
        gr.HTML(
            "<h1>How sure is it?</h1><p>Put noise on what a question is about, and see which model notices that it can no "
            f"longer see it.</p><p>Asked: <code>{escape(_shown(desk.model.name))}</code></p>"
        )
        with gr.Tab("Ask"):
            _ask_tab(page, desk)
        with gr.Tab("Report") as tab:
            report = gr.HTML()
        tab.select(desk.show_report, None, report, **QUIET)
    return page


def _shown(name: str) -> str:
    """A model's name, its paths as seen from here."""
    return name.replace(str(DEMO_MODEL), "the demo's model").replace(f"{Path.cwd()}/", "")


def _ask_tab(page: gr.Blocks, desk: PageHandlers) -> None:
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
            problem = complaints(MAX_UPLOAD)
            with gr.Row(elem_id="pictures"):
                picture = marker()
                seen = gr.HTML(elem_id="seen")
            noise = gr.Slider(0, 100, 0, step=5, label="Noise on the key object (%)", elem_id="noise")
            choice = object_choice()
            question = gr.Textbox(label="Question", max_length=500, max_lines=3, elem_id="question")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Column(min_width=320):
            answers = gr.HTML(elem_id="answers")
            gr.HTML("<h2>Confidence at every level of noise</h2>")
            curve = gr.HTML(elem_id="curve")

    asked = [subject, choice, picture, question, noise]
    begun = [subject, picture, question, choice, noise]

    def shown(event: Any) -> None:
        """See, ask and draw everything anew."""
        event.then(desk.see, asked, seen, **QUIET).then(
            desk.answer, asked, answers, api_visibility="private"
        ).then(desk.curve, asked, [curves, curve], api_visibility="private")

    shown(page.load(lambda: desk.begin(demo_subject(0)), None, begun, **QUIET))
    shown(scenes.select(desk.begin_scene, None, [*begun, problem], **QUIET))
    shown(upload.upload(desk.begin_upload, upload, [*begun, problem], **QUIET))
    shown(gr.on([ask.click, question.submit, choice.input], lambda: "", None, problem, **QUIET))
    shown(picture.input(lambda: DRAWN, None, choice, **LATEST))
    question.input(desk.name_object, [subject, question], choice, **LATEST)
    noise.input(desk.see, asked, seen, **LATEST)
    noise.input(desk.answer, asked, answers, **LATEST)
    noise.input(desk.mark, [curves, noise], curve, **LATEST)
