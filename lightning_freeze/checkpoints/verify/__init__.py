"""Two files of weights, or one and a certificate -> what is identical to the bit."""
