"""The serving application under the import path of Serve's configurations: ``deploy.serve_app:app``.

serve run deploy.serve_app:app model=models:/tla-digits@champion
"""

from tla_service.serving.app import app

__all__ = ["app"]
