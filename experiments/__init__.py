"""Studies made with fastdino: `python -m experiments.NAME --help`."""
