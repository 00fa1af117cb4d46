"""Figures of slices, and the preview of a result."""
