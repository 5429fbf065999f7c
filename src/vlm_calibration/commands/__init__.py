"""The subcommands of `vlm-calibration`, one module each: parse the arguments, call the library, print.

An ArgumentError is a mistake in the call, a DataError one in data or settings, and a CommandError has a status of its own.
"""
