"""Files of weights, and what is known of them."""
