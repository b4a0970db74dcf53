"""`python -m twostroke_decode`."""

import sys

from twostroke_decode.service import main

if __name__ == "__main__":
    sys.exit(main())
