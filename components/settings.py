"""The image that every component runs in; the only place that names it."""

import os

RUNTIME_IMAGE = os.environ.get("SPIN_RUNTIME_IMAGE", "spin-diffusion/runtime-python:0.1.0")
"""Set ``SPIN_RUNTIME_IMAGE`` to your registry's name (with a digest) before compiling."""
