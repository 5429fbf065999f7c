"""The front door: asking a calibrated model from Python, from the command line, and on a web page."""
