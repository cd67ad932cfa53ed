"""What a packaged model runs and ships: it imports only `models`, `pixels`, `errors` and requirements."""
