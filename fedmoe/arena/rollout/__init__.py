"""Episodes: how they are played, held-out evaluation, and what is measured on them."""
