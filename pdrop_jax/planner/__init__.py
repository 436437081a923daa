"""TPU programs compiled without a TPU, and what the compiler says of them."""
