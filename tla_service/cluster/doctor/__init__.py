"""A check-up of a cluster: what training needs of it, tried on every node, with a remedy for what is wrong."""
