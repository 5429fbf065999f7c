"""Train vision-language models to state honest confidence.

`load_calibrated` loads a trained model to ask it; `parse_confidence` reads the confidence from the text of one that is served elsewhere. `Plan` and the steps of a calibration (`fit_levels`, `train_sft`, `train_dpo`,
`evaluate`, `report`) train one. `__version__` is the version of the installed package. Everything else is in the packages below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from vlm_calibration.inference.answers import Answer
    from vlm_calibration.inference.model import load_calibrated
    from vlm_calibration.steps import (
        Plan,
        evaluate,
        extract_regions,
        fit_levels,
        report,
        train_dpo,
        train_sft,
    )
    from vlm_calibration.text.confidence import parse_confidence

_STEPS = "vlm_calibration.steps"
_MODULES = {
    "Answer": "vlm_calibration.inference.answers",
    "Plan": _STEPS,
    "evaluate": _STEPS,
    "extract_regions": _STEPS,
    "fit_levels": _STEPS,
    "load_calibrated": "vlm_calibration.inference.model",
    "parse_confidence": "vlm_calibration.text.confidence",
    "report": _STEPS,
    "train_dpo": _STEPS,
    "train_sft": _STEPS,
}
__all__ = [
    "Answer",
    "Plan",
    "evaluate",
    "extract_regions",
    "fit_levels",
    "load_calibrated",
    "parse_confidence",
    "report",
    "train_dpo",
    "train_sft",
]

if not TYPE_CHECKING:
    # Imported on demand: the command line imports this package first, and its help must not wait for torch.
    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("vlm-calibration")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
