"""The report on a model: what is measured, in which shards, and the page that tells of it."""
