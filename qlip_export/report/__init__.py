"""A bundle as one HTML page: what it draws at which bits, what the policy asks for, what its engines are."""
