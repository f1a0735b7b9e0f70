"""`python -m scap_hub`, for `torchrun -m scap_hub` and `accelerate launch -m scap_hub`."""

from scap_hub.cli import main

main()
