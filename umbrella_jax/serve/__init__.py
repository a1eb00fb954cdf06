"""A local server: a page to ask a model about scans and to look at them, and an API in OpenAI's form."""

import importlib.util

_PACKAGES = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "python-multipart": "python_multipart",
    "prometheus-client": "prometheus_client",
}
"""{package of the extra `serve`: its module}."""


def why_unavailable() -> str | None:
    """Return which packages are missing and how to install them; None if none is."""
    missing = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    return f"{' and '.join(missing)} not installed; pip install 'umbrella-jax[serve]'" if missing else None
