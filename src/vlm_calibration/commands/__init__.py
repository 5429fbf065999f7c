"""The subcommands of `vlm-calibration`, one module each: parse the arguments, call the library, print.

A command raises an ArgumentError for a mistake in the call, a DataError for data or settings that cannot be used, and a CommandError to end
with a status of its own; `cli.main` prints each in one line.
"""
