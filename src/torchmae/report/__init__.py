"""What a run has to show: pictures, curves, a verdict in plain words, one HTML page, and the closing table."""
