"""What each region of a score map sees: derived from the layers, and measured."""
