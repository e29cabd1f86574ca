"""A page to try a bundle: a prompt, its image, and the bits that the policy chose for it."""
