"""`python -m twostroke_prefill`."""

import sys

from twostroke_prefill.service import main

if __name__ == "__main__":
    sys.exit(main())
