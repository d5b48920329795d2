"""Entry point of `python -m bagcert`."""

from bagcert.cli import main

if __name__ == "__main__":  # worker processes for image decoding also import this file
    main()
