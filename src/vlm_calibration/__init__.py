"""Train vision-language models to state honest confidence.

`load_calibrated` loads a trained model to ask it; `parse_confidence` reads the confidence from the text of one that is served elsewhere. `Plan` and the steps of a calibration (`fit_levels`, `train_sft`, `train_dpo`,
`evaluate`, `report`) train one. `__version__` is the version of the installed package. Everything else is in the packages below.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from vlm_calibration.inference.asking import Answer
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

# bitsandbytes, which peft imports, logs this on some CPUs, also if no weight has 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)

if not TYPE_CHECKING:
    # Imported on demand: the command line imports this package first, and its help must not wait for torch.
    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("vlm-calibration")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        elsewhere = {
            "Answer": "inference.asking",
            "load_calibrated": "inference.model",
            "parse_confidence": "text.confidence",
        }
        return getattr(import_module(f"{__name__}.{elsewhere.get(name, 'steps')}"), name)

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
