"""Reports of evaluations as HTML pages and figures, and visual explanations of single images."""
