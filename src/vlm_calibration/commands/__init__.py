"""The subcommands of `vlm-calibration`, one module each: parse the arguments, call the library, print."""
