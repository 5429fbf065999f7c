"""Progress of long work as one line, live on a terminal and plain in a log file.

`callbacks.progress.Progress` shows the stages with it, `track` and `working` show all other work that takes more than a few
seconds.
"""

from vlm_calibration.progress.line import ProgressLine, track, working
from vlm_calibration.progress.status import stage_name

__all__ = ["ProgressLine", "stage_name", "track", "working"]
