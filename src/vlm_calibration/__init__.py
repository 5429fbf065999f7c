"""Train vision-language models to state honest confidence.

`load_calibrated` loads a trained model to ask it; everything else is in the packages below.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Answer", "choose_threshold", "load_calibrated"]

if TYPE_CHECKING:
    from vlm_calibration.inference.answers import Answer, choose_threshold
    from vlm_calibration.inference.model import load_calibrated
else:
    # Imported on demand: the command line imports this package first, and its help must not wait for torch.
    def __getattr__(name: str) -> Any:
        if name == "load_calibrated":
            from vlm_calibration.inference.model import load_calibrated

            return load_calibrated
        if name in ("Answer", "choose_threshold"):
            from vlm_calibration.inference import answers

            return getattr(answers, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
