"""Which precisions the engines of a block need: all that the policy can ask for, or fewer that cover them."""
