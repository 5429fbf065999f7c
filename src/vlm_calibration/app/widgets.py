"""The page's own components: a picture to paint the key object on (with `marker.js`), the scenes, choices, and upload errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from vlm_calibration.app import view
from vlm_calibration.app.subject import Subject
from vlm_calibration.demo.questions import FORMS, shown_form
from vlm_calibration.demo.scenes import CLASSES

SIDE = 480
"""Pixels of the longer side of the picture to paint on."""

_TEMPLATE = """
<canvas width="480" height="480" tabindex="0" role="img"
  aria-label="The image. Paint over the key object: with the keyboard, arrows move the brush, space paints, delete clears.">
</canvas>
<div class="tools">
  <label>Brush <input type="range" min="3" max="40" value="14" aria-label="Brush size"></label>
  <button type="button">Clear paint</button>
</div>
"""
_STYLE = """
canvas { display: block; width: 100%; max-width: 22rem; height: auto; margin: 0 auto; border-radius: 6px; cursor: crosshair;
  touch-action: none; }
canvas:focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; justify-content: center; margin-top: .5rem; font-size: .85rem; }
.tools label { display: flex; gap: .5rem; align-items: center; }
.tools input { width: 6.5rem; }
.tools button { padding: .25rem .75rem; border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--background-fill-secondary); color: var(--body-text-color); font: inherit;
  font-size: .85rem; white-space: nowrap; cursor: pointer; }
"""


_REFUSE = """
document.addEventListener('change', (event) => {
  const file = event.target.type === 'file' && event.target.files[0];
  if (file && file.size > LARGEST) props.value = TOO_LARGE;
  else if (file && !file.type.startsWith('image/')) props.value = NO_IMAGE;
}, true);
"""


def upload_errors(max_bytes: int) -> gr.HTML:
    """The component for errors of uploads; the browser fills it for files that it does not send, which Gradio drops silently.

    Args:
        max_bytes: largest size of a file.
    """
    texts = {
        "LARGEST": max_bytes,
        "TOO_LARGE": view.notice(
            f"the image: a file of more than {max_bytes >> 20} MB; shrink it", "problem"
        ),
        "NO_IMAGE": view.notice("the file is not an image", "problem"),
    }
    script = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in texts.items()) + _REFUSE
    return gr.HTML("", js_on_load=script, elem_id="problem")


def object_choice() -> gr.Dropdown:
    """The dropdown of key objects.

    It accepts custom values, because an event just before a new image arrives still names an object of the old one, which
    Gradio would report as an error; `subject.key_object` checks the value.
    """
    return gr.Dropdown(label="Key object", elem_id="object", allow_custom_value=True)


def kind_choice(kinds: Sequence[str]) -> gr.Dropdown:
    """The dropdown of kinds of perturbation, the first one chosen."""
    named = [(view.kind_in_words(kind, capital=True), kind) for kind in kinds]
    return gr.Dropdown(named, value=kinds[0], label="Perturbation", elem_id="kind", min_width=140, scale=2)


def question_choice() -> tuple[gr.Dropdown, gr.Dropdown]:
    """The dropdowns of the question forms that the demo model knows, and of the words that complete them."""
    forms = [(shown_form(form), form) for form in FORMS]
    return (
        gr.Dropdown(forms, value=None, label="Form of question", elem_id="form", min_width=240, scale=3),
        gr.Dropdown(
            list(CLASSES), value=None, label="Object or position", elem_id="word", min_width=140, scale=2
        ),
    )


def marker() -> gr.HTML:
    """The component to paint on: `image` is the picture as a data URL, the value is the painted mask."""
    return gr.HTML(
        "",
        image="",
        html_template=_TEMPLATE,
        css_template=_STYLE,
        js_on_load=Path(__file__).with_name("marker.js").read_text(encoding="utf-8"),
        elem_id="marker",
    )


_CHOOSE = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('button');
  if (chosen) trigger('select', { index: Number(chosen.dataset.index) });
});
"""


def scene_strip(subjects: Sequence[Subject]) -> gr.HTML:
    """The component with small pictures to choose from; its event `select` has the `index` of the picture."""
    buttons = "".join(
        f'<button type="button" data-index="{index}" aria-label="Scene {index + 1}: {escape(", ".join(subject.objects))}">'
        f'<img alt="" src="{view.data_url(subject.image)}"></button>'
        for index, subject in enumerate(subjects)
    )
    return gr.HTML(
        f'<div class="scenes" role="group" aria-label="Scenes of the demo">{buttons}</div>',
        js_on_load=_CHOOSE,
        elem_id="scenes",
    )
