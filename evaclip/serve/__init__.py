"""Search in a store over HTTP: an API and a page."""

from evaclip.serve.app import create_app

__all__ = ["create_app"]
