"""Publishing: what a model says about itself, and how it reaches the Hugging Face hub."""
