"""`python -m vlm_calibration.cli`."""

import sys

from vlm_calibration.cli import main

if __name__ == "__main__":
    sys.exit(main())
