"""Figures of slices, the preview of a result, and a page that shows it in a browser."""
