"""Former module names, from before the sub-packages, which stay valid for configs and code."""
