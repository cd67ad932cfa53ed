"""What a packaged model runs: images in, labels, probabilities and a verdict out.

Every model version ships this room, so it imports only `tla_service.models`, `tla_service.errors` and the version's own
requirements.
"""
