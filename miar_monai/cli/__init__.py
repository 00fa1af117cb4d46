"""The command line: ``miar``."""
