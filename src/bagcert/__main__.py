"""`python -m bagcert`."""

from bagcert.cli import main

if __name__ == "__main__":  # workers that decode images import this file too
    main()
