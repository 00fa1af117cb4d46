"""Inference: `SuperResolver`, the inferer, the error model, input checks, reports and bundles."""
