"""`torchmae app`: a web page to try a trained model. `session` computes; the other files are the page."""
