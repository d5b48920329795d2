"""`python -m bagcert`."""

from bagcert.cli import main

main()
