"""`evaclip` with the arguments that this script is given."""

import sys

from evaclip.commands.main import main

sys.exit(main())
