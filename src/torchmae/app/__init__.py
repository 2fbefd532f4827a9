"""`torchmae app`: a page in the browser to try a trained model on. `session` computes, the rest is what one sees."""
