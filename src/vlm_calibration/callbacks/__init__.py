"""What happens around a stage: files of a run, adapters, loggers, and tables on the terminal."""
