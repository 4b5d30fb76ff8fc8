"""From winners (real images with prompts) to the encoded data set of a run."""
