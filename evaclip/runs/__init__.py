"""The folder of a training run as its readers see it: file names, log, configuration and lock."""
