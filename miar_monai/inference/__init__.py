"""From an image to its super-resolved image: the inferer, the call, the report, the bundles."""
