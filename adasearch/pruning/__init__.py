"""Which units of a model go, and the cut. Knows nothing of searching, recovering or scoring."""
