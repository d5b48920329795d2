"""Region scorers: networks whose every output cell sees one small rectangle of the image."""
