"""Reports of evaluations: data objects first, then figures, then one HTML page; and one image explained."""
