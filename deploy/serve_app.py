"""The serving application under the name that Serve's configurations import: ``deploy.serve_app:app``.

serve run deploy.serve_app:app model=models:/tla-digits@champion
"""

from tla_service.serving.app import app

__all__ = ["app"]
