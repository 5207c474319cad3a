"""The main job: a model's variants, scored on the same tokens as the baseline."""
