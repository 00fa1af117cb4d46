"""Modules under their former names, before the sub-packages: configs and code that use them go on working."""
