"""`python -m nanovlm.bench`, see decode.py."""

import sys

from nanovlm.bench.decode import main

sys.exit(main())
