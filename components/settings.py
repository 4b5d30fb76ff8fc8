"""The image that every component runs in; the only place that names it."""

import os

DEFAULT_IMAGE = "spin-diffusion/runtime-python:0.1.0"
"""What a build without a registry is called; nobody owns that name in a public one."""

RUNTIME_IMAGE = os.environ.get("SPIN_RUNTIME_IMAGE") or DEFAULT_IMAGE
"""Set ``SPIN_RUNTIME_IMAGE`` to your registry's name (with a digest) before compiling."""
