"""gr-platform: generative recommenders (HSTU) from an interaction log to a served, retrained model."""
