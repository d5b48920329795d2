"""Where the certification of many image files runs."""
