"""Rules: integer score maps in, predictions and certificates out. Pure: no network, no files, no labels."""
