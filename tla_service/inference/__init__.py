"""What a packaged model runs and ships: it imports only `tla_service.models`, `tla_service.errors` and requirements."""
